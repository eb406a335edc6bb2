# Dims: B batch, T position, M microbatches.
"""One update of the model: model x loss x optimizer x mesh.

`Program` holds what does not change in a run; `TrainState` what does. `train_step` is the definition of an update and
`compile_step` pins its layouts. Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict

from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.models.gpt import GPT, init_block
from jaxlm.models.kernels import Choice, choose_attention
from jaxlm.models.loss import choose_loss, cross_entropy_sums
from jaxlm.models.mlp import choose_activation
from jaxlm.models.norm import choose_norm
from jaxlm.optim.optimizer import make_optimizer
from jaxlm.optim.schedule import make_schedule
from jaxlm.parallel.check import Declared, check_layout
from jaxlm.parallel.context import choose_context
from jaxlm.parallel.gradients import finish_gradients, global_norm, lay_gradient
from jaxlm.parallel.rules import At, Dims, Layout, by_dims
from jaxlm.parallel.working import gradients, has_copy, working_copies
from jaxlm.parallel.xla import Options, compiler_options
from jaxlm.pipelined import Pipeline, init_slot, loss, loss_and_grads, make_pipeline, slot_dims, slot_shapes

BATCH_DIMS = ("batch", "seq")
WINDOW = 128  # steps whose losses and gradient norms say what is usual


@partial(jax.tree_util.register_dataclass, data_fields=["values", "count"], meta_fields=[])
@dataclass(frozen=True)
class Recent:
    """The last WINDOW updates that were made. values: f32[2, WINDOW], losses and gradient norms, in a ring; count: i32[]."""

    values: Any
    count: Any

    def is_usual(self, now: jax.Array, sigmas: float) -> jax.Array:
        """bool[]: neither value of now f32[2] is more than `sigmas` deviations above the mean; so too before WINDOW updates."""
        mean, deviation = self.values.mean(1), self.values.std(1)
        return (now <= mean + sigmas * deviation).all() | (self.count < WINDOW)

    def add(self, now: jax.Array) -> Recent:
        return Recent(self.values.at[:, self.count % WINDOW].set(now), self.count + 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "skipped", "streak", "recent"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step and a checkpoint keeps.

    step: i32[], batches seen.   params: float32 leaves.   opt_state: optax's.
    skipped: i32[], steps whose update was dropped, their loss or gradient being not finite or a spike; streak: how many of
    them in a row.   recent: what is no spike, None without train.skip_spikes; a checkpoint has it in its metadata, so that
    the setting may change.
    """

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    streak: Any
    recent: Recent | None = None


class StepMetrics(NamedTuple):
    """f32[] each: mean nats a counted token, global gradient norm before clipping, learning rate applied, tokens that
    counted, and the skip counters after the step."""

    loss: Any
    grad_norm: Any
    lr: Any
    counted_tokens: Any
    skipped: Any
    streak: Any


@dataclass(frozen=True)
class Program:
    """What stays fixed in a run: the model's graph, the optimizer, the mesh layout and the settings of a step."""

    config: Config
    layout: Layout
    graph: nnx.GraphDef
    dims: Any  # a tuple of logical dims for each parameter, in the parameters' tree
    roles: Any  # a role for each parameter
    schedule: Callable[[jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    pipe: Pipeline | None  # with one, parameters of blocks are a leaf a slot (pipelined.py), else a leaf a layer

    def model(self, params: Any) -> GPT:
        return nnx.merge(self.graph, params)


def make_program(config: Config, layout: Layout) -> Program:
    """Everything a step needs, without allocating: the model is built abstractly. Raises UserError on an uneven split."""
    chosen = {key: choice.kernel.name for key, choice in chosen_kernels(config, layout).items()}  # layers know less
    remat = "none" if config.model.remat == "auto" else config.model.remat  # tuning.py chooses, for whoever trains
    built = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat, **chosen))
    abstract = nnx.eval_shape(lambda: GPT(built.model, jax.random.key(0), layout))
    graph, variables = nnx.split(abstract)
    flat = nnx.to_flat_state(variables)
    params = {".".join(map(str, path)): Declared(v.shape, v.dims, v.size * v.dtype.itemsize) for path, v in flat}
    check_layout(layout, params, max_replicated_frac=config.mesh.max_replicated_frac)
    layout.check_divides("train.seq_len", (config.train.seq_len,), ("residual",))
    choose_context(layout, config.model, config.train.seq_len)
    dims = unflatten_dict({path: variable.dims for path, variable in flat})
    roles = unflatten_dict({path: variable.role for path, variable in flat})
    pipe = make_pipeline(built, layout)
    if pipe is not None:
        dims = slot_dims(pipe, dims)
        roles |= {"layers": {j: roles["layers"][0] for j in range(pipe.stages.num_slots)}}
    schedule = make_schedule(config.optim, config.train.num_steps)
    optimizer = make_optimizer(config.optim, schedule=schedule, roles=roles, dims=dims)
    return Program(config, layout, graph, dims, roles, schedule, optimizer, pipe)


