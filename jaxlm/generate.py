# Dims: B rows (copies of one), T position, V vocabulary.
"""Writes text with a trained model: `python -m jaxlm.generate --workdir DIR --prompt TEXT`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models.gpt import GPT
from jaxlm.parallel.dense import RESIDUAL
from jaxlm.parallel.rules import by_dims
from jaxlm.parallel.working import working_copies
from jaxlm.session import open_run, open_tool_program, restore_params
from jaxlm.settings import Parser, run_main
from jaxlm.step import BATCH_DIMS, Program


def generate(
    program: Program,
    params: object,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    num_ids: int = 0,
    eod: int | None = None,
) -> list[int]:
    """`max_new_tokens` ids that follow `prompt`, sampled from softmax(logits / temperature) over the top_k largest.

    The whole context is computed anew for each token (no key-value cache); past model.max_seq_len the oldest tokens
    fall out of it. temperature 0 takes the largest logit; top_k 0 keeps all; ids >= num_ids are never taken (0: all may
    be). Where training kept documents apart, a document begins anew after each `eod`.
    Raises: ValueError on an empty prompt.
    """
    if not len(prompt):
        raise ValueError("generation needs at least one token to start from")
    length, model, layout = len(prompt) + max_new_tokens, program.config.model, program.layout
    parts = layout.num_parts(layout.split("residual"))  # the window splits evenly over these, in half chunks too
    unit = next(unit for unit in (2 * parts, parts) if unit <= model.max_seq_len)
    window = min(model.max_seq_len // unit, -(-length // unit)) * unit
    buffer_T = np.zeros(max(length, window), np.int32)
    buffer_T[: len(prompt)] = prompt
    num_ids = num_ids or model.vocab_size
    run = jax.jit(partial(_generate, program, window, temperature, min(top_k, num_ids), num_ids, eod))
    out_T = run(params, buffer_T, np.int32(len(prompt)), np.int32(length), jax.random.key(seed))
    return jax.device_get(out_T)[len(prompt) : length].tolist()


def _generate(program, window, temperature, top_k, num_ids, eod, params, buffer_T, start, length, key):
    layout, rows = program.layout, program.layout.num_row_shards  # copies, so that the rows' layout holds on any mesh
    batch, residual, logits = (layout.spec(dims) for dims in (BATCH_DIMS, RESIDUAL, ("batch", "position", "vocab")))
    at = by_dims(partial(layout.spec, at="rest"), program.dims)

    def model(params: Any) -> GPT:
        return program.model(working_copies(params, program.dims, program.config.model.dtype, layout))

    def hidden(params: Any, tokens_BT: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
        return model(params).hidden(tokens_BT, None, starts_BT)

    read = layout.on_mesh(hidden, (at, batch, batch), residual)
    score = layout.on_mesh(lambda params, x_BTD: model(params).logits(x_BTD), (at, jax.P(batch[0])), logits)

    def extend(i, buffer_T):
        first = jnp.maximum(i - window, 0)
        tokens_T = jax.lax.dynamic_slice(buffer_T, (first,), (window,))
        rows_BT, starts_BT = jnp.broadcast_to(tokens_T, (rows, window)), None
        if program.config.data.separates and eod is not None:
            after_T = jnp.where(jnp.roll(tokens_T, 1) == eod, jnp.arange(window), 0)  # at 0 it is 0 whatever came last
            starts_BT = jnp.broadcast_to(jax.lax.cummax(after_T), (rows, window))
        x_BTD = read(params, rows_BT, starts_BT)
        last_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, i - 1 - first, 1, axis=1)
        logits_V = score(params, last_B1D)[0, 0, :num_ids]
        return buffer_T.at[i].set(_pick(logits_V, temperature, top_k, jax.random.fold_in(key, i)))

    return jax.lax.fori_loop(start, length, extend, buffer_T)


def _pick(logits_V: jax.Array, temperature: float, top_k: int, key: jax.Array) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    if top_k:
        logits_V = jnp.where(logits_V < jax.lax.top_k(logits_V, top_k)[0][-1], -jnp.inf, logits_V)
    return jax.random.categorical(key, logits_V / temperature).astype(jnp.int32)


def write_sample(program: Program, params: object, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> str:
    """`prompt` and what the model adds, as text. An empty prompt starts from the end-of-document token."""
    ids = list(tokenizer.encode(prompt)) if prompt else [] if tokenizer.eod is None else [tokenizer.eod]
    if not ids:
        raise UserError(Problem(f"prompt {prompt!r}", "gives no token to start from", "write a word"))
    ids = generate(program, params, ids, num_ids=tokenizer.vocab_size, eod=tokenizer.eod, **sampling)
    return prompt + tokenizer.decode(ids)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m jaxlm.generate", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run's folder")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="how many to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among this many (0: all; default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(args, name) < low:
            flag = f"--{name.replace('_', '-')}={getattr(args, name)}"
            raise UserError(Problem(flag, f"must be at least {low}", f"use {low} or more"))
    config, tokenizer = open_run(args.workdir)
    program = open_tool_program(config, plain=True)
    params = restore_params(program, args.workdir, args.step).state
    sampling = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    print(write_sample(program, params, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, **sampling))
    return 0


if __name__ == "__main__":
    run_main(main)
