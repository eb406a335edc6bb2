"""The device mesh: five named axes, slow links outermost, fast links innermost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm.config import MESH_AXES, MeshConfig, Problem, UserError
from jaxlm.parallel.check import check_rules
from jaxlm.parallel.rules import Layout, with_rows


def make_layout(mesh: MeshConfig, devices: Sequence[Any]) -> Layout:
    """The mesh over `devices` with its table of rules. Raises UserError as `make_mesh`, `with_rows` and `check_rules` say."""
    layout = Layout(make_mesh(mesh, devices), with_rows(mesh.rules), mesh.zero, mesh.context_method)
    if problems := check_rules(layout):
        raise UserError(*problems)
    return layout


def make_mesh(mesh: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """A Mesh over all `devices`, in MESH_AXES order. Raises UserError as `mesh_shape` does."""
    shape = tuple(mesh_shape(mesh, num_devices=len(devices)).values())
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(mesh: MeshConfig, *, num_devices: int) -> dict[str, int]:
    """The degree of each axis over `num_devices`, in MESH_AXES order; the axis given as -1 takes what the others leave.

    Raises: UserError if the degrees do not multiply to the number of devices.
    """
    degrees = mesh.degrees
    fixed = math.prod(d for d in degrees.values() if d != -1)
    left, rest = divmod(num_devices, fixed)
    free = [axis for axis in MESH_AXES if degrees[axis] == -1]
    if rest or left == 0 or (left != 1 and not free):
        product = " * ".join(f"{axis}={degrees[axis]}" for axis in MESH_AXES if degrees[axis] not in (1, -1)) or "1"
        remedy = f"choose degrees whose product {'divides' if free else 'is'} {num_devices}, or set one axis to -1"
        if num_devices == 1:
            remedy += "; meshes can be tried on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count=8"
        raise UserError(Problem(f"mesh: {product}", f"does not fill {num_devices} devices", remedy))
    return {axis: left if degrees[axis] == -1 else degrees[axis] for axis in MESH_AXES}
