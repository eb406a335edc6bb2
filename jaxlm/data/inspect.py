"""The command that shows documents of a token set as text.

python -m jaxlm.data.inspect sets/corpus_text_document 3 --tokenizer gpt2:gpt2        prints the first three
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.settings import Parser, run_main


def document(dataset: IndexedDataset, number: int) -> np.ndarray:
    """The tokens of a document, of all its sequences."""
    start, stop = dataset.first_tokens(dataset.document_indices[number : number + 2]).tolist()
    return dataset.tokens[start:stop]


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m jaxlm.data.inspect", description="Show documents of a token set as text.")
    parser.add_argument("prefix", metavar="PREFIX", help="path of the set without .bin or .idx")
    parser.add_argument("count", metavar="N", type=int, nargs="?", default=1, help="how many documents (default: 1)")
    parser.add_argument("--tokenizer", metavar="SPEC", help="what the set was made with (default: ids are shown)")
    parser.add_argument("--start", metavar="K", type=int, default=0, help="the first of them, from 0 (default: 0)")
    options = parser.parse_args(argv)
    dataset = IndexedDataset(options.prefix)
    if not 0 <= options.start < dataset.num_documents:
        rule = f"there are {dataset.num_documents} documents, from 0 on"
        raise UserError(Problem(f"--start {options.start}", rule, "choose one of them"))
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    for number in range(options.start, min(options.start + options.count, dataset.num_documents)):
        tokens = document(dataset, number)
        print(f"--- document {number}: {len(tokens):,} tokens")
        print(tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens.tolist())))
    return 0


if __name__ == "__main__":
    run_main(main)
