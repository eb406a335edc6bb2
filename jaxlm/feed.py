"""Batches on their devices: which rows this process reads, and how they get where a step wants them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from jaxlm.data.loader import Batch, Loader
from jaxlm.step import Program, batch_sharding


def abstract_batch(program: Program, shape: tuple[int, int]) -> Batch:
    """A batch of rows and their tokens, without its content."""
    dtypes = Batch(np.int32, np.int32, np.float32, np.int32 if program.config.data.separates else None)
    return jax.tree.map(lambda d: jax.ShapeDtypeStruct(shape, d, sharding=batch_sharding(program)), dtypes)


def row_share(program: Program, devices: Collection[Any] | None = None) -> tuple[int, int]:
    """(which, of how many) of the even parts of a batch's rows has all that `devices` hold (None: this process's own).

    It is not the number of the process: those along a pipeline, or that share rows by position, hold the same rows.
    """
    shards = program.layout.num_row_shards
    held = batch_sharding(program).devices_indices_map((shards, program.config.train.seq_len))
    mine = [device for device in held if device.process_index == jax.process_index()] if devices is None else devices
    rows = {held[device][0].indices(shards)[0] for device in mine}
    even = (n for n in range(shards, 0, -1) if shards % n == 0)
    parts, hosts = next((found, n) for n in even if len(found := {row * n // shards for row in rows}) == 1)
    return parts.pop(), hosts


def feed(program: Program, loader: Loader, step: int) -> Batch:
    """The batch of a step on its devices; of its rows this process reads those that its own devices hold."""
    host, hosts = row_share(program)
    return put_batch(program, loader.batch(step, host=host, hosts=hosts), host=host, hosts=hosts)


def put_batch(program: Program, batch: Batch, *, host: int = 0, hosts: int = 1) -> Batch:
    """The batch on its devices, rows and positions split as the table has it; `batch` is part `host` of its rows."""
    sharding = batch_sharding(program)

    def put(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        shape, first = (len(rows) * hosts, *rows.shape[1:]), len(rows) * host
        held = sharding.addressable_devices_indices_map(shape)
        places = [(index[0].indices(shape[0]), index[1:]) for index in held.values() if index is not None]
        parts = [rows[start - first : stop - first, *within] for (start, stop, _), within in places]
        return jax.make_array_from_single_device_arrays(shape, sharding, jax.device_put(parts, list(held)))

    return jax.tree.map(put, batch)
