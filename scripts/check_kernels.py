"""Every kernel against its definition in float32, on fresh random inputs: results and all gradients.

  python scripts/check_kernels.py [--seed N] [--only norm,activation,attention,cross_entropy]

On an NVIDIA GPU all kernels at the sizes models have; on a CPU those that it has, and Pallas interpreted, at small ones. Prints
a line a case: the result that comes nearest to its bound, its error and the bound, both relative in the two-norm. Exit 1 if
any error is above its bound. A seed that is not given is drawn and printed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.models.kernels import ATTENTION
from jaxlm.models.loss import LOSS, cross_entropy_sums
from jaxlm.models.mlp import ACTIVATION, How, activate, gelu, swiglu
from jaxlm.models.norm import NORM, Settings, Stream
from jaxlm.models.position import alibi_slopes
from jaxlm.parallel.context import attend
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.rules import Layout

F32 = jnp.float32


class Case(NamedTuple):
    """A kernel and its definition, both functions of `args`.

    roundings: to the operands' dtype, one after another, that a result has behind it and the definition has not.   unit: the
    largest relative error of one.   links: sums that follow one another.   terms: of the longest of them.
    """

    label: str
    kernel: Callable[..., Any]
    definition: Callable[..., Any]
    args: Any
    roundings: int
    links: int
    terms: int
    unit: float

    @property
    def bound(self) -> float:
        """Errors add up along a chain: of a rounding at most a unit, of a float32 sum sqrt(terms) 2^-24, as those of its
        additions are independent."""
        return self.roundings * self.unit + self.links * self.terms**0.5 * 2.0**-24


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(np.random.SeedSequence().generate_state(1)[0]))
    parser.add_argument("--only", default=",".join(CASES), metavar=",".join(CASES))
    args = parser.parse_args(argv)
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    print(f"seed {args.seed}, {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    over = 0
    for name in args.only.split(","):
        for number, case in enumerate(CASES[name](layout, Draw(args.seed))):
            try:
                result, error = check(case, Draw(args.seed + number))
            except Exception as e:  # it said that it serves: the others are still worth knowing
                result, error = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}", float("nan")
            over += not error <= case.bound  # a nan is over too
            verdict = "ok  " if error <= case.bound else "OVER"
            print(f"{verdict} {name} {case.label}: {result} {error:.2e} of {case.bound:.2e}", flush=True)
    print(f"{over} over" if over else "all within their bounds")
    return 1 if over else 0


def check(case: Case, draw: Draw) -> tuple[str, float]:
    """(name, error) of the result or gradient farthest from the definition's."""
    shapes = jax.eval_shape(case.kernel, *case.args)
    cotangents = jax.tree.map(lambda a: draw(a.shape, a.dtype), shapes)
    got = jax.jit(partial(_results, case.kernel))(case.args, cotangents)
    exact = partial(jax.tree.map, lambda a: a.astype(F32))
    with jax.default_matmul_precision("highest"):
        want = jax.jit(partial(_results, case.definition))(exact(case.args), exact(cotangents))
    errors = {}
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.float64(a), np.float64(b)
        errors[jax.tree_util.keystr(path, simple=True, separator=".")] = float(
            np.linalg.norm(a - b) / np.linalg.norm(b)
        )
    return max(errors.items(), key=lambda item: item[1] if item[1] == item[1] else np.inf)


def _results(function: Callable, args: tuple, cotangents: Any) -> dict[str, Any]:
    out, back = jax.vjp(function, *args)
    return {"out": out, "d": back(cotangents)}


class Draw:
    """Normal numbers from a seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def __call__(self, shape: Sequence[int], dtype: Any = F32) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(tuple(shape), np.float32), dtype)


def unit(dtype: str, layout: Layout, *, products: bool = False) -> float:
    """The largest relative error of one rounding; a GPU's matrix products read float32 as TF32, with 11 bits."""
    return 2.0**-9 if dtype == "bfloat16" else 2.0**-11 if products and layout.platform == "gpu" else 2.0**-24


