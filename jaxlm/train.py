"""Trains a model: `python -m jaxlm.train --config configs/X.py[:arg] [--config.a.b=v ...] [--workdir DIR]`.

The same command again resumes from the newest checkpoint, bitwise as if it had never stopped. From `main` the gradient is
four hops away: main -> run -> step.train_step -> mean_loss_and_grads -> value_and_grad.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Config, Problem, UserError
from jaxlm.data.corpus import Corpus, evaluation_loader, open_corpus, training_loader
from jaxlm.data.loader import Loader, Prefetch, prefetch
from jaxlm.generate import write_sample
from jaxlm.header import LAYOUT_FILE, describe, header, layout_text
from jaxlm.metrics.chips import peak_flops_per_s
from jaxlm.metrics.meter import StepMeter
from jaxlm.metrics.progress import Progress
from jaxlm.metrics.writer import MetricsLog, read_metrics, write_atomically
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.describe import bytes_a_device
from jaxlm.parallel.hlo import Collective, collectives
from jaxlm.pipelined import from_layers, to_layers
from jaxlm.report import write_report
from jaxlm.session import (
    compare_data,
    compare_with_last_start,
    evaluate_batches,
    lock_run,
    open_mesh,
    open_program,
    open_tool_program,
    preflight,
    restore_params,
    with_vocabulary,
)
from jaxlm.settings import Parser, Resolved, keys_help, load_file, resolve, run_main, split_overrides, to_json
from jaxlm.step import (
    Program,
    StepMetrics,
    TrainState,
    abstract_state,
    compile_eval,
    compile_step,
    init_state,
    put_batch,
)

EXIT_NOT_SAVED, EXIT_DIVERGED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 3, 4, 75, 130


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m jaxlm.train",
        description=__doc__,
        epilog=keys_help() + "\n\nA config file is Python code and is run: use files you trust.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:arg]", help="the settings to start from")
    parser.add_argument("--workdir", type=Path, help="folder of the run (default: runs/<config name>)")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    resolved = resolve(load_file(args.config), overrides=overrides, presets=PRESETS, file=args.config)
    workdir = args.workdir or Path("runs") / args.config.removesuffix(".py").replace(".py:", "-").rpartition("/")[2]
    return run(resolved, workdir, command=["python", "-m", "jaxlm.train", *argv])


def run(resolved: Resolved, workdir: Path, *, command: Sequence[str]) -> int:
    """Trains to train.num_steps, from the newest checkpoint in `workdir` if there is one. Returns the exit code."""
    config = resolved.config
    preflight(workdir)
    use_device_settings(config)
    with ExitStack() as stack:
        stack.enter_context(lock_run(workdir))
        progress = stack.enter_context(Progress(num_steps=config.train.num_steps, stream=sys.stdout))
        compare_with_last_start(config, workdir, progress.note)
        open_mesh(config)
        corpus = open_corpus(config, workdir, progress.note)
        compare_data(corpus, workdir)
        config = with_vocabulary(config, corpus.tokenizer)
        if config != resolved.config:
            resolved = Resolved(config, resolved.origin | {"model.vocab_size": "derived"})
        if config.model.vocab_size > corpus.tokenizer.vocab_size:
            unseen = f"{config.data.tokenizer} has {corpus.tokenizer.vocab_size}: the others are never seen"
            progress.note(f"model.vocab_size={config.model.vocab_size}, but data.tokenizer={unseen}")
        program = open_program(config)
        loader = training_loader(config, corpus)
        held_out = open_held_out(config, corpus, progress.note)
        store = stack.enter_context(CheckpointStore(workdir / "checkpoints", keep=config.checkpoint.keep))
        like = abstract_state(program)
        restored = store.restore_latest(to_layers(program.pipe, like))
        if restored and restored.step >= config.train.num_steps:
            progress.note(f"already at step {restored.step}: raise train.num_steps to go on")
            note_report(workdir, progress.note)  # the run may have been killed between its last save and its report
            return 0
        state = from_layers(program.pipe, restored.state, like) if restored else init_state(program)
        start = restored.step if restored else 0
        compiled = build(program, state, loader)
        facts = describe(program, corpus, compiled.memory_bytes) | {
            "command": shlex.join(command),
            "data": corpus.fingerprints,
        }
        write_atomically(workdir / "config.json", to_json(resolved, facts).encode())
        write_atomically(workdir / LAYOUT_FILE, layout_text(program, compiled.collectives).encode())
        progress.note(header(program, facts, workdir, compiled.collectives, start=start, compile_s=compiled.seconds))
        log = stack.enter_context(
            MetricsLog(workdir, tensorboard=config.log.tensorboard, resume_step=start, warn=progress.note)
        )
        stop = stack.enter_context(StopSignals(progress.note))
        loop = Loop(
            program=program, compiled=compiled, loader=loader, held_out=held_out, store=store, log=log,
            progress=progress, stop=stop, meter=make_meter(facts),
        )  # fmt: skip
        try:
            state, code = loop.run(state, start)
        except UserError:
            log.flush()
            note_report(workdir, progress.note)
            raise
        finish(program, state, corpus, workdir, code, progress.note)
    return code


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
    stop: StopSignals
    meter: StepMeter
    _pending: tuple[int, StepMetrics, float] | None = field(default=None, init=False)

    def run(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Steps start+1 .. train.num_steps. Returns the last state and the exit code.

        The metrics of a step are read after the next step is dispatched, so the device never waits for the host. When
        a step is due for more, the order is: its metrics, evaluation, save. A checkpoint of step k then implies that
        every record up to k is on disk, and a run that is killed between any two of these resumes without a gap.
        """
        train = self.program.config.train
        save_every, depth = self.program.config.checkpoint.every_steps, self.program.config.data.prefetch
        done = start
        with (
            prefetch(self._batch, start=start, stop=train.num_steps, depth=depth) as batches,
            jax.transfer_guard("disallow"),
        ):
            self.meter.start(time_s=time.monotonic())
            while done < train.num_steps and self.stop.exit_code is None:
                batch, wait_s = self._next(batches, done, state)
                state, metrics = self.compiled.step(state, batch)
                done += 1
                self._read_pending()
                self._pending = (done, metrics, wait_s)
                last = done == train.num_steps or self.stop.exit_code is not None
                evaluates = done == train.num_steps or (train.eval_every > 0 and done % train.eval_every == 0)
                saves = last or (save_every > 0 and done % save_every == 0)
                if evaluates or saves:
                    self._read_pending()
                    if evaluates:
                        self._evaluate(done, state)
                    if saves:
                        self._save(done, state)
                    self.meter.start(time_s=time.monotonic())
                self._announce_commits()
        self.store.wait()
        self._announce_commits()
        saved = done == 0 or self.store.committed_step == done
        return state, (self.stop.exit_code or 0) if saved else EXIT_NOT_SAVED

    def _next(self, batches: Prefetch, done: int, state: TrainState) -> tuple[Any, float]:
        """The next batch. If its rows are bad, what was trained until here is kept before the error goes on."""
        try:
            return next(batches)
        except UserError:
            self._read_pending()
            if done > (self.store.committed_step or 0):
                self._save(done, state)
                self.store.wait()
                self._announce_commits()
            raise

    def _batch(self, index: int) -> Any:
        return put_batch(self.program, self.loader.batch(index))

    def _read_pending(self) -> None:
        """Reads the step before the one in flight, logs it, and ends the run if too many in a row were not finite."""
        if self._pending is None:
            return
        (step, metrics, wait_s), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        config = self.program.config
        tokens = self.loader.tokens_before(step)
        of_step = tokens - self.loader.tokens_before(step - 1)
        self.meter.step(time_s=time.monotonic(), data_wait_s=wait_s, tokens=of_step)
        skipped, streak = int(values.pop("skipped")), int(values.pop("streak"))
        if step % config.log.every_steps == 0 or step in (1, config.train.num_steps) or streak:
            record = {"step": step} | values | {"tokens": tokens}
            record |= self.meter.take() | ({"skipped": skipped} if skipped else {})
            self.log.write(record)
            self.progress.update(record)
        if streak:
            self.progress.note(f"step {step}: loss or gradient not finite, update dropped ({streak} in a row)")
        if streak >= config.train.max_nonfinite_steps:
            raise UserError(
                Problem(
                    f"step {step}: train.max_nonfinite_steps={config.train.max_nonfinite_steps} reached",
                    f"loss or gradient was not finite {streak} steps in a row; the last good update was step {step - streak}",
                    f"lower optim.peak_lr or look at the rows of these steps; saved: {self.store.committed_step}",
                ),
                exit_code=EXIT_DIVERGED,
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        """The loss on every set, each by its name, and eval_loss over the tokens of all."""
        found = {}
        for name, held_out in self.held_out.items():
            whole = held_out.num_batches or 0
            count = min(whole, self.program.config.train.eval_batches or whole)
            rows = (put_batch(self.program, held_out.batch(i)) for i in range(count))
            found[name] = evaluate_batches(self.compiled.evaluate, state.params, rows)
            of = f" of {name}" if name else ""
            self.progress.note(f"step {step}: eval loss {found[name].loss!r} on {found[name].tokens:,} tokens{of}")
        if found:
            tokens = max(sum(result.tokens for result in found.values()), 1)
            mean = sum(result.loss * (result.tokens / tokens) for result in found.values())
            self.log.write(
                {"step": step, "eval_loss": mean} | {f"eval_loss_{n}": r.loss for n, r in found.items() if n}
            )

    def _save(self, step: int, state: TrainState) -> None:
        self.log.flush()
        self.store.save(step, to_layers(self.program.pipe, state), metadata={"jax": jax.__version__})

    def _announce_commits(self) -> None:
        for save in self.store.poll():
            if save.error is None:
                self.progress.note(f"step {save.step}: checkpoint committed in {save.duration_s:.2f} s")
            else:
                self.progress.note(f"step {save.step}: ERROR, checkpoint not saved: {save.error}")


class StopSignals:
    """SIGTERM and Ctrl-C ask the loop to save and leave, with 75 and 130; a second Ctrl-C leaves at once."""

    def __init__(self, note: Callable[[str], None]):
        self.exit_code: int | None = None
        self._note = note

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.exit_code is not None:
            os._exit(EXIT_INTERRUPTED)
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED
        self._note(f"{signal.Signals(number).name}: saving after this step (Ctrl-C: leave at once)")


def use_device_settings(config: Config) -> None:
    """What must be set before jax takes hold of a device: memory share, compilation cache."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    if config.train.compilation_cache:
        folder = Path(config.train.compilation_cache).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            problem = Problem(f"train.compilation_cache={folder}", f"can't be made: {e}", "choose a folder of yours")
            raise UserError(problem) from e
        jax.config.update("jax_compilation_cache_dir", str(folder))


@dataclass(frozen=True)
class Compiled:
    """The step and the evaluation as programs, the seconds they took, the bytes a device needs for the larger of them
    (None where XLA does not say), and the collectives of a step."""

    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Any, Any], Any]
    seconds: float
    memory_bytes: int | None
    collectives: list[Collective]


def build(program: Program, state: TrainState, loader: Loader) -> Compiled:
    """Compiles before the first step what the first and the last one need, and the evaluation: a run whose batches keep
    their shape compiles nothing in its middle, and none runs out of memory there."""
    begin, train, jitted = time.monotonic(), program.config.train, compile_step(program)
    first, last = (put_batch(program, loader.batch(step)) for step in (0, train.num_steps - 1))
    shapes = {batch.tokens.shape: batch for batch in (first, last)}
    steps = {shape: jitted.lower(state, batch).compile() for shape, batch in shapes.items()}
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((train.batch_size, train.seq_len), x.dtype), last)
    evaluate = compile_eval(program).lower(state.params, whole).compile()
    step = steps[last.tokens.shape]
    needs = (memory_bytes(step), memory_bytes(evaluate, beside=bytes_a_device(state.opt_state)))
    known = [need for need in needs if need is not None]
    found = collectives(step.as_text(), program.layout.mesh) if program.layout.mesh.size > 1 else []

    def by_shape(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        """A step; where batches grow or their rows lengthen, the first of a shape compiles it."""
        shape = batch.tokens.shape
        if shape not in steps:
            steps[shape] = jitted.lower(state, batch).compile()
        return steps[shape](state, batch)

    return Compiled(by_shape, evaluate, time.monotonic() - begin, max(known, default=None), found)


def memory_bytes(compiled: Any, *, beside: int = 0) -> int | None:
    """Bytes a device holds while `compiled` runs: arguments, results and temporaries, and what lies `beside` them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes + beside


def open_held_out(config: Config, corpus: Corpus, note: Callable[[str], None]) -> dict[str, Loader]:
    """A loader for each set to evaluate on, by name; for none, a note. UserError if evaluations are asked for then."""
    if corpus.evaluation:
        sets = corpus.evaluation.items()
        return {name: evaluation_loader(config, parts, corpus.tokenizer) for name, parts in sets}
    if config.train.eval_every:
        where, rule = f"train.eval_every={config.train.eval_every}", "no row of train.seq_len + 1 tokens is held out"
        raise UserError(Problem(where, rule, "raise data.split's second share, name data.eval, or set it to 0"))
    note("no evaluation: data.split and data.eval hold no row out")
    return {}


def make_meter(facts: dict) -> StepMeter:
    return StepMeter(
        flops_per_token=facts["flops_per_token"],
        peak_flops_per_s=peak_flops_per_s(facts["device_kind"]),
        num_devices=facts["devices"],
    )


def finish(program: Program, state: TrainState, corpus: Corpus, workdir: Path, code: int, note: Callable) -> None:
    """A sample of the model's writing, the report, and where they are; a stopped run is told how to go on."""
    sample, log = None, program.config.log
    if code == EXIT_NOT_SAVED:
        note("the last save failed: the same command goes on from the checkpoint before it")
    elif code:
        note("stopped; the same command goes on from here")
    elif log.sample_tokens:
        try:
            sample = sample_of(program, state, corpus, workdir)
            note(f"--- the model's writing ---\n{sample}\n---")
        except UserError as e:  # the run is done and saved, whatever this says
            note(f"no sample: {e.problems[0]}")
    note_report(workdir, note, sample=sample)


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
    """Writes the report and says where it is; nothing before the first logged step."""
    if read_metrics(workdir):
        note(f"report: {write_report(workdir, sample=sample)}")


if __name__ == "__main__":
    run_main(main)
