"""Loss of a trained model on text: `python -m jaxlm.evaluate --workdir DIR [--input FILE.jsonl | --data PREFIX]`.

Without text of yours, on all of the run's held-out part: more than the train.eval_batches of it that the run looked at.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.data.corpus import evaluation_loader, open_corpus
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.prepare import prepare
from jaxlm.data.samples import TokenRange, whole
from jaxlm.feed import feed
from jaxlm.session import (
    evaluate_batches,
    load_config,
    open_tokenizer,
    open_tool_program,
    restore_params,
    with_vocabulary,
)
from jaxlm.settings import Parser, progress_bar, run_main
from jaxlm.step import compile_eval


def evaluate(
    workdir: Path, *, step: int | None = None, inputs: Sequence[str] = (), prefixes: Sequence[str] = ()
) -> dict[str, float | int]:
    """Mean loss of checkpoint `step` (None: the newest) over every row of the text, without dropout.

    Args:
      inputs: text files, tokenized as the run was.   prefixes: tokenized sets.   Neither: the run's held-out text.

    Returns: step, eval_loss in nats a token, perplexity, tokens counted.
    Raises: UserError if the workdir, the checkpoint or the text is not there.
    """
    config = load_config(workdir)
    tokenizer = open_tokenizer(config, workdir)
    config = with_vocabulary(config, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        if inputs:
            made = prepare(
                tuple(inputs), tokenizer_spec=tokenizer.spec, text_key=config.data.text_key, folder=scratch, log=_say
            )  # fmt: skip
            prefixes = (made.prefix,)
        ranges: tuple[TokenRange, ...] = tuple(whole(IndexedDataset(prefix)) for prefix in prefixes)
        loader = evaluation_loader(config, ranges or open_corpus(config, workdir, _say).held_out, tokenizer)
        program = open_tool_program(config, plain=False)
        restored = restore_params(program, workdir, step)
        count = loader.num_batches or 0
        batches = (feed(program, loader, i) for i in range(count))
        with progress_bar(count, "evaluating", " batches") as bar:
            result = evaluate_batches(compile_eval(program), restored.state, batches, seen=bar.update)
    perplexity = math.exp(min(result.loss, 700))
    return dict(step=restored.step, eval_loss=result.loss, perplexity=perplexity, tokens=result.tokens)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m jaxlm.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run's folder")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--input", nargs="+", default=(), metavar="FILE", help="text or JSONL files, tokenized as the run was"
    )
    text.add_argument("--data", nargs="+", default=(), metavar="PREFIX", help="tokenized .bin/.idx sets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    result = evaluate(args.workdir, step=args.step, inputs=args.input, prefixes=args.data)
    if args.json:
        print(json.dumps(result))
    else:
        loss = f"eval loss {np.float32(result['eval_loss'])!s} nats a token, perplexity {result['perplexity']:.4g}"
        print(f"step {result['step']}: {loss}, {result['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    run_main(main)