def norms(layout: Layout, draw: Draw) -> Iterator[Case]:
    """The definition rounds the sum to the operands' dtype as kernels do. After that Pallas' rounds what it writes; XLA's
    adds the bias and rounds before it adds the branch, and rounds the norm's share of dx before it adds ds to it."""
    shapes, widths = [(37, 24), (8, 768)], (768, 1024, 1600, 2048, 4096, 8192)
    shapes += [*((4096, D) for D in widths), (10007, 768)] if layout.platform == "gpu" else []
    variants = (  # kind, dtype, and whether there is something to add, with a bias, and a bias of the norm's own
        ("layernorm", "bfloat16", (True, True, True)), ("rmsnorm", "bfloat16", (True, False, False)),
        ("layernorm", "float32", (False, False, True)), ("rmsnorm", "float32", (True, True, False)),
    )  # fmt: skip
    for kernel, (R, D), (kind, dtype, (adds, y_bias, bias)) in itertools.product(NORM, shapes, variants):
        offset = draw((1, R, 1))  # rows have a mean, which a norm without one would show
        stream = Stream(
            (draw((1, R, D)) + offset).astype(dtype),
            draw((1, R, D), dtype) if adds else None,
            draw((D,)) if y_bias else None,
        )
        args = (stream, 1 + 0.1 * draw((D,)), draw((D,)) if bias else None)
        at = Settings(layout, kind, 1e-5, adds)
        have = [name for name, there in (("y", adds), ("y_bias", y_bias), ("bias", bias)) if there]
        yield Case(
            f"{kernel.name} {kind} {dtype} {R}x{D} {' '.join(have)}",
            lambda *args, kernel=kernel, at=at: kernel.run(*args, at),
            partial(_norm, kind=kind, dtype=dtype),
            args,
            roundings=2 if kernel.name == "pallas" else 4,
            links=6,  # mean, variance, two sums of a row's gradient, its sum over rows, the products between
            terms=max(R, D),
            unit=unit(dtype, layout),
        )


def _norm(stream: Stream, scale_D: jax.Array, bias_D: jax.Array | None, *, kind: str, dtype: str) -> tuple:
    s = stream.sum
    s = s + jax.lax.stop_gradient(s.astype(dtype).astype(F32) - s)
    n = s - s.mean(-1, keepdims=True) if kind == "layernorm" else s
    n = n / jnp.sqrt((n * n).mean(-1, keepdims=True) + 1e-5) * scale_D
    return s, n if bias_D is None else n + bias_D


def attentions(layout: Layout, draw: Draw) -> Iterator[Case]:
    """Weights, or the logits' gradient, are rounded before they are multiplied, the output before delta is formed from it, and
    what is written: 3 in a chain; the gradient of a row's logits is a difference, of terms as large as itself: 4."""
    shapes = [(2, 16, 4, 2, 8)]  # B, T, N, K, H
    shapes += [(2, 1024, 12, 12, 64), (1, 2048, 16, 4, 128), (1, 1024, 25, 25, 64)] if layout.platform == "gpu" else []
    for B, T, N, K, H in shapes:
        for kernel, dtype, positions in itertools.product(ATTENTION, ("bfloat16", "float32"), ("learned", "alibi")):
            model = ModelConfig(num_heads=N, num_kv_heads=K, head_dim=H, dtype=dtype, position=positions)  # pyright: ignore
            if kernel.refuses(model, layout.platform, False, False):
                continue
            q, k, v = (draw((B, T, heads, H), dtype) for heads in (N, K, K))
            slopes = jnp.asarray(alibi_slopes(N)) if positions == "alibi" else None
            run = partial(attend, layout, kernel, "alltoall")
            yield Case(
                f"{kernel.name} {dtype} {positions} B{B} T{T} N{N} K{K} H{H}",
                lambda q, k, v, run=run, slopes=slopes: run(q, k, v, slopes, None),
                partial(_attention, slopes=slopes),
                (q, k, v),
                roundings=4,
                links=5,  # logits, softmax, weighted sum; backward two more
                terms=T * N // K,
                unit=unit(dtype, layout, products=True),
            )