def chosen_kernels(config: Config, layout: Layout) -> dict[str, Choice]:
    """{setting of the model: what it runs on, and why}. Raises UserError if a kernel that the config names refuses."""
    model, documents, deterministic = config.model, config.data.separates, config.train.deterministic
    attention = choose_attention(model, layout.platform, documents=documents, deterministic=deterministic)
    return {
        "attention": attention,
        "norm_kernel": choose_norm(model, layout),
        "activation_kernel": choose_activation(model, layout),
        "loss_kernel": choose_loss(model, layout),
    }


def init_state(program: Program) -> TrainState:
    """The state at step 0, made on the devices that will hold it: no array ever exists unsharded.

    Blocks are made one by one with one compiled function, so the time to compile does not grow with depth.
    """
    ends, block, opt_init = compile_init(program)
    layers = np.arange(program.config.model.num_layers, dtype=np.int32)
    layers = layers if program.pipe is None else program.pipe.stages.layers()
    made = ends() | {"layers": {i: block(index) for i, index in enumerate(layers)}}
    params = {name: made[name] for name in program.dims}
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=program.layout.replicated)
    return with_recent(program, TrainState(zero(), params, opt_init(params), zero(), zero()))


def with_recent(program: Program, state: TrainState, saved: dict | None = None) -> TrainState:
    """`state` with its window of recent updates: as a checkpoint's metadata has it, empty, or none at all."""
    if not program.config.train.skip_spikes:
        return state
    kept = saved or {"values": np.zeros((2, WINDOW)), "count": 0}
    recent = Recent(np.array(kept["values"], np.float32), np.array(kept["count"], np.int32))
    return dataclasses.replace(state, recent=jax.device_put(recent, program.layout.replicated))


def without_recent(state: TrainState) -> tuple[TrainState, dict]:
    """(what a checkpoint's arrays are, what goes into its metadata)."""
    if state.recent is None:
        return state, {}
    if isinstance(state.recent.count, jax.ShapeDtypeStruct):
        return dataclasses.replace(state, recent=None), {}
    recent = jax.device_get(state.recent)
    kept = {"values": recent.values.tolist(), "count": int(recent.count)}
    return dataclasses.replace(state, recent=None), {"recent": kept}


def compile_init(program: Program) -> tuple[Callable[[], dict], Callable[[Any], dict], Callable[[Any], Any]]:
    """What `init_state` runs, under jit: all parameters but the blocks'; those of block i, or with a pipeline of the
    blocks i[P, R] of one slot; the optimizer's state of parameters."""
    at = state_shardings(program)
    model, seed, layout, pipe = program.config.model, program.config.train.seed, program.layout, program.pipe
    placed = {name: sharding for name, sharding in at.params.items() if name != "layers"}
    ends = jax.jit(lambda: {name: _init_params(program)[name] for name in placed}, out_shardings=placed)

    def blocks(i: jax.Array) -> dict:
        key = jax.random.key(seed)
        return init_block(model, key, i, layout) if pipe is None else init_slot(pipe, key, i, layout)

    block = jax.jit(blocks, out_shardings=at.params["layers"][0])
    return ends, block, jax.jit(program.optimizer.init, out_shardings=at.opt_state)


def _init_params(program: Program) -> dict:
    """All parameters, a leaf a layer."""
    key = jax.random.key(program.config.train.seed)
    return nnx.to_pure_dict(nnx.split(GPT(program.config.model, key, program.layout))[1])


