"""The processes of one run, and what each knows of the others: who has come, what all agree on, who is gone.

Every process holds one connection to process 0. Each says something now and then; a connection that breaks, or one that is
silent for `heartbeat_s`, is a process that is gone, and then all the others leave too, at once and with its name: jax's own
service would notice after its timeout, end them with a stack of C++, and the network's libraries would wait for ever.

Needs neither jax nor a device, and works in threads of its own while the main one waits in C++. Messages are JSON, one a
line. Whoever can reach the port can speak here: the cluster's network is trusted (docs/hosts.md).
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any

from jaxlm.config import Exit, HostsConfig, Problem, UserError

BEATS = 5  # messages in heartbeat_s
LEAVE_S = 1.0  # for the last words: of those whose main thread has an error of its own to print, and of `at_end`
END = "the end of the run"
CLOSED = "closed its connection, as a process does that was killed or failed"
RERUN = "the same command on every host goes on from the newest checkpoint"
LOOPBACK = ("127.0.0.1", "localhost")
Limits = HostsConfig


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class _Line:
    """One end of a connection, and when the other was heard last. process: at the other end, -1 while it has not said so."""

    def __init__(self, connection: socket.socket, timeout_s: float):
        connection.settimeout(timeout_s)
        self.connection, self.seen_s = connection, time.monotonic()
        self.process, self.name = -1, ""
        self._received, self._saying = b"", threading.Lock()

    def say(self, message: dict) -> None:
        with suppress(OSError), self._saying:  # who hears will notice what is wrong
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> list[dict] | None:
        """What was said, nothing after timeout_s; None where the other end is closed. Raises: ValueError on what is no JSON."""
        try:
            received = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            received = b""
        if not received:
            return None
        self.seen_s, (*lines, self._received) = time.monotonic(), (self._received + received).split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class _Question:
    """A point that all processes have to reach, with what each says there."""

    said: dict[int, Any]
    end_s: float


class _Hub(threading.Thread):
    """What process 0 runs for all: a thread that passes on what was said, and says who is missing or gone."""

    def __init__(self, listener: socket.socket, count: int, limits: Limits):
        super().__init__(name="gang hub", daemon=True)
        self._listener, self._count, self._limits = listener, count, limits
        self._members: dict[int, _Line] = {}
        self._questions = {"start": _Question({}, time.monotonic() + limits.join_s)}
        self.judges: dict[str, Callable[[list], Any]] = {"start": lambda names: names}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)

    @property
    def others(self) -> list[int]:
        """The processes beside 0 that are still connected."""
        return [process for process in [*self._members] if process != 0]

    def run(self) -> None:
        try:
            beat_s = 0.0
            while True:
                self._hear()
                if time.monotonic() > beat_s:
                    beat_s = time.monotonic() + self._limits.heartbeat_s / BEATS
                    self._look_round()
        except BaseException:  # without this thread the run would go on blind
            traceback.print_exc()
            os._exit(1)

    def _hear(self) -> None:
        for key, _ in self._selector.select(self._limits.heartbeat_s / BEATS):
            if key.data is None:
                connection, _ = self._listener.accept()
                self._selector.register(connection, selectors.EVENT_READ, _Line(connection, self._limits.heartbeat_s))
            else:
                self._read(key.data)

    def _look_round(self) -> None:
        now = time.monotonic()
        for member in [*self._members.values()]:
            member.say({"kind": "beat"})
            if now - member.seen_s > self._limits.heartbeat_s:
                self._gone(member, f"was silent for {now - member.seen_s:.0f} s")
        for at, question in [*self._questions.items()]:
            if now > question.end_s:
                self._missing(at, question)

    def _read(self, member: _Line) -> None:
        try:
            messages = member.hear()
            for message in messages or ():
                self._take(member, message)
        except (ValueError, KeyError, TypeError):
            if member.process >= 0:
                raise
            self._drop(member)  # a stranger on our port
            return
        if messages is None:
            self._gone(member, CLOSED)

    def _take(self, member: _Line, message: dict) -> None:
        if message["kind"] == "hello":
            self._welcome(member, message)
        elif message["kind"] == "say" and member.process >= 0:
            end_s = time.monotonic() + message["limit_s"]
            question = self._questions.setdefault(message["at"], _Question({}, end_s))
            question.said[member.process] = message["value"]
            self._answer(message["at"])
        elif message["kind"] == "left" and member.process >= 0:
            self._gone(member, message["why"], message["code"], wait_s=LEAVE_S)
        elif message["kind"] == "bye":
            self._drop(member)

    def _welcome(self, member: _Line, hello: dict) -> None:
        process, count, name, why = int(hello["process"]), hello["count"], str(hello["name"]), ""
        if count != self._count:
            why = f"says that there are {count} processes, process 0 says {self._count}"
        elif process in self._members:
            why = f"is there already: {self._members[process].name}"
        if why:
            member.say({"kind": "refused", "why": f"process {process} ({name}) {why}"})
            self._drop(member)
            return
        member.process, member.name, self._members[process] = process, name, member
        self._questions["start"].said[process] = name
        self._answer("start")

    def _answer(self, at: str) -> None:
        said = self._questions[at].said
        if len(said) == self._count:
            del self._questions[at]
            value = self.judges.pop(at, lambda values: None)([said[i] for i in range(self._count)])
            for member in [*self._members.values()]:
                member.say({"kind": "answer", "at": at, "value": value})

    def _missing(self, at: str, question: _Question) -> None:
        missing = [i for i in range(self._count) if i not in question.said]
        names = ", ".join(f"{i} ({self._members[i].name})" if i in self._members else str(i) for i in missing)
        why = f"{'process' if len(missing) == 1 else 'processes'} {names} of {self._count} did not come to: {at}"
        self._end_all({"kind": "missing", "at": at, "why": why})

    def _gone(self, member: _Line, why: str, code: int = Exit.UNUSABLE, wait_s: float = 0.0) -> None:
        known = self._members.get(member.process) is member
        self._drop(member)
        if known:
            name = f"process {member.process} ({member.name})"
            self._end_all({"kind": "gone", "who": name, "why": why, "code": code, "wait_s": wait_s})

    def _end_all(self, message: dict) -> None:
        """Tells everybody, process 0, in which this thread runs, last."""
        self._questions.clear()
        for process in sorted(self._members, reverse=True):
            self._members[process].say(message)

    def _drop(self, member: _Line) -> None:
        if self._members.get(member.process) is member:
            del self._members[member.process]
        with suppress(KeyError, ValueError, OSError):
            self._selector.unregister(member.connection)
            member.connection.close()


class Gang:
    """This process among the `count` of its run; alone, it says everything to itself. A context manager.

    address: of process 0, "host:port"; where that is the loopback, it listens there alone.
    name: of this process, for the others' messages.
    Raises (on entry): UserError (exit code 3) that says who is missing, or why this process is not wanted.
    """

    def __init__(self, process: int, count: int, address: str, *, name: str, limits: Limits):
        self.process, self.count, self.names = process, count, [name]
        self._name, self._limits = name, limits
        self.host, _, port = address.rpartition(":")
        self._port = int(port or 0)
        self._answers: dict[str, Any] = {}
        self._heard = threading.Condition()
        self._asked: dict[str, int] = {}
        self._ending = self._closing = False
        self.at_end: list[Callable[[], None]] = []  # called before this process ends because of another

    def __enter__(self) -> Gang:
        if self.count == 1:
            return self
        self._hub = _Hub(self._listen(), self.count, self._limits) if self.process == 0 else None
        if self._hub:
            self._hub.start()
        self._line = self._connect()
        self._line.say({"kind": "hello", "process": self.process, "count": self.count, "name": self._name})
        threading.Thread(target=self._listen_to_hub, name="gang", daemon=True).start()
        self.names = self._await("start", self._limits.join_s)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.count == 1:
            return
        if error is None:
            self.settle(END)
            self._line.say({"kind": "bye"})
        else:
            if isinstance(error, UserError):
                said, code = str(error.problems[0]), error.exit_code
            else:  # a collective fails when a peer dies: who it was is on its way
                said, code = f"{type(error).__name__}: {error}", Exit.UNUSABLE
                time.sleep(2 * LEAVE_S)
            self._ending = True
            self._line.say({"kind": "left", "why": f"left: {said[:2000]}", "code": code})
        self._leave_last()

    def _leave_last(self) -> None:
        """Process 0 tells the others who is gone, and jax's service, which ends them without a word, goes with it."""
        end_s = time.monotonic() + 3 * LEAVE_S
        while self._hub and self._hub.others and time.monotonic() < end_s:
            time.sleep(0.02)

    def settle(
        self, at: str, value: Any = None, judge: Callable[[list], Any] = lambda values: None, *, limit_s: float = 0.0
    ) -> Any:
        """Waits until every process is `at` this point; what `judge` makes of their values, in process 0.

        Raises: UserError (exit code 3) naming those that did not come within limit_s (0: wait_s).
        """
        limit_s = limit_s or self._limits.wait_s
        if self.count == 1:
            return judge([value])
        self._asked[at] = self._asked.get(at, 0) + 1
        point = at if self._asked[at] == 1 else f"{at}, time {self._asked[at]}"
        if self._hub:
            self._hub.judges[point] = judge
        self._line.say({"kind": "say", "at": point, "value": value, "limit_s": limit_s})
        return self._await(point, limit_s)

    @contextmanager
    def together(self, what: str, *, limit_s: float = 0.0) -> Iterator[None]:
        """All processes do what is inside, or none goes on: the first UserError of one is raised in every one."""
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        said = error and [error.exit_code, *map(astuple, error.problems)]
        judge = lambda all_said: next(((i, s) for i, s in enumerate(all_said) if s), None)  # noqa: E731
        first = self.settle(what, said, judge, limit_s=limit_s)
        if first is not None:
            self._ending = True
            if error is not None:
                raise error
            process, (code, *problems) = first
            who = f"process {process} ({self.names[process]}): "
            raise UserError(*(Problem(who + where, rule, remedy) for where, rule, remedy in problems), exit_code=code)

    def closes(self) -> None:
        """This process has an error of its own, and closes what is open before it leaves: others with the same error may be
        gone before it has committed the last checkpoint."""
        self._closing = True

    def _listen(self) -> socket.socket:
        alone = self.host in LOOPBACK
        both = not alone and socket.has_dualstack_ipv6()
        family, address = socket.AF_INET6 if both else socket.AF_INET, ("127.0.0.1" if alone else "", self._port)
        try:
            return socket.create_server(address, family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            rule, remedy = f"can't listen: {error.strerror}", "choose another port, the same on every host"
            problem = Problem(f"process 0 at {self.host}:{self._port}", rule, remedy)
            raise UserError(problem, exit_code=Exit.UNUSABLE) from error

    def _connect(self) -> _Line:
        end_s, reason = time.monotonic() + self._limits.join_s, "no answer"
        address, limit_s = (self.host.strip("[]"), self._port), min(5.0, self._limits.join_s)
        while time.monotonic() < end_s:
            try:
                return _Line(socket.create_connection(address, limit_s), self._limits.heartbeat_s / BEATS)
            except OSError as error:  # it may not have started yet, nor its name be known
                reason = str(error)
                time.sleep(0.2)
        rule = f"can't be reached in {self._limits.join_s:.0f} s: {reason}"
        remedy = "start process 0 there, give every process the same address, and let the port through"
        raise UserError(Problem(f"process 0 at {self.host}:{self._port}", rule, remedy), exit_code=Exit.UNUSABLE)

    def _await(self, at: str, limit_s: float) -> Any:
        with self._heard:
            self._heard.wait_for(lambda: at in self._answers, timeout=limit_s + self._limits.heartbeat_s)
            answer = self._answers.pop(at, {"kind": "missing", "why": "process 0 gave no answer"})
        if answer["kind"] == "answer":
            return answer["value"]
        self._ending = True
        remedy = f"see its output; {RERUN}"
        if answer["kind"] == "refused":
            remedy = "start each process once, with a number of its own and the same count"
        elif at == "start":
            remedy = "see their output; every process needs the same address and count"
        where = f"process {self.process} of {self.count}, process 0 at {self.host}:{self._port}"
        raise UserError(Problem(where, answer["why"], remedy), exit_code=Exit.UNUSABLE)

    def _listen_to_hub(self) -> None:
        """Hears what process 0 says, and says that this process is alive."""
        said_s, zero = 0.0, "process 0" + (f" ({self.host})" if self.host else "")
        while not self._ending:
            if time.monotonic() - said_s > self._limits.heartbeat_s / BEATS:
                said_s = time.monotonic()
                self._line.say({"kind": "beat"})
            messages = self._line.hear()
            if messages is None:
                if not self._closing:  # jax's service is gone too, and ends who waits for it
                    self._end(zero, CLOSED)
                return
            silent_s = time.monotonic() - self._line.seen_s
            if silent_s > self._limits.heartbeat_s:
                self._end(zero, f"was silent for {silent_s:.0f} s")
            for message in messages:
                if message["kind"] == "gone":
                    self._end(message["who"], message["why"], message["code"], message["wait_s"])
                elif message["kind"] != "beat":
                    # behind these two process 0 closes the connection
                    self._ending = self._ending or message["kind"] == "refused" or message.get("at") == END
                    with self._heard:
                        self._answers[message.get("at", "start")] = message
                        self._heard.notify_all()

    def _end(self, who: str, why: str, code: int = Exit.UNUSABLE, wait_s: float = 0.0) -> None:
        """Ends this process because another is gone, unless within wait_s it is ending by itself, of the same error say.

        Who leaves in order, which is where there is a wait_s, has done its part of all that a process `closes`; one that was
        killed may be waited for in vain.
        """
        time.sleep(wait_s)
        if self._ending or (self._closing and wait_s):
            return
        self._ending = True
        os.write(2, f"error: {who} {why}\n  without it the other processes can't go on\n  {RERUN}\n".encode())
        last = threading.Thread(target=lambda: [call() for call in self.at_end], daemon=True)
        last.start()
        last.join(LEAVE_S)
        with suppress(Exception):
            sys.stdout.flush()
        self._leave_last()
        os._exit(code)


SOLO = Gang(0, 1, "", name="", limits=Limits())  # of a run of one process
