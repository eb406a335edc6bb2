"""Rows split over devices attend as on one device, by any method; each device does the same work."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from jaxlm.config import MeshConfig, UserError
from jaxlm.models.kernels import ATTENTION
from jaxlm.models.position import alibi_slopes
from jaxlm.parallel.context import attend, choose_context
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import RULES, Layout, Rule
from jaxlm.session import kernel_facts
from jaxlm.step import make_program

XLA = next(kernel for kernel in ATTENTION if kernel.name == "xla")
B, T, H = 4, 32, 4

# Relative L2 distance allowed between two orders of the same f32 sums: a chain of 4 products and a softmax with sums of
# at most 32 terms (sqrt(32) 2^-24 each), and up to 8 merges of blocks, whose two roundings of 2^-24 add linearly.
REORDERED = (5 * 32**0.5 + 16) * 2**-24  # 2.6e-6


def operands(N, K):
    rng = np.random.default_rng(N + K)
    return tuple(rng.standard_normal((B, T, n, H), np.float32) for n in (N, K, K, N))


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(layout, kernel, method, q, k, v, slopes, keep, dout):
    """(out, dq, dk, dv)."""

    def local(q, k, v, slopes, keep, dout):
        out, gradients = jax.vjp(lambda q, k, v: attend(layout, kernel, method, q, k, v, slopes, keep), q, k, v)
        return out, *gradients(dout)

    query, key, (rows, seq, heads) = *specs(layout), layout.axes(("batch", "seq", "heads"))
    ins = (query, key, key, jax.P(), jax.P(rows, heads + seq), query)
    return layout.on_mesh(local, ins, (query, query, key, key))(q, k, v, slopes, keep, dout)


def specs(layout):
    """Where queries lie between layers, and where keys do."""
    return layout.spec(("batch", "seq", "heads")), layout.spec(("batch", "seq", "kv_heads"))


@cache
def reference(N, K, alibi):
    """From the definition, in float64."""
    with jax.enable_x64(True):

        def naive(q, k, v):
            k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
            logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
            distance = np.arange(T)[:, None] - np.arange(T)
            logits -= alibi_slopes(N).astype(float)[:, None, None] * distance if alibi else 0
            weights = jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf))
            return jnp.einsum("bnts,bsnh->btnh", weights, v)

        *qkv, dout = map(np.float64, operands(N, K))
        out, gradients = jax.vjp(naive, *qkv)
        return jax.device_get((out, *gradients(dout)))


def check(layout, method, N, K, alibi):
    q, k, v, dout = operands(N, K)
    slopes = jnp.asarray(alibi_slopes(N)) if alibi else None
    got = run(layout, XLA, method, q, k, v, slopes, None, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, reference(N, K, alibi), strict=True):
        assert np.linalg.norm(np.float64(a) - b) <= REORDERED * np.linalg.norm(b), name


# (method, mesh, heads, kv heads, ALiBi): each method at 2 and 4, ring at 8 and at an odd degree; kv heads that do and
# do not divide by context; with model=2, with data=2, with fsdp=2
CASES = [
    ("alltoall", dict(context=2), 4, 2, True),
    ("alltoall", dict(context=4), 4, 4, False),
    ("alltoall", dict(context=2, model=2, fsdp=2), 8, 4, True),
    ("ring", dict(context=2), 4, 1, True),
    ("ring", dict(context=4), 6, 2, False),
    ("ring", dict(context=8), 2, 1, True),
    ("ring", dict(context=2, model=2, fsdp=2), 4, 2, True),
    ("ring", dict(data=2, context=4), 2, 2, True),
    ("allgather", dict(context=2), 4, 1, False),
    ("allgather", dict(context=4), 6, 2, True),
    ("allgather", dict(context=8), 2, 1, True),
    ("allgather", dict(data=2, context=2, model=2), 4, 2, True),
]


@pytest.mark.parametrize(("method", "mesh", "N", "K", "alibi"), CASES, ids=str)
def test_every_method_gives_the_one_device_context_and_gradients(method, mesh, N, K, alibi):
    check(tiny.layout(math.prod(mesh.values()), **({"data": 1} | mesh)), method, N, K, alibi)


@pytest.mark.parametrize("method", ["alltoall", "ring", "allgather"])
def test_one_device_and_a_mesh_that_splits_no_row_need_no_method(method):
    check(tiny.layout(), method, 4, 2, True)
    check(tiny.layout(4, data=2, model=2), method, 4, 2, True)


@pytest.mark.parametrize("method", ["alltoall", "ring", "allgather"])
def test_rows_may_split_over_any_axes_the_table_names(method):
    rows = {"batch": ("data",), "seq": ("fsdp", "context")}
    rules = tuple(Rule(rule.dim, *(rows.get(rule.dim, rule.compute),) * 2) for rule in RULES)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2), jax.devices()[:8])
    check(Layout(mesh, rules), method, 4, 4, True)


def test_dropout_of_weights_drops_the_same_ones_on_any_mesh():
    q, k, v, dout = operands(4, 4)
    keep = (np.random.default_rng(0).random((B, 4, T, T)) < 0.7).astype(np.float32) / 0.7
    want = run(tiny.layout(), XLA, "alltoall", q, k, v, None, keep, dout)
    got = run(tiny.layout(4, data=1, context=2, model=2), XLA, "alltoall", q, k, v, None, keep, dout)
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) <= REORDERED * np.linalg.norm(b)


def equations(jaxpr, times=1):
    """Every equation that runs, with how many times: the bodies of loops as often as they loop."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for part in jaxprs_in_params(equation.params):
            yield from equations(part, inner)


