"""What a layer may send: the collectives of a compiled step, counted by kind and axes, against what the layout needs.

A layer's share is the difference between steps of three layers and of two. Counts are of executions after XLA's combiner,
as golden text; bytes are derived here from the model's shapes. For a GPU the backward gathers again (docs/results.md); the CPU
compiler of jax 0.10 drops optimization barriers and so keeps what the forward gathered.
"""

import collections

import jax
import pytest
import tiny
from test_memory import abstract_batch

from jaxlm.parallel.hlo import collectives
from jaxlm.step import abstract_state, compile_step, make_program

D, F, ROWS, T = 32, 64, 8, 16
WEIGHTS = 4 * (4 * D * D + 2 * D * F)  # bytes of a layer's kernels, float32
STREAM = 4 * ROWS * T * D  # bytes of the residual stream of all rows
AGAIN = jax.__version_info__ >= (0, 11)
PASSES, ENTRIES = (2, 6) if AGAIN else (1, 4)  # that gather a weight; of the stream into a branch, forward or backward


def sent(layers: int, mesh: dict, *, accumulate: int = 1) -> collections.Counter:
    config = tiny.config(num_layers=layers, num_heads=8, embed_dim=D, num_kv_heads=8, mlp_dim=F)
    config = tiny.replace(config, train=dict(accumulate=accumulate, batch_size=ROWS * accumulate))
    program = make_program(config, tiny.layout(8, **mesh))
    text = compile_step(program).lower(abstract_state(program), abstract_batch(program)).compile().as_text()
    found = collections.Counter()
    for c in collectives(text, program.layout.mesh):
        found[c.kind, "+".join(c.axes), "times"] += c.times
        found[c.kind, "+".join(c.axes), "bytes"] += c.times * c.bytes
    return found


@pytest.mark.parametrize(
    ("mesh", "golden", "want_bytes"),
    [
        # every weight gathered, its gradient scattered once, in float32
        (dict(data=1, fsdp=8), f"{6 * PASSES} all-gather fsdp, 6 reduce-scatter fsdp",
         {"all-gather fsdp": PASSES * WEIGHTS, "reduce-scatter fsdp": WEIGHTS}),
        # hybrid shard: what crosses groups is a fourth, and once for all layers
        (dict(data=2, fsdp=4), f"{6 * PASSES} all-gather fsdp, 6 reduce-scatter fsdp",
         {"all-gather fsdp": PASSES * WEIGHTS, "all-reduce data": WEIGHTS / 4, "reduce-scatter fsdp": WEIGHTS}),
        # tensor + sequence parallel: two gathers and two scatters of the stream forward, the same backward, and again what
        # the weights' gradients read
        (dict(data=1, model=8), f"{ENTRIES} all-gather model, 4 reduce-scatter model",
         {"all-gather model": ENTRIES * STREAM, "reduce-scatter model": 4 * STREAM}),
        (dict(data=1, fsdp=4, model=2),
         f"{6 * PASSES} all-gather fsdp, {ENTRIES} all-gather model, 6 reduce-scatter fsdp, 4 reduce-scatter model",
         {"all-gather fsdp": PASSES * WEIGHTS / 2, "all-gather model": ENTRIES * STREAM / 4,
          "reduce-scatter fsdp": WEIGHTS / 2, "reduce-scatter model": 4 * STREAM / 4}),
        # positions and heads change places: q, k, v and the context, and their gradients
        (dict(data=1, context=8), "8 all-to-all context",
         {"all-reduce context": WEIGHTS, "all-to-all context": 8 * STREAM / 8}),
        (dict(data=8), "", {"all-reduce data": WEIGHTS}),
        # weights that a step holds are gathered once for its two microbatches
        (dict(data=1, fsdp=8, zero=2, accumulate=2), "6 all-gather fsdp, 12 reduce-scatter fsdp",
         {"all-gather fsdp": WEIGHTS, "reduce-scatter fsdp": 2 * WEIGHTS}),
        # and gradients that lie whole are scattered once
        (dict(data=1, fsdp=8, zero=1, accumulate=2), "6 all-gather fsdp, 6 reduce-scatter fsdp",
         {"all-gather fsdp": WEIGHTS, "reduce-scatter fsdp": WEIGHTS}),
        # between replicas of the parameters once a step, whatever there is of microbatches
        (dict(data=2, fsdp=4, zero=2, accumulate=2), "6 all-gather fsdp, 12 reduce-scatter fsdp",
         {"all-gather fsdp": WEIGHTS, "all-reduce data": WEIGHTS / 4, "reduce-scatter fsdp": 2 * WEIGHTS}),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_sends_what_its_layout_needs_and_no_more(mesh, golden, want_bytes):
    accumulate = mesh.get("accumulate", 1)
    mesh = {axis: degree for axis, degree in mesh.items() if axis != "accumulate"}
    layer = sent(3, mesh, accumulate=accumulate)
    layer.subtract(sent(2, mesh, accumulate=accumulate))
    times = {f"{kind} {axes}": n for (kind, axes, what), n in sorted(layer.items()) if what == "times" and n}
    assert ", ".join(f"{n} {name}" for name, n in times.items()) == golden
    for (kind, axes, what), n in layer.items():
        if (
            what == "bytes"
        ):  # vectors ride along in all-reduces: biases and norms are under a twelfth of the kernels here
            spare = WEIGHTS / 12 if kind == "all-reduce" else 0
            assert n == pytest.approx(want_bytes.get(f"{kind} {axes}", 0), abs=spare)
