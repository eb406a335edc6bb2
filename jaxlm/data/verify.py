"""The command that reads token sets whole and says whether they are sound.

python -m jaxlm.data.verify sets/corpus_text_document --vocab-size 50257
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset
from jaxlm.settings import Parser, run_main

_BLOCK_TOKENS = 1 << 22


def verify(prefix: str, *, vocab_size: int | None = None) -> str:
    """Reads every byte of a set; what is in it, with checksums, in lines.

    Raises: UserError naming file and offset if index and data disagree with the format or each other, or a token is
    negative or not below `vocab_size`.
    """
    dataset = IndexedDataset(prefix)
    limit = vocab_size if vocab_size is not None else 2**31
    digest = hashlib.sha256()
    max_token = -1
    for start in range(0, dataset.num_tokens, _BLOCK_TOKENS):
        block = dataset.tokens[start : start + _BLOCK_TOKENS]
        digest.update(block.view(np.uint8).data)
        max_token = max(max_token, int(block.max()))
        if max_token >= limit or int(block.min()) < 0:
            position = start + int(np.argmax((block >= limit) | (block < 0)))
            where = f"{prefix}.bin, token {position} (byte {position * dataset.dtype.itemsize})"
            rule = f"token id {int(block[position - start])} is not in [0, {limit})"
            raise UserError(Problem(where, rule, "tokenize again, or give the vocabulary size the set was made with"))
    counts = f"{dataset.num_documents:,} documents, {len(dataset):,} sequences, {dataset.num_tokens:,} tokens"
    return (
        f"{prefix}: sound; {counts} of {dataset.dtype.name}, largest id {max_token}\n"
        f"  sha256 .bin {digest.hexdigest()}\n"
        f"  sha256 .idx {hashlib.sha256(dataset.index_bytes.data).hexdigest()}"
    )


def main(argv: Sequence[str]) -> int:
    """Every set is read, whatever is wrong with others."""
    description = "Read token sets whole: header, sizes, offsets, every token. Exit codes: 0 all sound; 2 not."
    parser = Parser(prog="python -m jaxlm.data.verify", description=description)
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="path of a set without .bin or .idx")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="every token must be below V (default: 2^31)")
    options = parser.parse_args(argv)
    problems: list[Problem] = []
    for prefix in options.prefix:
        try:
            print(verify(prefix, vocab_size=options.vocab_size), flush=True)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return 0


if __name__ == "__main__":
    run_main(main)
