"""A run's step and evaluation as compiled programs, and what they need and send."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxlm.data.loader import Loader
from jaxlm.parallel.describe import bytes_a_device
from jaxlm.parallel.hlo import Collective, collectives
from jaxlm.step import Program, StepMetrics, TrainState, compile_eval, compile_step, put_batch


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
    """Compiles before the first step, so that nothing compiles, or runs out of memory, in the middle of a run."""
    begin, batch = time.monotonic(), put_batch(program, loader.batch(0))
    step = compile_step(program).lower(state, batch).compile()
    evaluate = compile_eval(program).lower(state.params, batch).compile()
    needs = (memory_bytes(step), memory_bytes(evaluate, beside=bytes_a_device(state.opt_state)))
    known = [need for need in needs if need is not None]
    found = collectives(step.as_text(), program.layout.mesh) if program.layout.mesh.size > 1 else []
    return Compiled(step, evaluate, time.monotonic() - begin, max(known, default=None), found)


def memory_bytes(compiled: Any, *, beside: int = 0) -> int | None:
    """Bytes a device holds while `compiled` runs: arguments, results and temporaries, and what lies `beside` them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes + beside