def _init(program: Program) -> TrainState:
    params = _init_params(program)
    params = params if program.pipe is None else slot_shapes(program.pipe, params)
    zero = jnp.zeros((), jnp.int32)
    recent = Recent(jnp.zeros((2, WINDOW)), zero) if program.config.train.skip_spikes else None
    return TrainState(zero, params, program.optimizer.init(params), zero, zero, recent)


def abstract_state(program: Program) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated. Parameters and the optimizer's copies of their shape
    rest by the storage column."""
    shapes, layout = jax.eval_shape(partial(_init, program)), program.layout
    params = by_dims(partial(layout.sharding, at="rest"), program.dims)
    whole, memory = layout.replicated, "pinned_host" if program.config.optim.offload else None

    def like_param(moment: Any, param: Any, sharding: Any) -> Any:
        return sharding.with_memory_kind(memory) if moment.shape == param.shape else whole

    moments = optax.tree_map_params(
        program.optimizer, like_param, shapes.opt_state, shapes.params, params, transform_non_params=lambda _: whole
    )
    at = TrainState(whole, params, moments, whole, whole, jax.tree.map(lambda _: whole, shapes.recent))
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, at)


def state_shardings(program: Program) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program))


def train_step(program: Program, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """One update from one global batch. One that is not finite, or a spike, leaves parameters and optimizer state alone.

    Args:
      batch: tokens and labels i32[B, T], weights f32[B, T], rows of the global batch.

    Returns: the next state, and the metrics of this step.
    """
    optim = program.config.optim
    loss, tokens, grads, grad_norm = mean_loss_and_grads(program, state.params, batch, state.step)
    good, recent = jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.recent
    if recent is not None:
        now = jnp.stack([loss, grad_norm])
        good &= recent.is_usual(now, program.config.train.skip_spikes)
        recent = jax.tree.map(partial(jnp.where, good), recent.add(now), recent)
    if optim.clip_norm:
        scale = jnp.minimum(1.0, optim.clip_norm / jnp.maximum(grad_norm, 1e-30))
        grads = jax.tree.map(lambda g: g * scale, grads)
    before = jax.device_put(state.opt_state, jax.memory.Space.Device) if optim.offload else state.opt_state
    updates, opt_state = program.optimizer.update(grads, before, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(partial(jnp.where, good), (params, opt_state), (state.params, before))
    streak = jnp.where(good, 0, state.streak + 1)
    skipped = state.skipped + jnp.where(good, 0, 1)
    lr = program.schedule(state.step - state.skipped)
    metrics = StepMetrics(loss, grad_norm, lr, tokens, skipped.astype(jnp.float32), streak.astype(jnp.float32))
    return TrainState(state.step + 1, params, opt_state, skipped, streak, recent), metrics


def mean_loss_and_grads(program: Program, params: Any, batch: Batch, step: jax.Array) -> tuple:
    """(mean nats a counted token, counted tokens, gradient of the mean objective as it rests, its norm).

    Sums come first: microbatches add nats, tokens and gradients, and one division by the true token count ends it, so
    that ragged masks and accumulation are exact.
    """
    layout, dims, config = program.layout, program.dims, program.config

    def local(params: Any, batch: Batch, step: jax.Array) -> tuple:
        key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        at: At = "grads" if program.pipe is None else "step"  # a pipeline's lie so after its last microbatch
        held = working_copies(params, dims, config.model.dtype, layout, at=at)

        def lay(of: Dims, g: jax.Array) -> jax.Array:
            return lay_gradient(layout, of, g, came=at if has_copy(of) else "step", goes="grads")

        def terms(rows: Batch, m: jax.Array | int) -> tuple[jax.Array, Any]:
            nats, grads = _loss_and_grads(program, held, rows, key, m)
            return nats, by_dims(lay, dims, grads)

        nats, grads = _sum_over_microbatches(program, terms, batch)
        tokens = _counted_tokens(layout, batch)
        share = 1 / jnp.maximum(tokens, 1)
        grads = finish_gradients(layout, dims, grads, share)
        return nats * share, tokens, grads, global_norm(layout, dims, grads)

    rest, one = by_dims(partial(layout.spec, at="rest"), dims), jax.P()
    ins, outs = (rest, batch_specs(program, batch), one), (one, one, rest, one)
    return layout.on_mesh(local, ins, outs)(params, batch, step)


def _sum_over_microbatches(program: Program, terms: Callable[[Batch, Any], Any], batch: Batch) -> Any:
    """Sum of terms(rows, m) over the train.accumulate microbatches; m takes rows m, M+m, 2M+m, ... of each device's."""
    M = program.config.train.accumulate
    if M == 1:
        return terms(batch, 0)
    micro = jax.tree.map(lambda a: a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(sums: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, terms(*xs)), None

    shapes = jax.eval_shape(terms, jax.tree.map(lambda a: a[0], micro), 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (micro, jnp.arange(M)))[0]


def _counted_tokens(layout: Layout, batch: Batch) -> jax.Array:
    return jax.lax.psum(batch.weights.sum(), layout.split(*BATCH_DIMS))


def _loss_and_grads(program: Program, params: Any, batch: Batch, key: jax.Array, m: Any) -> tuple[jax.Array, Any]:
    """(summed nats, gradients of the summed objective, this device's parts) of the rows of microbatch m."""
    train, drops, pipe = program.config.train, program.config.model.dropout > 0, program.pipe
    if pipe is not None:  # its microbatches are those of train.accumulate, cut further
        index_M = m + train.accumulate * jnp.arange(pipe.schedule.microbatches)
        keys_M = jax.vmap(partial(jax.random.fold_in, key))(index_M) if drops else None
        return loss_and_grads(pipe, params, batch, keys_M, train.z_loss)
    key = jax.random.fold_in(key, m)

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        return _sums(program, params, batch, key if drops else None)

    (_, nats), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return nats, gradients(grads)


def _sums(program: Program, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    model, train = program.model(params), program.config.train
    return cross_entropy_sums(
        model.hidden(batch.tokens, key, batch.starts), model.head_table[...], batch.labels, batch.weights,
        layout=program.layout, vocab_size=program.config.model.vocab_size, z_loss=train.z_loss,
        chunk_tokens=train.loss_chunk_tokens, kernel=choose_loss(program.config.model, program.layout).kernel,
    )  # fmt: skip


def eval_step(program: Program, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(summed nats, counted tokens) of one batch, a microbatch at a time, without dropout or z-loss."""
    layout = program.layout

    def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        held = working_copies(params, program.dims, program.config.model.dtype, layout)

        def nats_of(rows: Batch, m: Any) -> jax.Array:
            return _sums(program, held, rows, None)[1] if program.pipe is None else loss(program.pipe, held, rows)

        return _sum_over_microbatches(program, nats_of, batch), _counted_tokens(layout, batch)

    ins = (by_dims(partial(layout.spec, at="rest"), program.dims), batch_specs(program, batch))
    return layout.on_mesh(local, ins, jax.P())(params, batch)


def compile_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` under jit, donating the state."""
    state = state_shardings(program)
    return _pinned(program, train_step, state, (state, program.layout.replicated), donate_argnums=0)


def compile_eval(program: Program) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """`eval_step` under jit."""
    return _pinned(program, eval_step, state_shardings(program).params, program.layout.replicated)


def _pinned(program: Program, function: Callable, at: Any, out: Any, **more: Any) -> Callable:
    """`function` of what lies `at` and of a batch under jit, with layouts pinned on both sides so that it compiles once."""
    return jax.jit(
        partial(function, program),
        in_shardings=(at, batch_sharding(program)),
        out_shardings=out,
        compiler_options=step_options(program),
        **more,
    )


def step_options(program: Program) -> Options:
    """What XLA is asked for, for a step and an evaluation."""
    return compiler_options(program.layout, deterministic=program.config.train.deterministic)


def batch_sharding(program: Program) -> jax.sharding.NamedSharding:
    return program.layout.sharding(BATCH_DIMS)


def batch_specs(program: Program, batch: Batch) -> Batch:
    return jax.tree.map(lambda _: program.layout.spec(BATCH_DIMS), batch)


def num_params(program: Program, *, positions: bool = True, padding: bool = True) -> int:
    """Parameters of the model, optionally without learned positions or without the vocabulary's padding rows."""
    shapes = jax.eval_shape(partial(_init_params, program))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    embed, model = shapes["embed"], program.config.model
    if not positions and "positions" in embed:
        total -= embed["positions"].size
    tables = 1 if model.tie_embeddings else 2
    return total if padding else total - tables * (embed["tokens"].shape[0] - model.vocab_size) * model.embed_dim
