"""One run a workdir, on any number of hosts that share its file system.

The holder has the file `lock.N` with the largest N; it names host and process, and a thread renews its time. Taking over
means creating `lock.N+1`, which the file system lets one process do. Numbers only grow, so nobody removes another's claim by
mistake: a holder that lost its own sees a larger number or, where somebody removed the file, another's name in it. The clock
is the file system's, never that of two hosts compared.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxlm.config import Exit, Problem, UserError

log = logging.getLogger("jaxlm.checkpoint")

HEARTBEAT_S = 20.0
STALE_S = 300.0  # a holder on another host that was silent for longer is gone
LOOK_S = 1.0  # how often one looks whether it is
NAME = re.compile(r"lock\.(\d+)")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. machine: the running kernel, where one can ask whether the process still lives."""

    host: str
    pid: int
    machine: str
    since: str
    released: bool = False

    @staticmethod
    def this_process() -> Holder:
        machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else platform.node()
        return Holder(platform.node(), os.getpid(), machine, time.strftime("%Y-%m-%d %H:%M:%S"))


class RunLock:
    """Holds `workdir` from entry to exit, or until the process ends however it ends.

    Of a holder on another host only time tells whether it lives: entry waits until its heartbeat moves, and refuses, or until
    it is too old, and takes over.

    force: take it from whoever has it; a run that is still alive there will write nothing more.
    Raises (on entry): UserError (exit code 3) naming host, process and heartbeat if another run holds it.
    """

    def __init__(self, workdir: Path, *, force: bool = False):
        self.workdir, self._force = Path(workdir), force
        self._number = 0  # 0: never held
        self._beats: dict[int, float] = {}  # of other runs' locks, when first seen
        self._ended = threading.Event()
        self._gone = False
        self._looks = threading.Lock()

    def __enter__(self) -> RunLock:
        self._take()
        self._force = False
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError), self._file:  # if it can't be written: on this machine the kernel tells that we are gone
            if not self.lost:
                self._file.seek(0)
                json.dump(asdict(self._holder) | {"released": True}, self._file)
                self._file.truncate()

    @property
    def lost(self) -> bool:
        """Whether another run has taken over. A lock file that somebody removed is made again, if no other run was faster."""
        with self._looks:
            try:
                newest = self._newest()
                if not (newest or self._gone):
                    log.warning("%s: lock.%d was removed, and is made again", self.workdir, self._number)
                    self._file.close()
                    self._take()
                elif newest != self._number or _read(self._path(newest)) not in (self._holder, None):
                    self._gone = True
            except UserError:
                self._gone = True
            except OSError as error:  # a commit meets the same disk
                log.warning("whether %s is still held is not known: %s", self.workdir, error)
            return self._gone

    def check(self) -> None:
        """Raises UserError (exit code 3) if another run has taken over."""
        if self.lost:
            holder = _read(self._path(self._newest()))
            by = f"by {holder.host}, pid {holder.pid}, since {holder.since}" if holder else "by another run"
            rule = f"was taken over {by}: this run writes nothing more"
            raise UserError(Problem(f"--workdir={self.workdir}", rule, "stop one of the two"), exit_code=Exit.UNUSABLE)

    def _take(self) -> None:
        own = self.workdir / f".lock-{uuid.uuid4().hex}"
        self._holder = Holder.this_process()
        with open(own, "w") as out:
            json.dump(asdict(self._holder), out)
        self._file = open(own, "r+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError:
            log.info("%s has no file locks: a dead run is told by its heartbeat alone", self.workdir)
        try:
            while not self._claim(own):
                pass
        except UserError:
            self._file.close()
            raise
        except OSError as error:
            self._file.close()
            remedy = "choose a folder of yours, on a file system that has hard links"
            raise UserError(Problem(f"--workdir={self.workdir}", f"can't be locked: {error}", remedy)) from error
        finally:
            own.unlink()
        for number in self._numbers():
            if number < self._number:
                self._path(number).unlink(missing_ok=True)

    def _claim(self, own: Path) -> bool:
        """Makes `own` the next lock file. False if somebody was faster: look again."""
        newest = self._newest()
        if newest and not self._force and not self._is_free(newest, own):
            time.sleep(LOOK_S)
            return False
        try:
            os.link(own, self._path(newest + 1))
        except FileExistsError:
            return False
        if self._newest() != newest + 1:  # we looked long ago: others came, went on and tidied up meanwhile
            self._path(newest + 1).unlink(missing_ok=True)
            return False
        self._number = newest + 1
        return True

    def _is_free(self, number: int, own: Path) -> bool:
        """Whether lock.`number` was given back or its holder is gone; False: can't be known yet.

        Raises: UserError (exit code 3) if it is held.
        """
        path = self._path(number)
        holder = _read(path)
        try:
            os.utime(own)
            beat_s = path.stat().st_mtime
            silent_s = max(own.stat().st_mtime - beat_s, 0.0)
        except FileNotFoundError:
            return True  # tidied up by the holder of a larger number: the next look finds that one
        if holder is not None and holder.released:
            return True
        alive = _alive(path) if holder is not None and holder.machine == self._holder.machine else None
        who = f"{holder.host}, pid {holder.pid}" if holder else f"a run unknown to {path.name}"
        if alive is None and silent_s > STALE_S:
            alive = False
        if alive is None and not self._number:
            if number not in self._beats:
                wait = f"waiting for its next, {STALE_S - silent_s:.0f} s at most"
                log.warning("%s: held by %s, last heartbeat %.0f s ago: %s", self.workdir, who, silent_s, wait)
            if self._beats.setdefault(number, beat_s) == beat_s:
                return False
        if alive is False:
            log.warning("%s: taken over from %s, gone; last heartbeat %.0f s ago", self.workdir, who, silent_s)
            return True
        since = f" since {holder.since}" if holder else ""
        rule = f"another process is training here{since}: {who}, last heartbeat {silent_s:.0f} s ago"
        remedy = "wait for it, stop it, or give this run another --workdir; --force-lock insists"
        raise UserError(Problem(f"--workdir={self.workdir}", rule, remedy), exit_code=Exit.UNUSABLE)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if not self.lost:
                try:
                    os.utime(self._path(self._number))
                except OSError as error:
                    log.warning("the heartbeat of %s failed: %s", self._path(self._number), error)

    def _numbers(self) -> list[int]:
        return [int(m[1]) for entry in os.listdir(self.workdir) if (m := NAME.fullmatch(entry))]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _path(self, number: int) -> Path:
        return self.workdir / f"lock.{number}"


def _read(path: Path) -> Holder | None:
    """None where it is gone or no holder's."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _alive(path: Path) -> bool | None:
    """Whether a process of this machine holds `path` locked: the kernel drops the lock with its process. None: can't say."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask don't hold up one another
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
