"""FLOPs, peaks, MFU and the step meter, against figures worked out by hand or published."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxlm.metrics.text import count_text, duration_text, loss_text
from jaxlm.metrics.throughput import CHIPS, StepMeter, flops_per_token, mfu, peak_flops_per_s

GPT2 = {"num_layers": 12, "num_heads": 12, "head_dim": 64, "seq_len": 1024}


def test_flops_of_gpt2_124m_are_those_worked_out_by_hand():
    token_table = 50257 * 768  # 38,597,376, tied to the head
    attention = 4 * 768 * 768 + 4 * 768  # query, key, value, output
    mlp = 2 * 4 * 768 * 768 + (4 * 768 + 768)
    norms = 2 * 2 * 768
    num_params = token_table + 12 * (attention + mlp + norms) + 2 * 768
    assert num_params + 1024 * 768 == 124_439_808  # GPT-2 small as published, with its position table
    # 6 * 123,653,376 = 741,920,256; 12 * 12 * 12 * 64 * 1024 = 113,246,208
    assert flops_per_token(num_nonpositional_params=num_params, **GPT2) == 741_920_256 + 113_246_208
    assert flops_per_token(num_nonpositional_params=num_params, **GPT2, causal=True) == 741_920_256 + 56_623_104


def test_flops_of_a_row_are_those_that_nanogpt_publishes():
    # nanoGPT transformer_sizing.ipynb prints palm_flops 879894724608 for one row of 1,024, with N = 124337664
    # (there without biases and with the position table).
    assert 1024 * flops_per_token(num_nonpositional_params=124_337_664, **GPT2) == 879_894_724_608


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_a_device_name_finds_the_peak_of_its_own_variant(device_kind, peak):
    assert peak_flops_per_s(device_kind) == peak


def test_no_row_of_the_chip_table_is_hidden_by_an_earlier_one():
    for chip in CHIPS:
        assert peak_flops_per_s(" ".join(chip.words).upper()) == chip.peak_flops_per_s


def test_mfu_counts_all_devices():
    # 1e6 tokens/s * 1e9 FLOPs/token = 1e15 of 8 * 250e12 = 2e15
    assert mfu(tokens_per_s=1e6, flops_per_token=1e9, peak_flops_per_s=250e12, num_devices=8) == 0.5
    assert mfu(tokens_per_s=1e6, flops_per_token=1e9, peak_flops_per_s=None, num_devices=8) is None


def test_meter_averages_over_the_steps_since_the_previous_record():
    meter = StepMeter(flops_per_token=1e9, peak_flops_per_s=1e12, num_devices=2)
    meter.start(time_s=100.0)
    meter.wait(0.5)
    meter.step(time_s=103.0, tokens=1000)
    meter.step(time_s=104.0, tokens=1000)
    # 2 s a step, 500 tokens/s, 5e11 of 2e12 FLOP/s, a quarter second of waiting a step
    assert meter.take() == {"step_time_s": 2.0, "tokens_per_s": 500.0, "mfu": 0.25, "data_wait_s": 0.25}
    meter.step(time_s=105.0, tokens=1000)
    assert meter.take()["step_time_s"] == 1.0


def test_meter_leaves_out_what_happens_before_a_start():
    meter = StepMeter(flops_per_token=1e9, peak_flops_per_s=None, num_devices=1)
    meter.start(time_s=0.0)
    meter.step(time_s=1.0, tokens=1000)
    meter.start(time_s=61.0)  # an evaluation took a minute
    meter.step(time_s=62.0, tokens=1000)
    assert meter.take() == {"step_time_s": 1.0, "tokens_per_s": 1000.0, "mfu": None, "data_wait_s": 0.0}


def test_numbers_read_as_people_write_them():
    assert [count_text(n) for n in (0, 9_999, 10_000, 123_456, 999_600, 1.2e9, 3e15)] == [
        "0", "9,999", "10.0k", "123k", "1.00M", "1.20B", "3,000T",
    ]  # fmt: skip
    assert [duration_text(s) for s in (0, 59.6, 3_725, 400_000)] == ["0:00:00", "0:01:00", "1:02:05", "111:06:40"]
    assert [loss_text(x) for x in (2.700000047683716, 0.1, float("nan"), 1e300)] == ["2.7", "0.1", "nan", "1e+300"]


def test_the_room_loads_no_device_library():
    check = "import sys, jaxlm.report, jaxlm.metrics.progress, jaxlm.metrics.throughput; " + (
        "print(sorted({'jax', 'tensorflow', 'clu', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"