def program(method, C, N=2, K=2):
    layout = tiny.layout(C, data=1, context=C)
    *qkv, dout = operands(N, K)
    return list(equations(jax.make_jaxpr(partial(run, layout, XLA, method))(*qkv, None, None, dout).jaxpr))


@pytest.mark.parametrize("method", ["ring", "allgather"])
@pytest.mark.parametrize("C", [2, 4, 8])
def test_every_device_multiplies_the_same_blocks_and_no_more(method, C):
    ran = program(method, C)
    # one program for all devices, in which no device leaves anything out
    assert not {"cond", "while"} & {equation.primitive.name for equation, _ in ran}
    multiply_adds = 0
    for equation, times in ran:
        if equation.primitive.name == "dot_general":
            left, summed = equation.invars[0].aval, equation.params["dimension_numbers"][0][0]
            multiply_adds += times * equation.outvars[0].aval.size * math.prod(left.shape[dim] for dim in summed)
    # the square of lo and hi at home, two blocks a step from elsewhere; each is 2 products forward and 5 backward
    chunk = T // (2 * C)
    pairs = (2 * chunk) ** 2 + 2 * (C - 1) * chunk**2
    assert multiply_adds == 7 * B * 2 * H * pairs


@pytest.mark.parametrize(
    ("method", "collectives"),
    [
        ("alltoall", dict(all_to_all=8)),  # q, k, v in and out back; then dout in and dq, dk, dv back
        # mirrors: 8 in all, as above. k and v make C-1 moves forward and again backward, dk and dv C
        ("ring", dict(ppermute=8 + 2 * (3 + 3 + 4))),
        ("allgather", dict(ppermute=8, all_gather=4, reduce_scatter=2)),
    ],
)
def test_what_crosses_the_links(method, collectives):
    found: dict[str, int] = {}
    for equation, times in program(method, 4, N=4, K=4):
        name = equation.primitive.name
        if name in ("all_to_all", "ppermute", "all_gather", "reduce_scatter", "psum"):
            found[name] = found.get(name, 0) + times * len(equation.invars)
    assert found == collectives


def choice(method, model, degrees):
    c = tiny.config(**({"num_heads": 8, "embed_dim": 32} | model))
    degrees = {"data": 1} | degrees
    mesh = make_mesh(MeshConfig(**degrees), jax.devices()[: math.prod(degrees.values())])
    layout = Layout(mesh, context_method=method)
    make_program(c, layout)
    return str(choose_context(layout, c.model, c.train.seq_len))


NOT = "allgather (not alltoall: {} do not split over context=4)"


@pytest.mark.parametrize(
    ("method", "model", "mesh", "want"),
    [
        ("auto", dict(), dict(context=4), "alltoall"),
        ("auto", dict(dropout=0.1), dict(context=4), "alltoall"),
        ("auto", dict(num_kv_heads=2), dict(context=4), NOT.format("2 kv heads / model=1")),
        ("auto", dict(num_kv_heads=4), dict(context=4, model=2), NOT.format("4 kv heads / model=2")),
        ("auto", dict(num_heads=2), dict(context=4), NOT.format("2 heads / model=1")),
        ("ring", dict(), dict(context=4), "ring"),
        ("allgather", dict(), dict(context=4), "allgather"),
        ("ring", dict(dropout=0.1), dict(data=2), "ring"),
    ],
    ids=str,
)
def test_the_method_is_chosen_with_its_reason(method, model, mesh, want):
    assert choice(method, model, mesh) == want


