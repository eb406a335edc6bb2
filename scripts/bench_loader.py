"""What the loader feeds: tokens a second of wall and of CPU time, from a set in the page cache.

python scripts/bench_loader.py [--tokens 200000000] [--seq-len 1024] [--batch-size 512] [--order megatron] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from jaxlm.config import Config, DataConfig, ModelConfig, TrainConfig, derived
from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.data.indexed import IndexedWriter


def make_set(prefix: Path, *, num_tokens: int, document_tokens: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, dtype="u2") as writer:
        for _ in range(num_tokens // (1 << 20)):
            lengths = np.full((1 << 20) // document_tokens, document_tokens)
            tokens = rng.integers(0, 256, lengths.sum(), dtype=np.uint16)
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
    tokens = num_batches * config.train.batch_size * config.train.seq_len
    return dict(opened_s=opened_s, tokens_per_s=tokens / wall_s, tokens_per_cpu_s=tokens / cpu_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in the set, which is made first")
    parser.add_argument("--document-tokens", type=int, default=700)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--order", default="stateless")
    parser.add_argument("--packing", default="none")
    parser.add_argument("--reset-at-eod", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="that ask for batches; a run has one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder) / "set", num_tokens=options.tokens, document_tokens=options.document_tokens)
        data = DataConfig(
            train=(f"{folder}/set",), order=options.order, packing=options.packing, reset_at_eod=options.reset_at_eod
        )
        train = TrainConfig(batch_size=options.batch_size, seq_len=options.seq_len, num_steps=options.batches)
        config = derived(Config(model=ModelConfig(vocab_size=257), train=train, data=data))
        result = measure(config, Path(folder), num_batches=options.batches, threads=options.threads)
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
