"""What a layout costs, as its tables show it: collectives by mesh axis, parameters by layout."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxlm.feed import put_batch
from jaxlm.header import layout_text
from jaxlm.parallel.describe import (
    Parameter,
    bytes_a_device,
    bytes_text,
    collectives_table,
    communication_summary,
    parameter_table,
)
from jaxlm.parallel.hlo import Collective, collectives
from jaxlm.step import compile_step, init_state, make_program

GOLDEN = """\
collective  over  times a step  bytes a device
all               0                        0 B

parameter                    computing          at rest                    bytes a device
embed.positions              [16, 24]           f32[16, 24@fsdp]                    768 B
embed.tokens                 [64@model, 24]     f32[64@model, 24@fsdp]           1.50 KiB
final_norm.bias              [24]               f32[24]                              96 B
final_norm.scale             [24]               f32[24]                              96 B
layers.*.attn.key x2         [24, 2@model, 12]  f32[24@fsdp, 2@model, 12]        1.12 KiB
layers.*.attn.key_bias x2    [2@model, 12]      f32[2@model, 12]                     96 B
layers.*.attn.out x2         [2@model, 12, 24]  f32[2@model, 12, 24@fsdp]        1.12 KiB
layers.*.attn.out_bias x2    [24]               f32[24]                             192 B
layers.*.attn.query x2       [24, 2@model, 12]  f32[24@fsdp, 2@model, 12]        1.12 KiB
layers.*.attn.query_bias x2  [2@model, 12]      f32[2@model, 12]                     96 B
layers.*.attn.value x2       [24, 2@model, 12]  f32[24@fsdp, 2@model, 12]        1.12 KiB
layers.*.attn.value_bias x2  [2@model, 12]      f32[2@model, 12]                     96 B
layers.*.attn_norm.bias x2   [24]               f32[24]                             192 B
layers.*.attn_norm.scale x2  [24]               f32[24]                             192 B
layers.*.mlp.down x2         [96@model, 24]     f32[96@model, 24@fsdp]           4.50 KiB
layers.*.mlp.down_bias x2    [24]               f32[24]                             192 B
layers.*.mlp.up x2           [24, 96@model]     f32[24@fsdp, 96@model]           4.50 KiB
layers.*.mlp.up_bias x2      [96@model]         f32[96@model]                       384 B
layers.*.mlp_norm.bias x2    [24]               f32[24]                             192 B
layers.*.mlp_norm.scale x2   [24]               f32[24]                             192 B
16,416 parameters: 17.7 KiB a device; optimizer state: 35.4 KiB a device
"""


def test_the_collectives_of_a_training_step_have_their_axes():
    layout = tiny.layout(8, data=2, fsdp=2, model=2)
    config = tiny.config(num_layers=2, num_heads=2, train=dict(accumulate=2))
    program = make_program(config, layout)
    state, batch = init_state(program), put_batch(program, tiny.batch(config))
    found = collectives(compile_step(program).lower(state, batch).compile().as_text(), layout.mesh)
    assert {("all-gather", ("fsdp",)), ("all-reduce", ("model",))} <= {(c.kind, c.axes) for c in found}
    assert all(c.is_counted and "?" not in c.axes for c in found)
    assert "all-gather fsdp" in " ".join(layout_text(program, found).split())
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state.params))
    assert f" parameters: {bytes_text(held)} a device" in layout_text(program, found)
    sizes = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state.opt_state)]
    assert bytes_a_device(state.opt_state) == sum(sizes) < sum(a.nbytes for a in jax.tree.leaves(state.opt_state))


def test_the_table_of_collectives():
    found = [
        Collective("all-reduce", ("data", "fsdp"), 1 << 20, 1),
        Collective("all-gather", ("fsdp",), 3000, 24),
        Collective("all-gather", ("fsdp",), 100, 2),
        Collective("all-gather", ("data",), 7, 1),
    ]
    table = """\
collective  over       times a step  bytes a device
all-gather  data       1                        7 B
all-gather  fsdp       26                  70.5 KiB
all-reduce  data+fsdp  1                   1.00 MiB
all                    28                  1.07 MiB"""
    assert collectives_table(found) == collectives_table(reversed(found)) == table
    top = "1.07 MiB a device and step: 1 all-reduce over data+fsdp, 26 all-gather over fsdp, 1 more"
    assert communication_summary(found, shown=2) == top
    assert communication_summary([]) == "0 B a device and step: nothing"


def test_the_table_of_parameters_of_a_tiny_model():
    program = make_program(tiny.config(num_heads=2, num_layers=2), tiny.layout(4, data=1, fsdp=2, model=2))
    assert layout_text(program, []) == GOLDEN


def test_layers_that_differ_keep_their_own_rows():
    layout = tiny.layout(4, data=1, fsdp=2, model=2)
    same = [Parameter(f"layers.{i}.w", (8, 4), ("embed", "mlp")) for i in range(3)]
    assert "layers.*.w x3  [8, 4@model]  f32[8@fsdp, 4@model]            96 B" in parameter_table(
        same, layout, optimizer_bytes=0
    )
    assert "x3  [8, 4]     f32[8@fsdp, 4] " in parameter_table(same, tiny.layout(2, data=1, fsdp=2), optimizer_bytes=0)
    mixed = [*same[:2], Parameter("layers.2.w", (8, 4), ("embed", "mlp"), jnp.bfloat16)]
    table = parameter_table(mixed, layout, optimizer_bytes=2048).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["layers.0.w", "layers.1.w", "layers.2.w"]
    assert "bf16[8@fsdp, 4@model]" in table[3] and table[3].endswith(" 16 B")
    assert table[4] == "96 parameters: 80 B a device; optimizer state: 2.00 KiB a device"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (12_900_000, "12.3 MiB"),
        (104_805_000, "99.9 MiB"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_bytes_as_people_read_them(size, text):
    assert bytes_text(size) == text
