"""Learning rate as a function of the number of updates applied so far."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.config import OptimConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(optim: OptimConfig, num_steps: int) -> Schedule:
    r"""Linear warm-up to `peak_lr`, then the shape that `optim.schedule` names.

    With n = step + 1 the number of the update (the first is 1), w = `warmup_steps`, N = `num_steps`, and
    f = `final_lr_frac`, the learning rate over `peak_lr` is n / w while n < w: the first update already moves, and
    update w is the first at the peak. From there on (p = max(w, 1) is the first update at the peak):

        cosine        f + (1 - f) (1 + cos(pi t)) / 2       t = (n - p) / (N - p), held at 1 after N
        linear        f + (1 - f) (1 - t)                   the same t
        constant      1
        inverse_sqrt  sqrt(p / n)                           never reaches a floor; f is not used
        wsd           1, then 1 - (1 - f) (n - (N - d)) / d over the last d = `decay_steps` updates

    cosine, linear and wsd give exactly f32(f * peak_lr) at update N and after. Where update N is itself the first at
    the peak (a run of one step) cosine and linear stay at the peak: nothing is left to decay over.

    Args:
      optim: reads schedule, peak_lr, warmup_steps, final_lr_frac, decay_steps (0: a fifth of num_steps).
      num_steps: updates in the whole run, N >= 1.

    Returns: step i32[] -> f32[], the learning rate of the update that follows `step` applied ones. Safe under jit.

    Example:
      >>> lr = make_schedule(OptimConfig(peak_lr=1.0, warmup_steps=2, final_lr_frac=0.0), num_steps=4)
      >>> [round(float(lr(step)), 6) for step in range(5)]
      [0.5, 1.0, 0.5, 0.0, 0.0]

    Source: cosine, Loshchilov and Hutter, arXiv:1608.03983; inverse_sqrt, Vaswani et al., arXiv:1706.03762, section
      5.3; wsd, Hu et al., arXiv:2404.06395, section 4.
    """
    first_peak = max(optim.warmup_steps, 1)
    decay_steps = optim.decay_steps or max(num_steps // 5, 1)
    decays = optim.schedule in ("cosine", "linear", "wsd") and (optim.schedule == "wsd" or num_steps > first_peak)
    peak, final = jnp.float32(optim.peak_lr), jnp.float32(optim.peak_lr * optim.final_lr_frac)

    def height(n: jax.Array) -> jax.Array:
        """What is left of the way from the final learning rate to the peak after warm-up, in [0, 1]."""
        if optim.schedule == "wsd":
            return 1 - jnp.maximum(n - (num_steps - decay_steps), 0) / decay_steps
        t = (n - first_peak) / max(num_steps - first_peak, 1)
        return (1 + jnp.cos(jnp.pi * t)) / 2 if optim.schedule == "cosine" else 1 - t

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(step, jnp.int32) + 1
        if decays:
            # Ends are set, not computed: XLA may turn a / N into a * (1 / N), which misses 1 by an ulp.
            left = jnp.where(n >= num_steps, 0.0, jnp.where(n <= first_peak, 1.0, height(n)))
            lr = peak * left + final * (1 - left)
        elif optim.schedule == "inverse_sqrt":
            lr = peak * jnp.sqrt(first_peak / jnp.maximum(n, first_peak))
        else:
            lr = peak
        return jnp.where(n < first_peak, peak * (n / first_peak), lr).astype(jnp.float32)

    return schedule
