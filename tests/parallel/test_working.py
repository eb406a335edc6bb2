"""Working copies are read in the compute dtype; what comes back is float32 and was never less."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxlm.models.loss import cross_entropy_sums
from jaxlm.parallel.dense import Products
from jaxlm.parallel.rules import by_dims
from jaxlm.parallel.working import Working, gradients, working_copies
from jaxlm.step import abstract_state, make_program

DIMS = {
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "table": ("vocab", "embed"),
    "positions": ("position", "embed"),
}


@dataclass
class Weight:
    """A parameter of a module, as products see it."""

    value: Any
    dims: tuple[str, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.value


def test_gradients_of_working_copies_keep_what_bfloat16_would_round():
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    params = {"up": draw(0, 24, 40), "down": draw(1, 40, 24), "table": draw(2, 64, 24), "positions": draw(3, 16, 24)}
    layout, tokens = tiny.layout(), jax.random.randint(jax.random.key(4), (4, 16), 0, 64)
    copies = working_copies(params, DIMS, "bfloat16", layout)
    assert not isinstance(copies["positions"], Working) and copies["up"].value.dtype == jnp.bfloat16
    products, weights = Products(layout, "bfloat16"), jnp.ones((4, 16))

    def objective(copies):
        x_BTD = products.lookup(Weight(copies["table"], DIMS["table"]), tokens)
        (y_BTF,) = products.columns(x_BTD, Weight(copies["up"], DIMS["up"]))
        x_BTD = x_BTD + products.rows(y_BTF, Weight(copies["down"], DIMS["down"]))
        return cross_entropy_sums(x_BTD, copies["table"], tokens, weights, layout=layout, vocab_size=64)[0]

    for name, grad in gradients(jax.grad(objective)(copies)).items():
        rounded = grad.astype(jnp.bfloat16).astype(jnp.float32)
        assert grad.dtype == jnp.float32 and grad.shape == params[name].shape
        if name != "positions":  # a row looked up once, or not at all, may need no more than 8 bits
            assert np.mean(rounded == grad) < 0.6, name


def gather_all(program):
    """Of parameters at rest what a step reads, under jit."""
    layout, dims = program.layout, program.dims

    def local(params):
        copies = working_copies(params, dims, "bfloat16", layout)
        return jax.tree.map(
            lambda leaf: getattr(leaf, "value", leaf), copies, is_leaf=lambda leaf: isinstance(leaf, Working)
        )

    rest, step = (by_dims(partial(layout.spec, at=at), dims) for at in ("rest", "step"))
    return jax.jit(layout.on_mesh(local, (rest,), step))


def test_a_step_that_holds_its_weights_gathers_them_in_the_compute_dtype():
    """As XLA is given it: its CPU compiler would gather float32 all the same."""
    for zero, weights in ((2, 6 * 3 + 1), (3, 0)):
        program = make_program(tiny.config(dtype="bfloat16"), tiny.layout(4, data=1, fsdp=4, zero=zero))
        text = gather_all(program).lower(abstract_state(program).params).as_text()
        held = re.findall(r"all_gather.* -> tensor<([\dx]+)x(\w+)>", text)
        assert len([kind for _, kind in held if kind == "bf16"]) == weights
        assert [shape for shape, kind in held if kind != "bf16"] == ["16x24"] * (1 if weights else 0)  # positions
