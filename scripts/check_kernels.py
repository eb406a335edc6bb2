"""Every kernel against its definition in float32, on fresh random inputs: results and all gradients.

  python scripts/check_kernels.py [--seed N] [--only products,norm,activation,attention,cross_entropy]

On an NVIDIA GPU all kernels at the sizes models have; on a CPU those that it has, and Pallas interpreted, at small ones. Prints
a line for each kernel of a case: its worst result, the error of that and the bound, both relative in the two-norm. Exit 1 if
any error is above its bound. A seed that is not given is drawn and printed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.models.kernels import ATTENTION
from jaxlm.models.loss import LOSS, cross_entropy_sums
from jaxlm.models.mlp import ACTIVATION, Activation, gelu, swiglu
from jaxlm.models.norm import NORM, Settings, Stream
from jaxlm.models.params import Parameter, add_bias
from jaxlm.models.position import alibi_slopes
from jaxlm.parallel.context import attend
from jaxlm.parallel.dense import Products
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.xla import GPU

F32 = jnp.float32
WORKERS = 8  # cases at a time: nearly all of a case is compiling
# which way XLA multiplies fastest is not in question, and finding out takes it longer than all the rest
jit = partial(jax.jit, compiler_options=GPU | {"xla_gpu_autotune_level": 0})


class Case(NamedTuple):
    """Kernels and their definition, functions of the same arguments.

    kernels: {name: (function, roundings)}, roundings to the operands' dtype, one after another, that a result has behind it and
    the definition has not.   draw: the arguments.   links: sums that follow one another.   terms: of the longest of them.
    unit: of one rounding; see there.   precision: of the kernels' products in float32; None: the device's own.
    """

    label: str
    kernels: dict[str, tuple[Callable[..., Any], int]]
    definition: Callable[..., Any]
    draw: Callable[[Draw], tuple]
    links: int
    terms: int
    unit: float
    precision: str | None = None

    def bound(self, name: str) -> float:
        """Errors add up along a chain: of a rounding at most a unit, of a float32 sum sqrt(terms) 2^-24, as those of its
        additions are independent."""
        return self.kernels[name][1] * self.unit + self.links * self.terms**0.5 * 2.0**-24


class Draw:
    """Normal numbers, one array after another, from a long one that all cases read from its beginning."""

    def __init__(self, numbers: jax.Array):
        self.numbers, self.taken = numbers, 0

    def __call__(self, shape: Sequence[int], dtype: Any = F32) -> jax.Array:
        begin, self.taken = self.taken, self.taken + math.prod(shape)
        assert self.taken <= self.numbers.size, f"a case takes more than {self.numbers.size} numbers"
        return self.numbers[begin : self.taken].reshape(shape).astype(dtype)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(np.random.SeedSequence().generate_state(1)[0]))
    parser.add_argument("--only", default=",".join(CASES), metavar=",".join(CASES))
    args = parser.parse_args(argv)
    layout, rng = make_layout(MeshConfig(data=1), jax.devices()[:1]), np.random.default_rng(args.seed)
    print(f"seed {args.seed}, {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    cases = [(name, case) for name in args.only.split(",") for case in CASES[name](layout, rng)]
    numbers = jax.random.normal(jax.random.key(args.seed), (2**27 if layout.platform == "gpu" else 2**20,))
    over = 0
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        for (name, case), found in zip(cases, pool.map(partial(check, numbers), (case for _, case in cases))):
            for kernel, (result, error) in found.items():
                bound = case.bound(kernel)
                over += not error <= bound  # a nan is over too
                verdict = "ok  " if error <= bound else "OVER"
                print(f"{verdict} {name} {kernel} {case.label}: {result} {error:.2e} of {bound:.2e}", flush=True)
    print(f"{over} over" if over else "all within their bounds")
    return 1 if over else 0


def check(numbers: jax.Array, case: Case) -> dict[str, tuple[str, float]]:
    """{kernel: (name, error) of the result or gradient farthest from the definition's}, or what was raised, and nan."""
    try:
        args, cotangents = jit(partial(_drawn, case))(numbers)
    except Exception as e:
        return dict.fromkeys(case.kernels, _raised(e))
    got, found = {}, {}
    for name, (kernel, _) in case.kernels.items():
        try:
            with jax.default_matmul_precision(case.precision):
                got[name] = jit(partial(_results, kernel))(args, cotangents)
        except Exception as e:  # it said that it serves: the others are still worth knowing
            found[name] = _raised(e)
    with jax.default_matmul_precision("highest"):
        for name, errors in jax.device_get(jit(partial(_errors, case.definition))(args, cotangents, got)).items():
            found[name] = max(errors.items(), key=lambda item: item[1] if item[1] == item[1] else np.inf)
    return found


def _raised(e: Exception) -> tuple[str, float]:
    return f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}", float("nan")


