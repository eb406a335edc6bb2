"""How fast a run trains: FLOPs of a token, the peak of each chip, and the share of it that steps reach (MFU).

Letters as in the PaLM paper: N parameters, L layers, H query heads, Q width of one head, T tokens in a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

CONVENTION = (
    "(6*N_nonpositional + 12*L*H*Q*T) FLOPs per token, full (non-causal) attention, no recomputation counted, "
    "over the dense bf16 peak of the chips: the PaLM / nanoGPT convention"
)


def flops_per_token(
    *, num_nonpositional_params: int, num_layers: int, num_heads: int, head_dim: int, seq_len: int, causal: bool = False
) -> int:
    """FLOPs of one token's forward and backward pass: 6*N + 12*L*H*Q*T, or 6*N + 6*L*H*Q*T if causal.

    6*N: a weight takes part in one multiply and one add forward (2), and twice that backward (4: the gradient of its
    input and its own gradient). 12*L*H*Q*T: in each layer a query meets T keys in two products, QK^T and the
    attention-weighted sum of V, of H*Q multiply-adds per key each: 2*2*H*Q*T forward, tripled by the backward pass.
    A causal query sees (T+1)/2 keys on average; the causal figure takes T/2.

    N counts every parameter except a learned position table, which is read, not multiplied. It includes the token
    embedding once: exact when the head is tied to it, an overcount by the size of the lookup table when it is not.
    Biases and norm scales are in N too, where 6 is slightly too many. H counts query heads also when keys and values
    have fewer. Left out: softmax, norms, activations, dropout, the loss, the optimizer, rematerialisation, padding.

    Source: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B; nanoGPT model.py `estimate_mfu`, which leaves
    the position table out of N.
    """
    per_key = 6 if causal else 12
    return 6 * num_nonpositional_params + per_key * num_layers * num_heads * head_dim * seq_len


@dataclass(frozen=True)
class Chip:
    """The words that its device_kind has in it, the dense bf16 peak of one JAX device at the boost clock of its data sheet
    (vendors like to print the 2:4-sparse figure, twice the dense one), and where that figure was published."""

    words: tuple[str, ...]
    peak_flops_per_s: float
    source: str


# First row whose words all appear wins, so a variant stands above its family. Words, not substrings: L4 is in L40S,
# A10 in A100 and H20 in H200. NVIDIA's SXM boards carry no form factor in their name ("NVIDIA H100 80GB HBM3").
CHIPS = (
    Chip(("h100", "pcie"), 756e12, "NVIDIA H100 datasheet: 1,513 TFLOPS sparse"),
    Chip(("h100", "nvl"), 835e12, "NVIDIA H100 datasheet: 1,671 TFLOPS sparse"),
    Chip(("h100",), 989e12, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS sparse"),
    Chip(("h800", "pcie"), 756e12, "NVIDIA H800 datasheet, PCIe: 1,513 TFLOPS sparse"),
    Chip(("h800",), 989e12, "NVIDIA H800 datasheet, SXM: 1,979 TFLOPS sparse"),
    Chip(("h200", "nvl"), 835e12, "NVIDIA H200 datasheet, NVL: 1,671 TFLOPS sparse"),
    Chip(("h200",), 989e12, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS sparse"),
    Chip(("gh200",), 989e12, "NVIDIA GH200 datasheet: 1,979 TFLOPS sparse"),
    Chip(("h20",), 148e12, "NVIDIA H20 datasheet: 148 TFLOPS dense"),
    Chip(("gb200",), 2.5e15, "NVIDIA GB200 NVL72 datasheet: 360 PFLOPS sparse for 72"),
    Chip(("b200",), 2.25e15, "NVIDIA HGX B200 datasheet: 36 PFLOPS sparse for 8"),
    Chip(("a100",), 312e12, "NVIDIA A100 datasheet: 312 TFLOPS dense, SXM and PCIe"),
    Chip(("a800",), 312e12, "NVIDIA A800 datasheet: 312 TFLOPS dense"),
    Chip(("a40",), 149.7e12, "NVIDIA A40 datasheet: 149.7 TFLOPS dense"),
    Chip(("a30",), 165e12, "NVIDIA A30 datasheet: 165 TFLOPS dense"),
    Chip(("a10",), 125e12, "NVIDIA A10 datasheet: 125 TFLOPS dense"),
    Chip(("l40s",), 362.05e12, "NVIDIA L40S datasheet: 362.05 TFLOPS dense"),
    Chip(("l40",), 181.05e12, "NVIDIA L40 datasheet: 181.05 TFLOPS dense"),
    Chip(("l4",), 121e12, "NVIDIA L4 datasheet: 242 TFLOPS sparse"),
    Chip(("rtx", "a6000"), 154.8e12, "NVIDIA Ampere GA102 whitepaper, RTX A6000: 154.8 TFLOPS dense"),
    Chip(("rtx", "6000", "ada"), 364.25e12, "NVIDIA RTX 6000 Ada datasheet: 1,457 TFLOPS sparse fp8"),
    Chip(("rtx", "5090"), 209.5e12, "NVIDIA RTX Blackwell whitepaper, bf16 with f32 accumulate: 209.5 TFLOPS dense"),
    Chip(("rtx", "4090"), 165.2e12, "NVIDIA Ada whitepaper, bf16 with f32 accumulate: 165.2 TFLOPS dense"),
    Chip(("rtx", "3090"), 71e12, "NVIDIA Ampere GA102 whitepaper, bf16 with f32 accumulate: 71 TFLOPS dense"),
    # No bf16 units before Ampere: the fp16 tensor-core peak is the honest ceiling.
    Chip(("v100", "pcie"), 112e12, "NVIDIA V100 datasheet, PCIe, fp16: 112 TFLOPS"),
    Chip(("v100",), 125e12, "NVIDIA V100 datasheet, SXM2, fp16: 125 TFLOPS"),
    Chip(("t4",), 65e12, "NVIDIA T4 datasheet, fp16: 65 TFLOPS"),
    Chip(("tpu", "v6", "lite"), 918e12, "Google Cloud TPU documentation, v6e: 918 TFLOPS"),
    Chip(("tpu", "v5", "lite"), 197e12, "Google Cloud TPU documentation, v5e: 197 TFLOPS"),
    Chip(("tpu", "v5p"), 459e12, "Google Cloud TPU documentation, v5p: 459 TFLOPS"),
    Chip(("tpu", "v5"), 459e12, "Google Cloud TPU documentation, v5p: 459 TFLOPS"),
    Chip(("tpu", "v4"), 275e12, "Google Cloud TPU documentation, v4: 275 TFLOPS"),
)

# A slice of a GPU, or a slower one sold under the same number: no figure is better than a wrong one.
_CUT_DOWN = {"mig", "grid", "laptop", "d"}


def peak_flops_per_s(device_kind: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device named as `jax.Device.device_kind` names it; None if it is not known.

    Example: peak_flops_per_s("NVIDIA H100 80GB HBM3") == 989e12; peak_flops_per_s("cpu") is None.
    """
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    if words & _CUT_DOWN:
        return None
    return next((chip.peak_flops_per_s for chip in CHIPS if words.issuperset(chip.words)), None)


def mfu(
    *, tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float | None, num_devices: int
) -> float | None:
    """Model FLOPs utilisation in 0..1: tokens_per_s of all devices over what their peaks, if known, allow."""
    return tokens_per_s * flops_per_token / (peak_flops_per_s * num_devices) if peak_flops_per_s else None


class StepMeter:
    """Averages step time, tokens per second, MFU and data wait since the previous logged step.

    Call `start` when stepping begins and again after anything that is not a step (compilation, an evaluation, a
    blocking save), so that it is not counted; `wait` when the host had no batch to dispatch; `step` when a step's end is
    seen; `take` to log. A wait counts where it happens, so no record waits longer than its steps took. All times are
    `time.monotonic` seconds. peak_flops_per_s is one device's (None: mfu is None); tokens are those of all devices.
    """

    def __init__(self, *, flops_per_token: float, peak_flops_per_s: float | None, num_devices: int):
        of_chips = dict(peak_flops_per_s=peak_flops_per_s, num_devices=num_devices)
        self._mfu = partial(mfu, flops_per_token=flops_per_token, **of_chips)
        self._last_s: float | None = None
        self._clear()

    def _clear(self) -> None:
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
        self._clear()
        return taken
