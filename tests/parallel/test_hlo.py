"""The collectives read from HLO are those that were written, in every notation XLA prints and in compiled programs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxlm.parallel.describe import collectives_table, communication_bytes, communication_summary
from jaxlm.parallel.hlo import Collective, collectives

AXES = ("pipeline", "data", "fsdp", "context", "model")


def mesh(pipeline=1, data=1, fsdp=1, context=1, model=1) -> Mesh:
    degrees = (pipeline, data, fsdp, context, model)
    devices = np.asarray(jax.devices()[: math.prod(degrees)]).reshape(degrees)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


CUBE = dict(data=2, fsdp=2, model=2)  # device ids: 4*data + 2*fsdp + model
SUM = "use_global_device_ids=true, to_apply=%add"


def module(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
{more}
ENTRY %main_spmd (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0}} parameter(0), sharding={{devices=[8,1]<=[8]}}
{body}
}}
"""


def only(text: str, **degrees: int) -> Collective:
    (found,) = collectives(text, mesh(**(degrees or CUBE)))
    return found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("{{6,7},{1,0},{2,3},{5,4}}", ("model",)),  # any order
        ("{{0,1,4,5},{2,3,6,7}}", ("data", "model")),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "model")),
        ("{}", ("data", "fsdp", "model")),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),  # diagonals
        ("{{0,1},{2,3}}", ("?",)),  # half of the devices
        ("{{0,1,2},{3,4},{5,6,7}}", ("?",)),
        ("{{0,9},{1,8},{2,3},{4,5}}", ("?",)),  # not of this mesh
        ("a notation of tomorrow", ("?",)),
        ("[4,2]<=[8]", ("model",)),
        ("[1,8]<=[8]", ("data", "fsdp", "model")),
        ("[4,2]<=[4,2]", ("model",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "model")),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("mesh['pipeline'=1,'data'=2,'fsdp'=2,'context'=1,'model'=2] {'fsdp'}", ("fsdp",)),
        ("mesh['pipeline'=1,'data'=2,'fsdp'=2,'context'=1,'model'=2] {'data','model'}", ("data", "model")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("model",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2}", ("data",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", ("fsdp",)),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("data", "model")),
        ("mesh['a'=8] {'a':(2)4}", ("fsdp", "model")),
        ("mesh[a=4,b=2] {a:(2)2,b}", ("fsdp", "model")),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}", ("model",)),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", ("model",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp")),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",)),
        ("mesh['axis_0'=3,'axis_1'=3] {'axis_0'}", ("?",)),
    ],
)
def test_replica_groups_in_every_notation(groups, axes):
    line = f"%r = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, {SUM}"
    assert only(module(line)) == Collective("all-reduce", axes, 128, 1)


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
        "replica_groups=[8,1]<=[8]",
        "replica_groups=mesh['pipeline'=1,'data'=8] {'pipeline'}",
        "replica_groups=mesh['data'=8] {}",
        "replica_groups={{0}}",  # of replicas, with no channel: there is one
    ],
)
def test_a_collective_of_one_device_is_none(groups):
    assert collectives(module(f"%r = f32[4,8] all-reduce(%p), {groups}, {SUM}"), mesh(**CUBE)) == []


def test_replica_ids_of_a_program_of_one_replica_mean_all_devices():
    assert only(module("%r = f32[4,8] all-reduce(%p), channel_id=1, replica_groups={{0}}, to_apply=%add")).axes == (
        "data", "fsdp", "model",
    )  # fmt: skip
    line = "%r = f32[4,8] all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"
    assert only(module(line)) == Collective("all-to-all", ("model",), 128, 1)


def test_ids_are_positions_in_the_mesh_and_not_device_ids():
    turned = Mesh(np.asarray(jax.devices())[::-1].reshape(1, 2, 2, 1, 2), AXES)
    line = f"%r = f32[4,8] all-reduce(%p), channel_id=1, replica_groups={{{{0,2}},{{1,3}},{{4,6}},{{5,7}}}}, {SUM}"
    assert collectives(module(line), turned)[0].axes == ("fsdp",)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}", ("fsdp",)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("model",)),  # one way, nothing comes round
        ("{{0,0},{0,4},{1,5},{3,3}}", ("data",)),  # a pair with itself stays at home
        ("{{0,3},{3,0}}", ("fsdp", "model")),
        ("{{0,2},{2,4},{4,6},{6,0}}", ("data", "fsdp")),  # a ring over both
        ("{{0,0},{1,1}}", None),
        ("{}", None),
    ],
)
def test_a_permute_runs_over_the_axes_its_pairs_cross(pairs, axes):
    line = f"%r = f32[4,8]{{1,0}} collective-permute(%p), channel_id=1, source_target_pairs={pairs}"
    want = [] if axes is None else [Collective("collective-permute", axes, 128, 1)]
    assert collectives(module(line), mesh(**CUBE)) == want