def _drawn(case: Case, numbers: jax.Array) -> tuple[Any, Any]:
    """Arguments, and a cotangent for each result."""
    draw = Draw(numbers)
    args = case.draw(draw)
    kernel, _ = next(iter(case.kernels.values()))
    return args, jax.tree.map(lambda a: draw(a.shape, a.dtype), jax.eval_shape(kernel, *args))


def _results(function: Callable, args: tuple, cotangents: Any) -> dict[str, Any]:
    out, back = jax.vjp(function, *args)
    return {"out": out, "d": back(cotangents)}


def _errors(definition: Callable, args: tuple, cotangents: Any, got: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """{kernel: {result: distance from the definition's, relative in the two-norm}}.

    In float32 and on the device: a sum of n squares, none negative, is off by n 2^-24 of itself at most, added a few at a time
    as devices do by far less: that is a share of the error, not an error beside it.
    """
    exact = partial(jax.tree.map, lambda a: a.astype(F32))
    want = jax.tree.leaves(_results(definition, exact(args), exact(cotangents)))

    def errors(results: Any) -> dict[str, jax.Array]:
        pairs = zip(jax.tree.leaves_with_path(exact(results)), want, strict=True)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
            for (path, a), b in pairs
        }

    return {name: errors(results) for name, results in got.items()}


def unit(dtype: str, layout: Layout, *, products: bool = False) -> float:
    """The relative error of one rounding, its largest in float32, in bfloat16 in the two-norm over numbers of all sizes (its
    largest is twice as large); a GPU's matrix products read float32 as TF32, with 11 bits."""
    return 2.0**-9 if dtype == "bfloat16" else 2.0**-11 if products and layout.platform == "gpu" else 2.0**-24


