"""A run's step and evaluation as compiled programs, and what they need and send."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.data.loader import Loader
from jaxlm.feed import abstract_batch
from jaxlm.parallel.describe import bytes_a_device
from jaxlm.parallel.hlo import Collective, collectives
from jaxlm.parallel.replicas import rehearse
from jaxlm.step import Program, StepMetrics, TrainState, compile_eval, compile_step


@dataclass(frozen=True)
class Compiled:
    """The step, the evaluation and whether parameters are finite as programs, the seconds they took, the bytes a device needs
    for the larger of the first two (None where XLA does not say), and the collectives of a step."""

    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Any, Any], Any]
    all_finite: Callable[[Any], Any]
    seconds: float
    memory_bytes: int | None
    collectives: list[Collective]


def build(
    program: Program,
    state: TrainState,
    loader: Loader,
    *,
    made: Mapping[tuple[int, int], Any] | None = None,
    during: Callable[[], AbstractContextManager] = nullcontext,
) -> Compiled:
    """Compiles before the first step what the first and the last one, evaluations, saves and checks need: a run whose batches
    keep their shape compiles nothing in its middle, and none runs out of memory there.

    made: steps that are compiled already, by the shape of their batch.   during: entered where one compiles in its middle.
    """
    begin, train, jitted = time.monotonic(), program.config.train, compile_step(program)
    first, last = (loader.shape(step) for step in (0, train.num_steps - 1))
    steps = dict(made or {})
    for shape in {first, last} - steps.keys():
        steps[shape] = jitted.lower(state, abstract_batch(program, shape)).compile()
    whole = abstract_batch(program, (train.batch_size, train.seq_len))
    evaluate = compile_eval(program).lower(state.params, whole).compile()
    finite = jax.jit(all_finite).lower(state.params).compile()
    if train.sdc_check_every:
        rehearse(state)
    step = steps[last]
    needs = (memory_bytes(step), memory_bytes(evaluate, beside=bytes_a_device(state.opt_state)))
    known = [need for need in needs if need is not None]
    found = collectives(step.as_text(), program.layout.mesh) if program.layout.mesh.size > 1 else []

    def by_shape(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        """A step; where batches grow or their rows lengthen, the first of a shape compiles it."""
        shape = batch.tokens.shape
        if shape not in steps:
            with during():
                steps[shape] = jitted.lower(state, batch).compile()
        return steps[shape](state, batch)

    return Compiled(by_shape, evaluate, finite, time.monotonic() - begin, max(known, default=None), found)


def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def memory_bytes(compiled: Any, *, beside: int = 0) -> int | None:
    """Bytes a device holds while `compiled` runs: arguments, results and temporaries, and what lies `beside` them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes + beside