GROUPS = "channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true"


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        (f"%r = f32[8,8]{{1,0}} all-gather(%p), {GROUPS}, dimensions={{0}}", "all-gather", 256),
        (f"%r = f32[2,8]{{1,0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add", "reduce-scatter", 128),
        (f"%r = bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}} all-reduce(%p), {GROUPS}, to_apply=%add", "all-reduce", 128),
        (f"%r = (f32[4,8]{{1,0}}, /*index=1*/s8[3]{{0}}) all-reduce(%p, /*index=1*/%q), {GROUPS}", "all-reduce", 131),
        (f"%r = (f32[4,4], f32[4,4]) all-to-all(%h, %i), {GROUPS}", "all-to-all", 128),
        (f"%r = pred[4,<=8] all-gather(%c), {GROUPS}", "all-gather", 32),
        (f"%r = f8e4m3fn[64] all-gather(%e), {GROUPS}", "all-gather", 64),
        (f"%r = s4[9] all-gather(%b), {GROUPS}", "all-gather", 5),
        (f"%r = f32[4,8] all-reduce(f32[4,8]{{1,0}} %p), {GROUPS}", "all-reduce", 128),
    ],
)
def test_the_payload_is_the_larger_of_operands_and_results(line, kind, size):
    shapes = dict(q="s8[3]", h="f32[4,4]", i="f32[4,4]", c="pred[1,8]", e="f8e4m3fn[8]", b="s4[3]")
    operands = [f"%{name} = {shape} iota()" for name, shape in shapes.items()]
    assert only(module(*operands, line)) == Collective(kind, ("model",), size, 1)


@pytest.mark.parametrize(
    ("start", "kind", "done", "size"),
    [
        ("(f32[4,8], f32[8,8])", "all-gather", "f32[8,8]", 256),  # jax 0.10
        ("((f32[4,8]{1,0}), f32[8,8]{1,0})", "all-gather", "f32[8,8]{1,0}", 256),  # jax 0.11 and later
        ("f32[4,8]", "all-reduce", "f32[4,8]", 128),
        ("((f32[4,8]), f32[4,8])", "all-reduce", "f32[4,8]", 128),
        ("((f32[4,8]), f32[2,8], u32[])", "reduce-scatter", "f32[2,8]", 128),
        ("((f32[4,8]), f32[4,8], u32[])", "all-to-all", "f32[4,8]", 128),
        ("(f32[4,8], f32[4,8], u32[], u32[])", "collective-permute", "f32[4,8]", 128),
    ],
)
def test_an_asynchronous_pair_counts_once(start, kind, done, size):
    over = "source_target_pairs={{0,1},{1,0}}" if kind == "collective-permute" else "replica_groups=[4,2]<=[8]"
    text = module(
        f"%start.1 = {start} {kind}-start(%p), channel_id=1, {over}, {SUM}",
        f"ROOT %done.1 = {done} {kind}-done(%start.1)",
    )
    assert only(text) == Collective(kind, ("model",), size, 1)


def test_an_asynchronous_computation_counts_once():
    wrapped = """
%async_computation (q: f32[4,8]) -> f32[2,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %rs = f32[2,8]{1,0} reduce-scatter(%q), GROUPS, dimensions={0}, to_apply=%add
}, execution_thread="parallel"
""".replace("GROUPS", GROUPS)
    text = module(
        "%s = ((f32[4,8]), f32[2,8]) async-start(%p), calls=%async_computation",
        "%u = ((f32[4,8]), f32[2,8]) async-update(%s), calls=%async_computation",
        "ROOT %d = f32[2,8] async-done(%u), calls=%async_computation",
        more=wrapped,
    )
    assert only(text) == Collective("reduce-scatter", ("model",), 128, 1)


LOOPS = """
%inner (t: f32[4,8]) -> f32[4,8] {
  %t = f32[4,8] parameter(0)
  ROOT %r = f32[4,8] all-reduce(%t), GROUPS, to_apply=%add, metadata={op_name="jit(f)/psum"}
}
%less (t: f32[4,8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}
%branch (t: f32[4,8]) -> f32[4,8] {
  %t = f32[4,8] parameter(0)
  ROOT %g = f32[8,8] all-gather(%t), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true
}
%outer (t: f32[4,8]) -> f32[4,8] {
  %t = f32[4,8] parameter(0)
  %v = f32[4,8] while(%t), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %k = f32[4,8] call(%v), to_apply=%called
  ROOT %w = f32[4,8] conditional(%i, %v, %v), branch_computations={%branch, %inner}
}
%called (t: f32[4,8]) -> f32[4,8] {
  %t = f32[4,8] parameter(0)
  ROOT %g.2 = f32[4,8] fusion(%t), kind=kCustom, calls=%inner
}
%never (t: f32[4,8]) -> f32[4,8] {
  %t = f32[4,8] parameter(0)
  ROOT %n = f32[4,8] all-reduce(%t), replica_groups={}, to_apply=%add
}
""".replace("GROUPS", GROUPS)


