"""The command that joins token sets into one, in the order given.

python -m jaxlm.data.merge sets/a_text_document sets/b_text_document --output-prefix sets/both
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset, IndexedWriter, refuse_existing
from jaxlm.settings import Parser, run_main

_BLOCK_DOCUMENTS = 1 << 12


def merge(prefixes: Sequence[str], output: str) -> None:
    """Write the documents of all sets to `output`, a block at a time.

    Raises: UserError if a set is malformed, or the dtypes of two differ.
    """
    sets = [IndexedDataset(prefix) for prefix in prefixes]
    for other in sets[1:]:
        if other.dtype != sets[0].dtype:
            rule = f"holds {other.dtype.name}, and {sets[0].prefix} {sets[0].dtype.name}"
            raise UserError(Problem(f"token set {other.prefix}", rule, "tokenize both with one tokenizer"))
    with IndexedWriter(output, dtype=sets[0].dtype) as writer:
        for dataset in sets:
            for start in range(0, dataset.num_documents, _BLOCK_DOCUMENTS):
                first, *ends = dataset.document_indices[start : start + _BLOCK_DOCUMENTS + 1].tolist()
                begin, end = dataset.first_tokens(np.array([first, ends[-1]])).tolist()
                lengths, ends = dataset.lengths[first : ends[-1]], np.array(ends) - first
                writer.add_documents(dataset.tokens[begin:end], lengths=lengths, ends=ends)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m jaxlm.data.merge", description="Join token sets of one dtype, in the order given.")
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="path of a set without .bin or .idx")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the set to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that exists")
    options = parser.parse_args(argv)
    if not options.overwrite:
        refuse_existing(options.output_prefix, [options.output_prefix])
    merge(options.prefix, options.output_prefix)
    made = IndexedDataset(options.output_prefix)
    print(f"{made.prefix}: {made.num_documents:,} documents, {made.num_tokens:,} tokens of {made.dtype.name}")
    return 0


if __name__ == "__main__":
    run_main(main)