def norms(layout: Layout, rng: np.random.Generator) -> Iterator[Case]:
    """The definition rounds the sum to the operands' dtype as kernels do. After that Pallas' rounds what it writes; XLA's
    adds the bias and rounds before it adds the branch, and rounds the norm's share of dx before it adds ds to it."""
    shapes = [(10007, 768), (1003, 1600), (4096, 4096), (517, 8192)] if layout.platform == "gpu" else [(8, 768)]
    variants = (  # kind, dtype, and whether there is something to add, with a bias, and a bias of the norm's own
        ("layernorm", "bfloat16", (True, True, True)), ("rmsnorm", "bfloat16", (True, False, False)),
        ("layernorm", "float32", (False, False, True)), ("rmsnorm", "float32", (True, True, False)),
    )  # fmt: skip
    for (R, D), (kind, dtype, (adds, y_bias, bias)) in itertools.product([(37, 24), *shapes], variants):

        def draw(draw: Draw, R=R, D=D, dtype=dtype, adds=adds, y_bias=y_bias, bias=bias) -> tuple:
            offset = draw((1, R, 1))  # rows have a mean, which a norm without one would show
            stream = Stream(
                (draw((1, R, D)) + offset).astype(dtype),
                draw((1, R, D), dtype) if adds else None,
                draw((D,)) if y_bias else None,
            )
            return stream, 1 + 0.1 * draw((D,)), draw((D,)) if bias else None

        at = Settings(layout.platform != "gpu", kind, 1e-5, adds)
        have = [name for name, there in (("y", adds), ("y_bias", y_bias), ("bias", bias)) if there]
        roundings = {"pallas": 2, "xla": 4}
        yield Case(
            f"{kind} {dtype} {R}x{D} {' '.join(have)}",
            {
                kernel.name: (lambda *args, kernel=kernel, at=at: kernel.run(*args, at), roundings[kernel.name])
                for kernel in NORM
            },
            partial(_norm, kind=kind, dtype=dtype),
            draw,
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


def attentions(layout: Layout, rng: np.random.Generator) -> Iterator[Case]:
    """Weights, or the logits' gradient, are rounded before they are multiplied, the output before delta is formed from it, and
    what is written: 3 in a chain; the gradient of a row's logits is a difference, of terms as large as itself: 4. cuDNN reads
    ALiBi rounded, which counts as one more."""
    shapes = [(2, 16, 4, 2, 8)]  # B, T, N, K, H
    shapes += [(2, 1024, 12, 12, 64), (1, 2048, 16, 4, 128), (1, 1023, 25, 25, 64)] if layout.platform == "gpu" else []
    kinds = itertools.product(("bfloat16", "float32"), ("learned", "alibi"))
    for (dtype, positions), (B, T, N, K, H) in itertools.product(kinds, shapes):
        if dtype == "float32" and T > 1024:  # XLA's alone
            continue
        model = ModelConfig(num_heads=N, num_kv_heads=K, head_dim=H, dtype=dtype, position=positions)  # pyright: ignore
        slopes = jnp.asarray(alibi_slopes(N)) if positions == "alibi" else None
        kernels = {}
        for kernel in ATTENTION:
            if kernel.refuses(model, layout.platform, False, False) is None:
                run = partial(attend, layout, kernel, "alltoall")
                roundings = 5 if kernel.name == "cudnn" and positions == "alibi" else 4
                kernels[kernel.name] = lambda q, k, v, run=run, slopes=slopes: run(q, k, v, slopes, None), roundings
        yield Case(
            f"{dtype} {positions} B{B} T{T} N{N} K{K} H{H}",
            kernels,
            partial(_attention, slopes=slopes),
            lambda draw, B=B, T=T, heads=(N, K, K), H=H, dtype=dtype: tuple(draw((B, T, n, H), dtype) for n in heads),
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


def cross_entropies(layout: Layout, rng: np.random.Generator) -> Iterator[Case]:
    """Logits are rounded: their gradient w (softmax - one_hot) is off by up to |logit| units where the softmax is not small,
    |logit| about 2 for logits of deviation 1; it is rounded itself, and what is written is."""
    shapes = [(96, 24, 64, 61)]  # tokens, D, V, ids
    shapes += (
        [(2048, 768, 50304, 50257), (500, 512, 250880, 250680), (200, 256, 32768, 32768)]
        if layout.platform == "gpu"
        else []
    )
    kinds = (("bfloat16", 0.0), ("bfloat16", 1e-2), ("float32", 0.0), ("float32", 1e-2))
    for (tokens, D, V, ids), (dtype, z_loss) in itertools.product(shapes, kinds):
        labels = jnp.asarray(rng.integers(0, ids, (1, tokens)), jnp.int32)
        weights = jnp.asarray(rng.random((1, tokens)) < 0.8, F32)

        def draw(draw: Draw, tokens=tokens, D=D, V=V, dtype=dtype) -> tuple:
            head = (draw((V, D)) / D**0.5).astype(dtype)  # at rest in float32: the cast is not the kernel's error
            return draw((1, tokens, D), dtype), head.astype(F32)

        def run(x, head, *, kernel, labels=labels, weights=weights, setting) -> jax.Array:
            return cross_entropy_sums(x, head, labels, weights, kernel=kernel, **setting)[0]

        ids_and_z: dict[str, Any] = dict(vocab_size=ids, z_loss=z_loss)
        setting = ids_and_z | dict(layout=layout, chunk_tokens=tokens // 2)
        yield Case(
            f"{dtype} {tokens} tokens D{D} V{V} z_loss={z_loss:g}",
            {kernel.name: (partial(run, kernel=kernel, setting=setting), 4) for kernel in LOSS},
            partial(_cross_entropy, labels=labels, weights=weights, **ids_and_z),
            draw,
            links=4,  # logits, sum of exponentials, gradient, sum over tokens
            terms=max(tokens, D, V),
            unit=unit(dtype, layout, products=True),
        )


def activations(layout: Layout, rng: np.random.Generator) -> Iterator[Case]:
    """The activation and the product after it. Forwards, and XLA's backward, work in the operands' dtype: 8 operations follow
    one another from a sum to what is made of it, bias included, and where the compiler keeps none of them in float32 each
    rounds; and so does a product what it writes. Products in float32 are exact here, to show an error of the activation's."""
    shapes = [(37, 24, 300)]  # rows, width, hidden width
    shapes += [(4096, 768, 3072), (1003, 1600, 11008)] if layout.platform == "gpu" else []
    variants = ((gelu, "bfloat16", True), (gelu, "bfloat16", False), (gelu, "float32", True))
    variants += ((swiglu, "bfloat16", True), (swiglu, "float32", True))
    for (R, D, F), (function, dtype, biased) in itertools.product(shapes, variants):
        roundings = 1 + (8 if dtype == "bfloat16" else 20)  # in float32 each operation of a derivative
        num, kernels = 2 if function is swiglu else 1, {}
        for kernel in ACTIVATION:
            named: Any = dict(activation=function.__name__, dtype=dtype, activation_kernel=kernel.name)
            model = ModelConfig(embed_dim=D, mlp_dim=F, use_bias=biased, **named)
            if kernel.refuses(model, layout) is None:
                made = Activation(function, kernel, layout, biased)
                kernels[kernel.name] = partial(_hidden, Products(layout, dtype), made), roundings

        def draw(draw: Draw, R=R, D=D, F=F, dtype=dtype, num=num, biased=biased) -> tuple:
            down = draw((F, D), dtype).astype(F32) / F**0.5
            return (
                tuple(draw((1, R, F), dtype) for _ in range(num)),
                tuple(draw((F,)) for _ in range(num * biased)),
                down,
            )

        def definition(sums: tuple, biases: tuple, down: jax.Array, function=function) -> jax.Array:
            return function(*map(jnp.add, sums, biases or [0] * len(sums))) @ down

        yield Case(
            f"{function.__name__} {dtype} {R}x{D}x{F}{' biases' * biased}",
            kernels,
            definition,
            draw,
            links=3,  # two products, and over rows
            terms=max(R, D, F),
            unit=unit(dtype, layout),
            precision="highest" if dtype == "float32" else None,
        )


def _hidden(products: Products, made: Activation, sums: tuple, biases: tuple, down: jax.Array) -> jax.Array:
    return products.rows_of(made, sums, biases, Parameter(down, dims=("mlp", "embed"), role="kernel"))


def _cross_entropy(
    x_BTD: jax.Array, head_VD: jax.Array, *, labels, weights, vocab_size: int, z_loss: float
) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", x_BTD, head_VD)[..., :vocab_size]
    z = jax.nn.logsumexp(logits, -1)
    nats = z - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (weights * (nats + z_loss * z**2)).sum()


def products(layout: Layout, rng: np.random.Generator) -> Iterator[Case]:
    """Three weights' columns with their biases, the first through GELU and a product more, under the step's own settings of
    XLA. Rounded in a chain: the bias, the sum, d activation and 8 times what follows from it (see there), d sum, and dx as
    each weight's share is added."""
    shapes = [(4096, 768, 768), (1000, 1600, 1600)] if layout.platform == "gpu" else []  # rows, width, columns of each
    for (R, D, F), dtype in itertools.product([(37, 24, 40), *shapes], ("bfloat16", "float32")):
        xla = next(kernel for kernel in ACTIVATION if kernel.name == "xla")
        made = Activation(gelu, xla, layout, biased=True)

        def run(x: jax.Array, weights: list, biases: list, down: jax.Array, made=made, dtype=dtype) -> tuple:
            params, p = [Parameter(w, dims=("embed", "mlp"), role="kernel") for w in weights], Products(layout, dtype)
            first, *others = p.columns(x, *params)
            return _hidden(p, made, (first,), (biases[0],), down), *map(add_bias, others, biases[1:])

        def definition(x: jax.Array, weights: list, biases: list, down: jax.Array) -> tuple:
            first, *others = (x @ w + b for w, b in zip(weights, biases))
            return gelu(first) @ down, *others

        def draw(draw: Draw, R=R, D=D, F=F, dtype=dtype) -> tuple:
            *weights, down = [draw(s, dtype).astype(F32) / s[0] ** 0.5 for s in (*[(D, F)] * 3, (F, D))]
            return draw((1, R, D), dtype), weights, [draw((F,)) for _ in range(3)], down

        yield Case(
            f"{dtype} {R}x{D}x{F}",
            {"xla": (run, 15 if dtype == "bfloat16" else 27)},
            definition,
            draw,
            links=3,
            terms=max(R, D, F),
            unit=unit(dtype, layout, products=True),
        )

        def drawn_sums(draw: Draw, R=R, F=F, dtype=dtype) -> tuple:
            return draw((1, R, F), dtype), draw((F,))

        # a bias alone, whose gradient no product blurs: rounded itself, and the sum
        yield Case(
            f"bias {dtype} {R}x{F}",
            {"xla": (add_bias, 2)},
            jnp.add,
            drawn_sums,
            links=1,
            terms=R,
            unit=unit(dtype, layout),
        )


CASES = {
    "products": products,
    "norm": norms,
    "activation": activations,
    "attention": attentions,
    "cross_entropy": cross_entropies,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
