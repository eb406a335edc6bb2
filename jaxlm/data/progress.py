"""How far a tokenization is: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Progress:
    """Counts bytes read of `total_bytes` on disk and shows them with speed and time left; `log` gets whole lines."""

    def __init__(self, *, total_bytes: int, log: Callable[[str], object], bar: bool):
        self.total_bytes = total_bytes
        self._read_bytes = 0
        self._start_s = self._line_s = time.perf_counter()
        self._log = log
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="read", leave=False) if bar else None

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s

    def read(self, raw: bytes) -> None:
        """Note that `raw` came from disk."""
        self._read_bytes += len(raw)

    def written(self, *, documents: int, tokens: int, text_bytes: int) -> None:
        """Note the totals so far, of tokens in the set and of uncompressed input."""
        speed = f"{text_bytes / 1e6 / max(self.elapsed_s, 1e-9):.1f} MB/s of text"
        counts = f"{documents:,} documents, {tokens:,} tokens"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{speed}, {counts}", refresh=False)
            self._bar.update(self._read_bytes - self._bar.n)
        elif time.perf_counter() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.perf_counter()
            left_s = max(self.elapsed_s * (self.total_bytes / max(self._read_bytes, 1) - 1), 0)
            share = f"{self._read_bytes / 1e6:.1f} of {self.total_bytes / 1e6:.1f} MB read"
            self._log(f"{share}, {speed}, {counts}, about {left_s:.0f} s left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
