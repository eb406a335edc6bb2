# Dims: B rows, T positions, M microbatches, P stages, R repeats, J slots.
"""A model cut over the stages of a pipeline: its schedule, its parameters a leaf a slot, and its losses and gradients.

Losses and gradients are local, as `step.py` has them without a pipeline; `to_layers` and `from_layers` are how checkpoints
never learn of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.checkpoint.layout import name_leaves
from jaxlm.config import Config, Problem, UserError
from jaxlm.data.loader import Batch
from jaxlm.models.gpt import init_block
from jaxlm.models.loss import choose_loss, cross_entropy_sums
from jaxlm.models.pieces import Pieces
from jaxlm.parallel import pipeline
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.schedule import Schedule
from jaxlm.parallel.stages import Stages, by_layer, by_slot, cut

AXIS = "pipeline"
SLOT = ("stage", "repeat")


@dataclass(frozen=True)
class Pipeline:
    schedule: Schedule
    stages: Stages
    pieces: Pieces

    def __str__(self) -> str:
        plan, counts = self.schedule, self.stages.counts
        layers = f"{counts[0]}" if self.stages.is_even else ",".join(map(str, counts))
        repeats = f", {plan.repeats} repeats" if plan.repeats > 1 else ""
        stages = f"{plan.stages} stages{repeats} of {layers} layers"
        work = sum(counts) / (len(counts) * max(counts)) * (1 - plan.bubble_frac)
        return f"{plan.name}, {stages}, {plan.microbatches} microbatches: {1 - work:.1%} of a step idle"


def make_pipeline(config: Config, layout: Layout) -> Pipeline | None:
    """The pipeline of `config` on this mesh; None for one stage. Raises UserError as `plan_stages` does."""
    P, model, train = layout.mesh.shape[AXIS], config.model, config.train
    if P == 1:
        return None
    schedule, stages = plan_stages(config, num_stages=P, num_row_shards=layout.num_row_shards)
    loss = partial(
        cross_entropy_sums, layout=layout, vocab_size=model.vocab_size, chunk_tokens=train.loss_chunk_tokens,
        kernel=choose_loss(model, layout).kernel,
    )  # fmt: skip
    return Pipeline(schedule, stages, Pieces(model, layout, stages, loss))


def plan_stages(config: Config, *, num_stages: int, num_row_shards: int) -> tuple[Schedule, Stages]:
    """Who works on what when, and which layers are where: needs no device. Raises UserError with every rule it breaks."""
    P, settings, model, train = num_stages, config.pipeline, config.model, config.train
    M, R = settings.pieces(P), settings.repeats
    counts = settings.stage_layers or cut(model.num_layers, stages=P, repeats=R)
    problems = []

    def need(holds: bool, where: str, text: str, remedy: str) -> None:
        if not holds:
            problems.append(Problem(where, text, remedy))

    rows, shards = train.batch_unit // train.accumulate, num_row_shards
    asked = f"pipeline.microbatches={M}" + ("" if settings.microbatches else " (4 a stage, the default)")
    over = f"train.batch_size / train.accumulate = {rows} rows"
    need(rows % (M * shards) == 0, asked, f"does not split {over}, split over {shards} devices already",
         f"use a train.batch_size that is a multiple of {M * shards * train.accumulate}, or other microbatches")  # fmt: skip
    need(M >= P, asked, f"leaves some of mesh.pipeline={P} stages without work", f"use {P} or more")
    need(
        R == 1 or M % P == 0, asked, f"with repeats they pass in groups of mesh.pipeline={P}", f"use a multiple of {P}"
    )
    layers = f"model.num_layers={model.num_layers}"
    need(model.num_layers >= P * R, f"mesh.pipeline={P} * pipeline.repeats={R}", f"is more than {layers}", "use fewer")
    given = f"pipeline.stage_layers={','.join(map(str, counts))}"
    need(min(counts) >= 0, given, "has a negative count", "use 0 or more")
    need(len(counts) == P * R, given, f"is not one count for each of {P * R} virtual stages", f"give {P * R} counts")
    need(sum(counts) == model.num_layers, given, f"does not add up to {layers}", "change a count")
    stacked = "factors each layer's second moments, which a pipeline keeps stacked by stage"
    need(config.optim.name != "adafactor", "optim.name=adafactor", stacked, "use adamw, lion or muon")
    on_device = "a pipeline keeps what its forwards made on the device"
    need("=offload" not in model.remat, f"model.remat={model.remat}", on_device, "use name=keep")
    if problems:
        raise UserError(*problems)
    return Schedule(settings.schedule, P, M, R, settings.in_place), Stages(P, R, tuple(counts))


def slot_dims(pipe: Pipeline, dims: dict) -> dict:
    """The dims of parameters a leaf a layer, as they are a leaf a slot."""
    one = jax.tree.map(lambda d: (*SLOT, *d), dims["layers"][0], is_leaf=lambda leaf: isinstance(leaf, tuple))
    return dims | {"layers": {j: one for j in range(pipe.stages.num_slots)}}


def slot_shapes(pipe: Pipeline, params: dict) -> dict:
    """Zeros a leaf a slot, for their shapes."""
    P, R = pipe.stages.stages, pipe.stages.repeats
    one = jax.tree.map(lambda leaf: jnp.zeros((P, R, *leaf.shape), leaf.dtype), params["layers"][0])
    return params | {"layers": {j: one for j in range(pipe.stages.num_slots)}}


def init_slot(pipe: Pipeline, key: jax.Array, layers_PR: jax.Array, layout: Layout) -> dict:
    """Parameters of the layers in one slot of every stage and repeat; zeros where there is none (-1)."""

    def block(i: jax.Array) -> dict:
        made = init_block(pipe.pieces.model, key, jnp.maximum(i, 0), layout)
        return jax.tree.map(lambda leaf: jnp.where(i >= 0, leaf, 0), made)

    return jax.vmap(jax.vmap(block))(layers_PR)


def loss_and_grads(
    pipe: Pipeline, params: dict, batch: Batch, keys_M: jax.Array | None, z_loss: float
) -> tuple[jax.Array, dict]:
    """(summed nats, gradients of the summed objective, this device's parts) of the M microbatches of `batch`.

    keys_M: of each microbatch's dropout, or None.
    """
    nats, (dslots, dends) = pipeline.loss_and_grads(
        pipe.schedule, AXIS, _parts(pipe, batch, keys_M, z_loss), *_split(params)
    )
    return nats, dends | {"layers": jax.tree.map(lambda leaf: leaf[None], dslots)}


def loss(pipe: Pipeline, params: dict, batch: Batch) -> jax.Array:
    """Summed nats of `batch`, without gradients or dropout."""
    return pipeline.loss(pipe.schedule, AXIS, _parts(pipe, batch, None, 0.0), *_split(params))


def to_layers(pipe: Pipeline | None, tree: Any) -> Any:
    """A tree of the state as checkpoints keep it: a leaf a layer, {name: leaf}, each on its stage's devices."""
    return tree if pipe is None else by_layer(pipe.stages, name_leaves(tree))


def from_layers(pipe: Pipeline | None, saved: Any, like: Any) -> Any:
    """What `to_layers` gave, as the tree of abstract leaves `like`."""
    if pipe is None:
        return saved
    made = by_slot(pipe.stages, saved, name_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), list(made.values()))


def _parts(pipe: Pipeline, batch: Batch, keys_M: jax.Array | None, z_loss: float) -> pipeline.Parts:
    M = pipe.schedule.microbatches
    micro = jax.tree.map(lambda a: a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1), batch)
    pieces = dataclasses.replace(pipe.pieces, loss=partial(pipe.pieces.loss, z_loss=z_loss))
    return pieces.parts(tuple(micro), keys_M)


def _split(params: dict) -> tuple[Any, dict]:
    """(this stage's slots, each leaf [R, ...]; everything else)."""
    slots = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    return slots, {name: part for name, part in params.items() if name != "layers"}
