"""Each host reads the rows that its devices hold, and together they have the batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.data.loader import Loader, Ramp
from jaxlm.data.samples import Windows, whole
from jaxlm.feed import abstract_batch, feed, row_share
from jaxlm.step import batch_sharding, make_program

# mesh, and of how many parts each of 1, 2, 4 and 8 hosts reads one
MESHES = [
    (dict(data=8), (1, 2, 4, 8)),
    (dict(data=2, fsdp=2, model=2), (1, 2, 4, 4)),  # two of 8 hosts hold the same rows
    (dict(data=2, context=4), (1, 2, 2, 2)),
    (dict(pipeline=2, data=4), (1, 1, 2, 4)),  # of 2 hosts each has a stage of every row
    (dict(pipeline=2, model=4), (1, 1, 1, 1)),
]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    prefix = tmp_path_factory.mktemp("feed") / "set"
    with IndexedWriter(prefix, dtype="u2") as writer:
        for k in range(40):
            writer.add_document([*range(k, k + 18), 60])
    samples = Windows([whole(IndexedDataset(prefix))], seq_len=16, seed=1, shuffle=True)
    return Loader(samples, Ramp(16, 8, 8, 16), eod=60, vocab_size=61, separates=True, lengths=((3, 8),))


@pytest.mark.parametrize(("mesh", "parts"), MESHES, ids=str)
def test_every_device_of_1_2_4_or_8_hosts_gets_its_rows_of_the_same_batch(
    loader: Loader, mesh: dict, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(train=dict(batch_size=16), num_layers=2, embed_dim=32, num_heads=8)
    config = tiny.replace(config, data=dict(reset_at_eod=True), pipeline=dict(microbatches=2))
    program = make_program(config, tiny.layout(8, **({"data": 1} | mesh)))
    read: list[tuple[int, int]] = []
    batch = loader.batch

    def counted(step: int, *, host: int = 0, hosts: int = 1):
        read.append((host, hosts))
        return batch(step, host=host, hosts=hosts)

    for step in (0, 3):  # 8 rows of 16, then 32 rows of 8
        whole_batch = loader.batch(step)
        on_devices = feed(program, loader, step)
        like = abstract_batch(program, loader.shape(step))
        for x, want, placed in zip(whole_batch, like, on_devices, strict=True):
            assert np.array_equal(x, placed) and placed.sharding == batch_sharding(program)
            assert (placed.shape, placed.dtype) == (want.shape, want.dtype)
        for hosts, expected in zip((1, 2, 4, 8), parts, strict=True):
            monkeypatch.setattr(loader, "batch", counted)
            for host in range(hosts):
                mine = list(program.layout.mesh.devices.flat)[host * 8 // hosts : (host + 1) * 8 // hosts]
                as_host(monkeypatch, mine)
                for x, found in zip(whole_batch, feed(program, loader, step), strict=True):
                    for index, piece in found:
                        assert np.array_equal(piece, x[index]) and piece.size
                assert read[-1][1] == expected
            monkeypatch.undo()
            assert {which for which, _ in read[-hosts:]} == set(range(expected))  # together they read all


def as_host(monkeypatch: pytest.MonkeyPatch, devices: list) -> None:
    """What `feed` does in a process that has `devices`; its arrays are [(index, piece)]."""

    def held(sharding: jax.sharding.Sharding, shape: tuple) -> dict:
        return {device: at for device, at in sharding.devices_indices_map(shape).items() if device in devices}

    def put(shape: tuple, sharding: jax.sharding.Sharding, pieces: list) -> list:
        return list(zip(held(sharding, shape).values(), pieces, strict=True))

    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", held)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", put)
    monkeypatch.setattr("jaxlm.feed.row_share", lambda program: row_share(program, devices))