def test_loops_multiply_and_calls_and_branches_count_like_their_caller():
    line = 'ROOT %w = f32[4,8] while(%p), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"5"}}'
    assert collectives(module(line, more=LOOPS), mesh(**CUBE)) == [
        Collective("all-reduce", ("model",), 128, 5 * (3 + 1 + 1)),
        Collective("all-gather", ("data",), 256, 5),
    ]


def test_a_loop_of_unknown_length_counts_one_trip_and_says_so():
    found = collectives(module("ROOT %w = f32[4,8] while(%p), condition=%less, body=%outer", more=LOOPS), mesh(**CUBE))
    assert [(c.times, c.is_counted) for c in found] == [(5, False), (1, False)]
    assert "5+" in collectives_table(found) and "trip count is not known" in collectives_table(found)
    assert communication_summary(found) == "896 B a device and step: 5+ all-reduce over model, 1+ all-gather over data"


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule empty", mesh(**CUBE))


# Compiled programs on eight devices.
ALL = PartitionSpec(("data", "fsdp", "model"))
X = (16, 8)  # f32[16@data,fsdp,model  8]: 2 rows of 32 bytes on each device


def compiled(local, ins: Any = ALL, outs: Any = ALL) -> list[Collective]:
    f = jax.shard_map(local, mesh=mesh(**CUBE), in_specs=ins, out_specs=outs, check_vma=False)
    text = jax.jit(f).lower(jax.ShapeDtypeStruct(X, jnp.float32)).compile().as_text()
    assert text
    return collectives(text, mesh(**CUBE))


@pytest.mark.parametrize(
    "axes", [("data",), ("fsdp",), ("model",), ("data", "fsdp"), ("data", "model"), ("fsdp", "model"), AXES]
)
def test_a_sum_over_any_axes_of_the_mesh(axes):
    wanted = tuple(axis for axis in axes if axis in CUBE)
    (found,) = compiled(lambda x: lax.psum(x, axes))
    assert (found.kind, found.axes, found.bytes, found.times) == ("all-reduce", wanted, 64, 1)


@pytest.mark.parametrize("axis", ["data", "fsdp", "model"])
def test_every_collective_over_any_axis(axis):
    def facts(local, ins: Any = ALL, outs: Any = ALL):
        return [(c.kind, c.axes, c.bytes, c.times) for c in compiled(local, ins, outs)]

    whole = PartitionSpec()
    assert facts(lambda x: lax.all_gather(x, axis, tiled=True)) == [("all-gather", (axis,), 128, 1)]
    assert facts(lambda x: lax.psum_scatter(x, axis, tiled=True), whole, whole) == [("reduce-scatter", (axis,), 512, 1)]
    assert facts(lambda x: lax.all_to_all(x, axis, 1, 0, tiled=True)) == [("all-to-all", (axis,), 64, 1)]
    assert facts(lambda x: lax.ppermute(x, axis, [(0, 1), (1, 0)])) == [("collective-permute", (axis,), 64, 1)]
    both = [(axis,), (axis,)]
    found = compiled(lambda x: lax.psum((x, x[0] * 2), axis), ALL, (ALL, ALL))
    assert communication_bytes(found) == 64 + 32 and [c.axes for c in found] in (both, both[:1])


def test_a_scan_multiplies_by_its_length_and_nested_scans_by_both():
    def inner(x, _):
        return lax.psum(x, "model") * 0.5, None

    def outer(x, _):
        x = lax.all_gather(x, "fsdp", tiled=True)[:2]
        return lax.scan(inner, x, None, length=3)[0], None

    found = compiled(lambda x: lax.scan(outer, lax.psum(x, "data"), None, length=5)[0])
    assert {(c.kind, c.axes, c.bytes, c.times, c.is_counted) for c in found} == {
        ("all-reduce", ("data",), 64, 1, True),
        ("all-gather", ("fsdp",), 128, 5, True),
        ("all-reduce", ("model",), 64, 15, True),
    }
    assert communication_bytes(found) == 64 + 5 * 128 + 15 * 64


def test_a_loop_that_depends_on_data_is_not_counted():
    found = compiled(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: lax.psum(x, "model"), x))
    assert [(c.axes, c.times, c.is_counted) for c in found] == [(("model",), 1, False)]