def _attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, slopes: jax.Array | None) -> jax.Array:
    T, N, H = q_BTNH.shape[1:]
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    logits = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k) / H**0.5
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    logits = logits if slopes is None else logits - slopes[:, None, None] * distance
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf)), v)


def cross_entropies(layout: Layout, draw: Draw) -> Iterator[Case]:
    """Logits are rounded: their gradient w (softmax - one_hot) is off by up to |logit| units where the softmax is not small,
    |logit| about 2 for logits of deviation 1; it is rounded itself, and what is written is."""
    shapes = (
        [(2048, 768, 50304, 50257), (1024, 4096, 32000, 32000)] if layout.platform == "gpu" else []
    )  # tokens, D, V, ids
    for tokens, D, V, ids in [*shapes, (96, 24, 64, 61)]:
        kinds = itertools.product(LOSS, ("bfloat16", "float32"), (0.0, 1e-2))
        for kernel, dtype, z_loss in kinds:
            x, head = draw((1, tokens, D), dtype), draw((V, D)) / D**0.5
            head = head.astype(dtype).astype(F32)  # at rest in float32: the cast is not the kernel's error
            labels = jnp.asarray(draw.rng.integers(0, ids, (1, tokens)), jnp.int32)
            weights = jnp.asarray(draw.rng.random((1, tokens)) < 0.8, F32)
            setting: dict[str, Any] = dict(vocab_size=ids, z_loss=z_loss)
            sums = partial(cross_entropy_sums, layout=layout, chunk_tokens=tokens // 2, kernel=kernel, **setting)
            yield Case(
                f"{kernel.name} {dtype} {tokens} tokens D{D} V{V} z_loss={z_loss:g}",
                lambda x, head, sums=sums, labels=labels, weights=weights: sums(x, head, labels, weights)[0],
                partial(_cross_entropy, labels=labels, weights=weights, **setting),
                (x, head),
                roundings=4,
                links=4,  # logits, sum of exponentials, gradient, sum over tokens
                terms=max(tokens, D, V),
                unit=unit(dtype, layout, products=True),
            )


def activations(layout: Layout, draw: Draw) -> Iterator[Case]:
    """Forwards, and XLA's backward, work in the operands' dtype: 8 operations follow one another from a sum to what is made
    of it, bias included, and where the compiler keeps none of them in float32 each rounds."""
    shapes = [(4096, 3072), (1003, 11008)] if layout.platform == "gpu" else []  # rows, hidden width
    functions = {gelu: 1, swiglu: 2}  # of how many sums
    kinds = itertools.product(ACTIVATION, [(37, 300), *shapes], functions, ("bfloat16", "float32"))
    for kernel, (R, F), function, dtype in kinds:
        of = range(functions[function])
        yield Case(
            f"{kernel.name} {function.__name__} {dtype} {R}x{F}",
            partial(activate, How(function, kernel, layout, biased=True)),
            lambda sums, biases, function=function: function(*map(jnp.add, sums, biases)),
            (tuple(draw((1, R, F), dtype) for _ in of), tuple(draw((F,)) for _ in of)),
            roundings=8 if dtype == "bfloat16" else 20,  # in float32 each operation of a derivative
            links=1,
            terms=R,
            unit=unit(dtype, layout),
        )


def _cross_entropy(
    x_BTD: jax.Array, head_VD: jax.Array, *, labels, weights, vocab_size: int, z_loss: float
) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", x_BTD, head_VD)[..., :vocab_size]
    z = jax.nn.logsumexp(logits, -1)
    nats = z - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (weights * (nats + z_loss * z**2)).sum()


CASES = {"norm": norms, "activation": activations, "attention": attentions, "cross_entropy": cross_entropies}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
