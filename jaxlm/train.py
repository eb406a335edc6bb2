"""Trains a model: `python -m jaxlm.train --config configs/X.py[:arg] [--config.a.b=v ...] [--workdir DIR]`.

The same command again resumes from the newest checkpoint, bitwise as if it had never stopped. From `main` the gradient is
four hops away: main -> run -> step.train_step -> mean_loss_and_grads -> value_and_grad.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.compiled import Compiled, build
from jaxlm.config import Exit, Problem, UserError
from jaxlm.data.corpus import Corpus
from jaxlm.data.loader import Loader, Prefetch
from jaxlm.feed import feed
from jaxlm.generate import write_sample
from jaxlm.guards import Closing, StopSignals, Watchdog, explained
from jaxlm.header import describe, header, provenance, write_down
from jaxlm.metrics.ledger import Ledger, read_account
from jaxlm.metrics.progress import Progress
from jaxlm.metrics.throughput import StepMeter, peak_flops_per_s
from jaxlm.metrics.writer import MetricsLog, read_metrics
from jaxlm.models.presets import PRESETS
from jaxlm.opening import Work, as_saved, open_store, open_work, owes_evaluation, own_folder, resume_or_begin, take_lock
from jaxlm.parallel.gang import Gang
from jaxlm.parallel.multihost import Place, agree, find_place, join
from jaxlm.parallel.replicas import step_twice
from jaxlm.parallel.votes import Asked, slow_devices
from jaxlm.report import write_report
from jaxlm.session import evaluate_batches, open_tool_program, restore_params, use_device_settings
from jaxlm.settings import Parser, Resolved, keys_help, load_file, resolve, run_main, split_overrides, warnings_to
from jaxlm.step import Program, StepMetrics, TrainState, without_recent
from jaxlm.tuning import tune


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m jaxlm.train",
        description=__doc__,
        epilog=keys_help() + "\n\nA config file is Python code and is run: use files you trust.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:arg]", help="the settings to start from")
    parser.add_argument("--workdir", type=Path, help="folder of the run (default: runs/<config name>)")
    parser.add_argument("--force-lock", action="store_true", help="take the folder from a run that seems to hold it")
    hosts = parser.add_argument_group("several processes", "where SLURM, Open MPI or the environment does not say it")
    hosts.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0, the same for all")
    hosts.add_argument("--processes", type=int, default=0, metavar="N", help="how many processes train together")
    hosts.add_argument("--process", type=int, default=-1, metavar="I", help="which of them this is, from 0 to N - 1")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    resolved = resolve(load_file(args.config), overrides=overrides, presets=PRESETS, file=args.config)
    workdir = args.workdir or Path("runs") / args.config.removesuffix(".py").replace(".py:", "-").rpartition("/")[2]
    place = find_place(args.coordinator, args.processes, args.process)
    command = ["python", "-m", "jaxlm.train", *argv]
    return run(resolved, workdir, command=command, force_lock=args.force_lock, place=place)


def run(resolved: Resolved, workdir: Path, *, command: Sequence[str], force_lock: bool, place: Place) -> int:
    """Trains to train.num_steps, from the newest checkpoint in `workdir` if there is one. Returns the exit code.

    Of several processes, each at its `place`, process 0 writes all but the checkpoints; what others note goes nowhere.
    """
    config = resolved.config
    use_device_settings(config)
    with Closing() as stack:
        gang = stack.enter_context(join(place, config.hosts))
        folder = stack.enter_context(own_folder(gang, workdir))
        lock = take_lock(gang, stack, RunLock(workdir, force=force_lock))
        earlier = read_account(workdir)
        train, before_s = config.train, earlier.running_s if earlier else 0
        stream = sys.stdout if lock else stack.enter_context((folder / "notes.txt").open("w"))
        progress = stack.enter_context(Progress(num_steps=train.num_steps, stream=stream, before_s=before_s))
        stack.enter_context(warnings_to(progress.note if lock else print))
        watchdog = stack.enter_context(Watchdog(train.watchdog_s, grace_s=train.preempt_grace_s, folder=folder))
        ledger = stack.enter_context(Ledger(folder, on_enter=watchdog.expect, lost=lambda: bool(lock and lock.lost)))
        stack.enter_context(explained(lambda: ledger.where))
        stop = stack.enter_context(StopSignals(progress.note if lock else print))
        work = open_work(gang, resolved, workdir, progress.note)
        with ledger.during("compile"):
            tuned = tune(gang, work.program, workdir, progress.note)
        work = dataclasses.replace(work, program=tuned.program)
        config, program = work.resolved.config, work.program
        store = stack.enter_context(open_store(config, workdir, lock, gang))
        ledger.enter("compile" if store.committed_step is None else "restore")  # what makes a state is compiled first
        state, start = resume_or_begin(program, store, progress.note)
        owed = owes_evaluation(config, workdir, start) and bool(work.held_out)
        agree(gang, {"restored step": start, "evaluation owed": owed})
        if start >= config.train.num_steps and not owed:
            say_done(config.optim.schedule, start, progress.note)
            note_report(folder, progress.note)  # the run may have been killed between its last save and its report
            return 0
        if told := gang.settle("ready to compile", stop.exit_code or 0, max):
            return told
        ledger.enter("compile")
        if gang.count > 1 and program.layout.platform == "gpu" and (slow := slow_devices(gang)):
            progress.note(f"WARNING: {slow}")
        store.warm_up(as_saved(program, state))
        compiled = build(program, state, work.loader, made=tuned.steps, during=partial(ledger.during, "compile"))
        store.wait()
        facts = describe(program, work.corpus, compiled.memory_bytes) | {"command": shlex.join(command)} | tuned.told
        write_down(folder, work.resolved, program, compiled.collectives, facts)
        progress.note(header(program, facts, workdir, compiled.collectives, start=start, compile_s=compiled.seconds))
        board = config.log.tensorboard and lock is not None
        log = stack.enter_context(MetricsLog(folder, tensorboard=board, resume_step=start, warn=progress.note))
        loop = Loop(
            program=program, compiled=compiled, loader=work.loader, held_out=work.held_out, store=store, log=log,
            progress=progress, asked=Asked(lambda: stop.exit_code, gang), meter=make_meter(facts), ledger=ledger,
            made_with=provenance(config, facts),
        )  # fmt: skip
        state, code = train_on(loop, state, start, owed=owed, folder=folder, lock=lock, gang=gang)
        progress.rest()
        ledger.enter("end")
        code = gang.settle("how the run ended", code, lambda codes: codes[0])  # it is process 0 that commits
        finish(work, state, workdir, folder, code, progress.note)
        ledger.flush()
        progress.note(f"time: {read_account(folder)}")
    return code


def say_done(schedule: str, step: int, note: Callable[[str], None]) -> None:
    insist = "" if schedule == "constant" else ", with --config.resume.allow=train.num_steps"
    note(f"already at step {step}: raise train.num_steps to go on{insist}")


def train_on(
    loop: Loop, state: TrainState, start: int, *, owed: bool, folder: Path, lock: RunLock | None, gang: Gang
) -> tuple[TrainState, int]:
    """`loop.run`; where it ends with an error for the user, what is known by then is written down first."""
    try:
        return loop.run(state, start, owed=owed)
    except UserError:
        gang.closes()
        loop.ledger.enter("end")
        if not (lock and lock.lost):  # else the folder is another run's
            loop.log.flush()
            loop.ledger.flush()
            note_report(folder, loop.progress.note)
        raise


@dataclass
class Loop:
    """The steps of a run, and what happens between them."""

    program: Program
    compiled: Compiled
    loader: Loader
    held_out: dict[str, Loader]
    store: CheckpointStore
    log: MetricsLog
    progress: Progress
    asked: Asked
    meter: StepMeter
    ledger: Ledger
    made_with: dict[str, Any] = field(default_factory=dict)  # kept beside every checkpoint
    _evaluated: tuple[int, Mapping[str, float]] = field(default=(0, {}), init=False)
    _pending: tuple[int, StepMetrics] | None = field(default=None, init=False)

    def run(self, state: TrainState, start: int, *, owed: bool = False) -> tuple[TrainState, int]:
        """Steps start+1 .. train.num_steps. Returns the last state and the exit code.

        owed: the evaluation of step `start` is still to be made. A run that is told to leave saves and leaves: an evaluation
        may take longer than whoever told it will wait, so it is the next start that makes it.

        The metrics of a step are read after the next step is dispatched, so the device never waits for the host. When
        a step is due for more, the order is: its metrics, evaluation, save. A checkpoint of step k then implies that
        every record up to k is on disk, and a run that is killed between any two of these resumes without a gap.
        """
        train = self.program.config.train
        save_every, depth = self.program.config.checkpoint.every_steps, self.program.config.data.prefetch
        done = start
        self.ledger.resume(start)
        batches = Prefetch(partial(feed, self.program, self.loader), start=start, stop=train.num_steps, depth=depth)
        with batches, jax.transfer_guard("disallow"):
            if owed:
                self._evaluate(start, state)
            self.meter.start(time_s=time.monotonic())
            last = done == train.num_steps or self.asked() is not None
            while not last:  # what was asked once the loop has looked is met by the next step, with its save
                batch = self._next(batches, done, state)
                state, metrics = self._step(done + 1, state, batch)
                done += 1
                self._read_pending()
                self._pending = (done, metrics)
                evaluates = train.evaluates_after(done) and self.asked() is None
                if evaluates:
                    self._read_pending()
                    self._evaluate(done, state)
                last = done == train.num_steps or self.asked() is not None
                saves = last or (save_every > 0 and done % save_every == 0)
                if saves:
                    self._read_pending()
                    self._save(done, state)
                if evaluates or saves:
                    self.ledger.enter("step", step=done)
                    self.meter.start(time_s=time.monotonic())
                    self.asked.starts()
                self._announce_commits()
            self.ledger.enter("save", step=done)
        self.store.wait()
        asked = self.asked() or 0  # a vote needs the devices of all processes, whatever each has saved
        self._announce_commits()
        return state, asked if done == 0 or self.store.committed_step == done else Exit.UNUSABLE

    def _next(self, batches: Prefetch, done: int, state: TrainState) -> Any:
        """The next batch. If its rows are bad, what was trained until here is kept before the error goes on."""
        self.ledger.enter("data wait", step=done)
        try:
            batch, wait_s = next(batches)
            self.meter.wait(wait_s)
            self.ledger.enter("step")
            return batch
        except UserError:
            self._read_pending()
            if done > (self.store.committed_step or 0) and jax.process_count() == 1:  # the others may have good rows
                self._save(done, state)
                self.store.wait()
                self._announce_commits()
            raise

    def _step(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        self.asked.dispatches()
        every = self.program.config.train.sdc_check_every
        if every and step % every == 0:
            return step_twice(self.compiled.step, state, batch, number=step)
        return self.compiled.step(state, batch)

    def _read_pending(self) -> None:
        """Reads the step before the one in flight, logs it, and ends the run if too many in a row were not finite."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        config = self.program.config
        tokens = self.loader.tokens_before(step)
        self.meter.step(time_s=time.monotonic(), tokens=tokens - self.loader.tokens_before(step - 1))
        skipped, streak = int(values.pop("skipped")), int(values.pop("streak"))
        if step % config.log.every_steps == 0 or step in (1, config.train.num_steps) or streak:
            record = {"step": step} | values | {"tokens": tokens}
            record |= self.meter.take() | ({"skipped": skipped} if skipped else {})
            slowest, text = self.asked.slowest()
            record |= slowest
            if text:
                self.progress.note(text)
            record |= {"first_sample": self.loader.ramp.before(step - 1)} if streak else {}
            self._write(record)
            self.progress.update(record)
        if streak:
            shown = f"loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g}"
            why = "a spike" if math.isfinite(values["loss"] + values["grad_norm"]) else "not finite"
            self.progress.note(f"step {step}: {why}: {shown}; update dropped ({streak} in a row)")
            self.progress.note(f"  it read {self.loader.places(step - 1)}")
        if streak >= config.train.max_nonfinite_steps:
            where = f"step {step}: train.max_nonfinite_steps={config.train.max_nonfinite_steps} reached"
            rule = f"{streak} updates in a row were dropped; the last good update was step {step - streak}"
            remedy = f"lower optim.peak_lr or look at the rows of these steps; saved: {self.store.committed_step}"
            raise UserError(Problem(where, rule, remedy), exit_code=Exit.DIVERGED)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """The loss on every set, each by its name, and eval_loss over the tokens of all."""
        seen = partial(self.ledger.enter, "evaluate", step=step)  # which the watchdog hears
        seen()
        found = {}
        for name, held_out in self.held_out.items():
            whole = held_out.num_batches or 0
            count = min(whole, self.program.config.train.eval_batches or whole)
            unasked = itertools.takewhile(lambda _: self.asked() is None, range(count))
            rows = (feed(self.program, held_out, i) for i in unasked)
            found[name] = evaluate_batches(self.compiled.evaluate, state.params, rows, seen=seen)
            if self.asked() is not None:
                return
            of = f" of {name}" if name else ""
            self.progress.note(f"step {step}: {found[name]}{of}")
        if found:
            tokens = max(sum(result.tokens for result in found.values()), 1)
            mean = sum(result.loss * (result.tokens / tokens) for result in found.values())
            losses = {"eval_loss": mean} | {f"eval_loss_{name}": result.loss for name, result in found.items() if name}
            self._evaluated = (step, losses)
            self._write({"step": step} | losses)

    def _write(self, record: dict) -> None:
        """A line of metrics.jsonl, while the folder is this run's."""
        self.store.check()
        self.log.write(record)

    def _save(self, step: int, state: TrainState) -> None:
        self.ledger.enter("save", step=step)
        self.log.settle()
        if not jax.device_get(self.compiled.all_finite(state.params)):
            rule = "an update made parameters infinite or not a number: the state is not saved"
            remedy = f"lower optim.peak_lr; the newest checkpoint is {self.store.committed_step}"
            raise UserError(Problem(f"step {step}", rule, remedy), exit_code=Exit.DIVERGED)
        evaluated, losses = self._evaluated
        facts = {"tokens": self.loader.tokens_before(step), "metrics": losses if evaluated == step else {}}
        self.store.save(step, as_saved(self.program, state), metadata=self.made_with | facts | without_recent(state)[1])

    def _announce_commits(self) -> None:
        for save in self.store.poll():
            if save.error is None:
                waited = f"the run waited {save.blocked_s:.2f} s"
                self.progress.note(f"step {save.step}: checkpoint committed in {save.duration_s:.2f} s, {waited}")
            else:
                times = f" ({save.failures} in a row)" if save.failures > 1 else ""
                self.progress.note(f"step {save.step}: ERROR, checkpoint not saved{times}: {save.error}")
                self.store.check()


