from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.loader import Ramp, in_force


def megatron_sizes(final: int, start: int, increment: int, samples: int, steps: int) -> list[int]:
    """Batch sizes step by step, from the samples consumed before each, as Megatron counts."""
    num = (final - start) // increment
    sizes, consumed = [], 0
    for _ in range(steps):  # in whole numbers: Megatron divides in floating point, which is one size late now and then
        size = final if consumed > samples or samples == 0 else start + consumed * num // samples * increment
        sizes.append(min(size, final))
        consumed += sizes[-1]
    return sizes


@settings(deadline=None)
@given(start=st.integers(1, 50), increment=st.integers(1, 20), num=st.integers(1, 10), samples=st.integers(0, 4000))
def test_batches_grow_as_megatrons_do(start: int, increment: int, num: int, samples: int) -> None:
    final = start + increment * num
    ramp = Ramp(final, start, increment, samples)
    sizes = megatron_sizes(final, start, increment, samples, 200)
    assert [ramp.size(step) for step in range(200)] == sizes
    assert [ramp.before(step) for step in range(200)] == [0, *itertools.accumulate(sizes)][:200]


def test_blooms_ramp() -> None:
    ramp = Ramp(2048, 192, 16, 9_765_625)
    assert (ramp.size(0), len(ramp.stages), ramp.size(10**6)) == (192, 117, 2048)
    first, before, _ = ramp.stages[-1]
    assert ramp.size(first - 1) == 2032 and 9_765_625 <= before < 9_765_625 + 2048
    assert ramp.before(first + 10**9) == before + 2048 * 10**9
    assert Ramp(8).before(7) == 56 and Ramp(8).size(0) == 8


def test_rows_lengthen_at_their_steps() -> None:
    lengths = ((2, 64), (5, 128))
    assert [in_force(lengths, step, 0) for step in (0, 1, 2, 4, 5, 10**9)] == [0, 0, 64, 64, 128, 128]
