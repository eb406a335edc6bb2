"""The optimizer of a run: a direction of descent, decay of the chosen roles, times the learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.optim.muon import matrix_dims, scale_by_muon_or_adam
from jaxlm.optim.schedule import Schedule

ROLES = ("kernel", "embedding", "scale", "bias")


def make_optimizer(
    optim: OptimConfig, *, schedule: Schedule, roles: Any, dims: Any = None
) -> optax.GradientTransformation:
    r"""The update of every parameter: -schedule(count) (direction + weight_decay * parameter).

    The decay term is there for parameters whose role is in `optim.decay_roles` alone. `count` is the number of updates
    applied so far, kept in the state: a step that keeps the old state does not advance the schedule. Directions:

        adamw      m / (sqrt(v) + eps), with m and v bias-corrected means of g and g^2 (beta1, beta2)
        lion       sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g; usually a 3-10 times smaller peak_lr
        adafactor  g / sqrt(factored mean of g^2), its RMS clipped to 1 in each parameter; no momentum and no scaling by
                   the parameter's RMS, so that peak_lr and weight_decay keep AdamW's meaning
        muon       orthogonalised momentum for matrices, adamw for the rest (muon.py)

    Moments are float32 and have their parameter's shape; those of adafactor and muon that do not are small. To lay the
    state out like the parameters:

        optax.tree_map_params(optimizer, lambda leaf, param, sharding: sharding if leaf.shape == param.shape else whole,
                              state, params, shardings, transform_non_params=lambda _: whole)

    The tree of the state depends on `optim.name` alone: a run may resume with another decay, schedule or betas.

    Args:
      optim: reads name, weight_decay, decay_roles, beta1, beta2, eps.
      schedule: count i32[] -> learning rate f32[].
      roles: a tree like the parameters' with kernel, embedding, scale or bias at each leaf.
      dims: a tree like the parameters' with a tuple of logical dims at each leaf; only muon reads it, and needs it.

    Raises: ValueError for muon without `dims`, or with dims it cannot read as a matrix.
    Source: Loshchilov and Hutter, arXiv:1711.05101 (AdamW; decay here is times the learning rate); Chen et al.,
      arXiv:2302.06675 (Lion); Shazeer and Stern, arXiv:1804.04235, and Zhai et al., arXiv:2106.04560 (Adafactor without
      parameter scaling).
    """
    assert set(jax.tree.leaves(roles)) <= set(ROLES), f"a role is none of {ROLES}"
    decays = jax.tree.map(lambda role: role in optim.decay_roles, roles)
    return optax.chain(
        _direction(optim, roles, dims),
        optax.add_decayed_weights(optim.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )


def num_updates(opt_state: Any) -> jax.Array:
    """Updates applied so far, i32[]: the argument at which the next update reads the schedule."""
    return opt_state[-1].count


def _direction(optim: OptimConfig, roles: Any, dims: Any) -> optax.GradientTransformation:
    if optim.name == "adamw":
        return optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps, mu_dtype=jnp.float32)
    if optim.name == "lion":
        return optax.scale_by_lion(b1=optim.beta1, b2=optim.beta2, mu_dtype=jnp.float32)
    if optim.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    assert optim.name == "muon", optim.name
    if dims is None:
        raise ValueError("optim.name=muon needs the logical dims of each parameter; pass dims")
    matrices = jax.tree.map(matrix_dims, roles, dims)
    return scale_by_muon_or_adam(matrices, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
