"""Dense bf16 peak of each chip, by the name under which JAX reports it.

Vendors like to print the 2:4-sparse figure, twice the dense one; this table holds the dense one, in FLOP/s of one JAX
device, at the boost clock of the data sheet, with f32 accumulation where a GeForce card distinguishes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A row: the words its device_kind has in it, its peak in FLOP/s, where that figure was published."""

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
