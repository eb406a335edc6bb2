"""Files in a bucket (gs://, s3://), read by ranges through tensorstore, which Orbax brings."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlm.config import Problem, UserError


class Stored:
    """A file of `num_items` as an array of which a slice is read when it is asked for, and nothing else is.

    Raises: UserError if it is shorter or longer, or cannot be read, now or later.
    """

    def __init__(self, url: str, num_items: int, dtype: np.dtype):
        self.url, self.num_items, self.dtype = url, num_items, dtype
        self._asked: dict[tuple[int, int], Any] = {}
        end = num_items * dtype.itemsize
        _answer(url, _ask(url, slice(max(end - 1, 0), end)))
        try:
            _ask(url, slice(end, end + 1)).result()
        except ValueError:  # out of range, as it should be
            return
        raise UserError(Problem(url, f"has more than the {end} bytes that its .idx counts", "copy both files anew"))

    def __len__(self) -> int:
        return self.num_items

    def expect(self, start: int, stop: int) -> None:
        """Asks for [start, stop), which comes while others are asked for; the next slice of these bounds takes it."""
        size = self.dtype.itemsize
        self._asked[start, stop] = _ask(self.url, slice(start * size, stop * size))

    def __getitem__(self, part: slice) -> np.ndarray:
        bounds = part.indices(self.num_items)[:2]
        if bounds not in self._asked:
            self.expect(*bounds)
        return np.frombuffer(_answer(self.url, self._asked.pop(bounds)), self.dtype)


def read_whole(url: str) -> np.ndarray:
    """The bytes of a file, uint8[size]. Raises: UserError if there is none, or it cannot be read."""
    return np.frombuffer(_answer(url, _ask(url)), np.uint8)


def _ask(url: str, byte_range: slice | None = None) -> Any:
    import tensorstore  # a moment, for those who read from buckets

    folder, _, name = url.rpartition("/")
    return tensorstore.KvStore.open(f"{folder}/").result().read(name, byte_range=byte_range)


def _answer(url: str, asked: Any) -> bytes:
    try:
        found = asked.result()
        if found.state != "missing":
            return found.value
        rule = "does not exist"
    except Exception as error:  # whatever the store raises
        rule = f"cannot be read: {error}"
    raise UserError(Problem(url, rule, "check the address, the network and your credentials"))
