"""What the loader feeds in each of its modes: tokens a second of wall and of CPU time, from sets in the page cache.

python scripts/bench_loader.py [--modes stateless infill] [--tokens 200000000] [--seq-len 1024] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config, DataConfig, ModelConfig, TrainConfig, derived
from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.data.indexed import IndexedWriter

WEIGHTED = ("0.7:{}/a", "0.3:{}/b")
SENTINELS = dict(fim_rate=0.5, fim_tokens=(257, 258, 259))
MODES: dict[str, dict[str, Any]] = {
    "stateless": {},
    "megatron": dict(order="megatron"),
    "reset_at_eod": dict(reset_at_eod=True, mask_eod_loss=True),
    "best_fit": dict(packing="best_fit"),
    "seq_lens": dict(seq_lens=("256@0",)),
    "mixture": dict(train=WEIGHTED),
    "mixture of megatron": dict(order="megatron", train=WEIGHTED),
    "mixture of best_fit": dict(packing="best_fit", train=WEIGHTED),
    "infill": SENTINELS,
}


def make_set(prefix: Path, *, num_tokens: int, document_tokens: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, dtype="u2") as writer:
        for _ in range(num_tokens // (1 << 20)):
            lengths = np.full((1 << 20) // document_tokens, document_tokens)
            tokens = rng.integers(32, 127, lengths.sum(), dtype=np.uint16)
            tokens[np.cumsum(lengths) - 1] = 256
            writer.add_documents(tokens, lengths=lengths)


def measure(config: Config, folder: Path, *, num_batches: int, threads: int) -> dict[str, float]:
    begin = time.perf_counter()
    loader = training_loader(config, open_corpus(config, folder, print))
    loader.batch(0)
    opened_s = time.perf_counter() - begin
    steps = itertools.count(1)

    def work() -> None:
        while (step := next(steps)) <= num_batches:
            loader.batch(step)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    tokens = num_batches * config.train.batch_size * config.train.seq_len / 1e6
    return dict(opened_s=opened_s, million_tokens_per_s=tokens / wall_s, million_tokens_per_cpu_s=tokens / cpu_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in each of two sets, which are made first")
    parser.add_argument("--document-tokens", type=int, default=700)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="that ask for batches; a run has one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in "ab":
            make_set(Path(folder) / name, num_tokens=options.tokens, document_tokens=options.document_tokens)
        train = TrainConfig(batch_size=options.batch_size, seq_len=options.seq_len, num_steps=options.batches + 1)
        for mode in options.modes:
            given: dict[str, Any] = {"train": ("{}/a",)} | MODES[mode]
            given["train"] = tuple(entry.format(folder) for entry in given["train"])
            data = DataConfig(**given)
            config = derived(Config(model=ModelConfig(vocab_size=260), train=train, data=data))
            result = measure(config, Path(folder), num_batches=options.batches, threads=options.threads)
            print(mode, json.dumps({key: round(value, 2) for key, value in result.items()}), flush=True)


if __name__ == "__main__":
    main()