def make_meter(facts: dict) -> StepMeter:
    return StepMeter(
        flops_per_token=facts["flops_per_token"],
        peak_flops_per_s=peak_flops_per_s(facts["device_kind"]),
        num_devices=facts["devices"],
    )


def finish(work: Work, state: TrainState, workdir: Path, folder: Path, code: int, note: Callable) -> None:
    """A sample of the model's writing, the report, and where they are; a stopped run is told how to go on."""
    sample = None
    if code == Exit.UNUSABLE:
        note("the last save failed: the same command goes on from the checkpoint before it")
    elif code:
        note("stopped; the same command goes on from here")
    elif work.program.config.log.sample_tokens:
        try:
            sample = sample_of(work.program, state, work.corpus, workdir)
            note(f"--- the model's writing ---\n{sample}\n---")
        except UserError as e:  # the run is done and saved, whatever this says
            note(f"no sample: {e.problems[0]}")
    if code != Exit.PREEMPTED:  # who sent SIGTERM counts seconds; `python -m jaxlm.report` makes it at any time
        note_report(folder, note, sample=sample)


def sample_of(program: Program, state: TrainState, corpus: Corpus, workdir: Path) -> str:
    """What the model writes after log.sample_prompt."""
    log, params = program.config.log, state.params
    if program.pipe is not None:  # the model as it is written needs its layers side by side
        program = open_tool_program(program.config, plain=True)
        params = restore_params(program, workdir, None).state
    return write_sample(
        program, params, corpus.tokenizer, log.sample_prompt, max_new_tokens=log.sample_tokens,
        temperature=0.8, top_k=50, seed=program.config.train.seed,
    )  # fmt: skip


def note_report(workdir: Path, note: Callable[[str], None], *, sample: str | None = None) -> None:
    """Writes the report and says where it is; nothing before the first logged step. Never ends the run."""
    try:
        if read_metrics(workdir):
            note(f"report: {write_report(workdir, sample=sample)}")
    except UserError as e:
        note(f"no report: {e.problems[0]}")


if __name__ == "__main__":
    run_main(main)