@pytest.mark.parametrize(
    ("method", "model", "mesh", "why"),
    [
        ("alltoall", dict(num_kv_heads=2), dict(context=4), "2 kv heads / model=1 do not split over context=4"),
        ("alltoall", dict(num_heads=6), dict(context=4), "6 heads / model=1 do not split over context=4"),
        ("ring", dict(dropout=0.1), dict(context=2), "not ring: it has no dropout of attention weights"),
        ("allgather", dict(max_seq_len=12), dict(context=4), "12 positions does not split into 2 \\* context=4 chunks"),
        ("auto", dict(num_kv_heads=1, dropout=0.1), dict(context=2), "1 kv heads.*; not allgather: it has no dropout"),
    ],
    ids=str,
)
def test_a_method_that_does_not_serve_is_refused_with_its_reason(method, model, mesh, why):
    model = {"embed_dim": 24 if model.get("num_heads") == 6 else 32} | model
    with pytest.raises(UserError, match=why) as refusal:
        choice(method, model, mesh)
    assert refusal.value.problems[0].where == f"mesh.context_method={method}"


def test_the_runs_facts_name_the_method_only_where_rows_are_split():
    c = tiny.config("llama")
    split, whole = (kernel_facts(make_program(c, tiny.layout(4, **mesh))) for mesh in (dict(data=1, context=4), {}))
    assert whole["attention"] == "xla (not cudnn: it runs on NVIDIA GPUs, not cpu)" and "context" not in whole
    assert split == whole | {"context": NOT.format("6 heads / model=1")}


def documents() -> np.ndarray:
    """i32[B, T]: where each position's document starts; ends fall within chunks, on their borders, and nowhere."""
    starts = np.zeros((B, T), np.int32)
    for row, ends in enumerate(((3, 8, 21), (16,), (1, 2, 4, 30, 31), ())):
        for end in ends:
            starts[row, end:] = end
    return starts


@pytest.mark.parametrize(
    ("method", "mesh", "N", "K", "alibi"),
    [
        ("alltoall", dict(data=1), 4, 2, True),
        ("alltoall", dict(context=2, model=2), 8, 4, True),
        ("ring", dict(context=4), 6, 2, False),
        ("ring", dict(context=2, fsdp=2), 4, 2, True),
        ("allgather", dict(context=4), 2, 1, True),
    ],
    ids=str,
)
def test_every_method_keeps_to_documents_and_sends_nothing_between_them(method, mesh, N, K, alibi):
    layout = tiny.layout(math.prod(mesh.values()), **({"data": 1} | mesh))
    q, k, v, dout = operands(N, K)
    slopes, starts = jnp.asarray(alibi_slopes(N)) if alibi else None, documents()
    dout = dout * (starts == 8)[..., None, None]  # the third document of the first row

    def apart(q, k, v, starts, dout):
        out, back = jax.vjp(lambda *qkv: attend(layout, XLA, method, *qkv, slopes, None, starts), q, k, v)
        return out, *back(dout)

    query, key = specs(layout)
    apart = layout.on_mesh(apart, (query, key, key, layout.spec(("batch", "seq")), query), (query, query, key, key))
    out, *grads = jax.jit(apart)(q, k, v, starts, dout)
    for row in range(B):
        for start in np.unique(starts[row]):
            here = np.flatnonzero(starts[row] == start)
            want = one_document(*(x[row : row + 1, here] for x in (q, k, v)), alibi)
            # as REORDERED has it, for a document alone
            assert np.linalg.norm(np.float64(out[row, here]) - want) <= REORDERED * np.linalg.norm(want)
    for grad in grads:
        assert (np.asarray(grad)[starts != 8] == 0).all() and (np.asarray(grad)[starts == 8] != 0).any()


def one_document(q, k, v, alibi):
    """Causal attention from its definition, in float64."""
    N, T = q.shape[2], q.shape[1]
    k, v = (np.repeat(np.float64(x), N // x.shape[2], axis=2) for x in (k, v))
    distance = np.arange(T)[:, None] - np.arange(T)
    logits = np.einsum("btnh,bsnh->bnts", np.float64(q), k) / np.sqrt(H)
    logits -= alibi_slopes(N).astype(float)[:, None, None] * distance if alibi else 0
    weights = np.exp(np.where(distance >= 0, logits, -np.inf) - logits.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)[0]
