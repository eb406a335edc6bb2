"""Throughput of the steps between two logged ones, from host clocks alone."""

from __future__ import annotations

from functools import partial

from jaxlm.metrics.flops import mfu


class StepMeter:
    """Averages step time, tokens per second, MFU and data wait since the previous logged step.

    Call `start` when stepping begins and again after anything that is not a step (compilation, an evaluation, a
    blocking save), so that it is not counted; `wait` when the host had no batch to dispatch; `step` when a step's end is
    seen; `take` to log. A wait counts where it happens, so no record waits longer than its steps took. All times are
    `time.monotonic` seconds. peak_flops_per_s is one device's (None: mfu is None); tokens are those of all devices.
    """

    def __init__(self, *, flops_per_token: float, peak_flops_per_s: float | None, num_devices: int):
        self._mfu = partial(
            mfu, flops_per_token=flops_per_token, peak_flops_per_s=peak_flops_per_s, num_devices=num_devices
        )
        self._last_s: float | None = None
        self._num_steps, self._num_tokens, self._busy_s, self._data_wait_s = 0, 0, 0.0, 0.0

    def start(self, *, time_s: float) -> None:
        """The next step is timed from here."""
        self._last_s = time_s

    def wait(self, seconds: float) -> None:
        self._data_wait_s += seconds

    def step(self, *, time_s: float, tokens: int) -> None:
        """A step of so many tokens ended at time_s."""
        assert self._last_s is not None, "StepMeter.start comes before the first step"
        self._num_steps += 1
        self._num_tokens += tokens
        self._busy_s += time_s - self._last_s
        self._last_s = time_s

    def take(self) -> dict[str, float | None]:
        """step_time_s, tokens_per_s, mfu and data_wait_s per step since the previous take (at least one step ago)."""
        busy_s = max(self._busy_s, 1e-9)  # two reads of a coarse clock may coincide
        tokens_per_s = self._num_tokens / busy_s
        taken = {
            "step_time_s": busy_s / self._num_steps,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s=tokens_per_s),
            "data_wait_s": self._data_wait_s / self._num_steps,
        }
        self._num_steps, self._num_tokens, self._busy_s, self._data_wait_s = 0, 0, 0.0, 0.0
        return taken
