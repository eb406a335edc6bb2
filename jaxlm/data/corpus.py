"""What a config's data section names, opened: sets with their weights to train on, sets to evaluate on, rows of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config, Problem, UserError, skipped_batches
from jaxlm.data.blend import Blend
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.infill import Infill
from jaxlm.data.loader import Loader, Ramp, in_force
from jaxlm.data.packing import Packed
from jaxlm.data.prepare import prepare
from jaxlm.data.samples import MegatronSamples, Samples, TokenRange, Windows, normalised, split, whole
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer

_NUMBER = r"\d+\.?\d*(?:[eE]-?\d+)?"
_WEIGHTED = re.compile(rf"({_NUMBER}(?:@\d+)?(?:/{_NUMBER}@\d+)*):(.+)")
_NAMED = re.compile(r"([\w.-]+)=(.+)")
SURPLUS = 0.005  # samples more than its share that Megatron builds of each set in a mixture


@dataclass(frozen=True)
class Corpus:
    """The text of a run: what to train on, what to hold out, by name, and how it is spelled."""

    tokenizer: Tokenizer
    training: tuple[TokenRange, ...]
    evaluation: dict[str, tuple[TokenRange, ...]]

    @property
    def num_tokens(self) -> int:
        return sum(r.num_tokens for r in self.training)

    @property
    def fingerprints(self) -> dict[str, str]:
        """{name of a set: its fingerprint}, in the order of training; the folder a set lies in does not count."""
        sets = [part.dataset for part in self.training]
        return {f"{i}:{Path(s.prefix).name}": s.fingerprint() for i, s in enumerate(sets)}

    @property
    def held_out(self) -> tuple[TokenRange, ...]:
        """What is held out, under whatever name."""
        return tuple(r for ranges in self.evaluation.values() for r in ranges)


def parse_train(entry: str) -> tuple[str, tuple[tuple[int, float], ...]]:
    """An entry of data.train: (prefix, weights by step).

    Example: "0.7:a" is ("a", ((0, 0.7),)), "0.7/0.2@1000:a" ("a", ((0, 0.7), (1000, 0.2))), "a" ("a", ()).
    """
    found = _WEIGHTED.fullmatch(entry)
    if found is None:
        return entry, ()
    pairs = [part.partition("@") for part in found[1].split("/")]
    return found[2], tuple((int(step or 0), float(weight)) for weight, _, step in pairs)


def open_corpus(config: Config, workdir: Path, log: Callable[[str], None]) -> Corpus:
    """Tokenizes data.path into workdir/data on first use, or opens data.train and data.eval.

    Raises: UserError if a file is missing, malformed or changed since it was tokenized, or weights make no sense.
    """
    data = config.data
    if data.path:
        folder = workdir / "data"
        ready = prepare(data.path, tokenizer_spec=data.tokenizer, text_key=data.text_key, folder=folder, log=log)
        tokenizer, entries = ready.tokenizer, [(ready.prefix, ())]
    else:
        tokenizer, entries = load_tokenizer(data.tokenizer), [parse_train(entry) for entry in data.train]
    sets = [IndexedDataset(prefix) for prefix, _ in entries]
    documents = data.order == "megatron" or data.packing == "best_fit"
    shares = (1.0, 0.0) if data.eval else data.split
    cuts = [_cut(dataset, shares, documents=documents) for dataset in sets]
    training = tuple(replace(first, weights=weights) for (first, _), (_, weights) in zip(cuts, entries))
    evaluation: dict[str, tuple[TokenRange, ...]] = {}
    for entry in data.eval:
        name, prefix = found.groups() if (found := _NAMED.fullmatch(entry)) else ("", entry)
        evaluation[name] = (*evaluation.get(name, ()), whole(IndexedDataset(prefix)))
    if held_out := tuple(rest for _, rest in cuts if rest.num_tokens > 1):
        evaluation[""] = held_out
    return Corpus(tokenizer, training, evaluation)


def _cut(dataset: IndexedDataset, shares: Sequence[float], *, documents: bool) -> list[TokenRange]:
    """Training's and evaluation's share of a set, of its tokens, or of its sequences, whole."""
    parts = split(len(dataset) if documents else dataset.num_tokens, shares=shares)[:2]
    if not documents:
        return [TokenRange(dataset, part.start, part.stop) for part in parts]
    at = dataset.first_tokens(np.array([parts[0].start, parts[1].start, parts[1].stop])).tolist()
    return [TokenRange(dataset, at[k], at[k + 1], parts[k]) for k in (0, 1)]


def training_samples(parts: tuple[TokenRange, ...], config: Config, ramp: Ramp) -> Samples:
    """The order in which a run reads `parts`."""
    data, train = config.data, config.train
    sized: Any = dict(seq_len=train.seq_len, seed=train.seed)
    weighted = [part for part in parts if part.weights]
    if weighted and len(weighted) < len(parts):
        bare = next(part for part in parts if not part.weights).dataset.prefix
        raise UserError(Problem(f"data.train: {bare}", "has no weight, and others have", f"write it as 1.0:{bare}"))
    phases = [(ramp.before(step) if step else 0, weights) for step, weights in _phases(parts)]
    if data.order == "megatron":
        total = ramp.before(train.num_steps - 1) + ramp.size(train.num_steps - 1)
        if len(parts) == 1 and not weighted:
            return MegatronSamples(parts[0], num_samples=total, **sized)
        shares: list[int | None] = [None] * len(parts)
        if weighted:
            shares = [ceil(ceil(total * share) * (1 + SURPLUS)) for share in normalised(phases[0][1])]
        sources = [MegatronSamples(part, num_samples=share, **sized) for part, share in zip(parts, shares)]
        return Blend(sources, phases or [(0, [s.num_samples for s in sources])], exact=True)
    make = Packed if data.packing == "best_fit" else Windows
    if not weighted:
        return make(parts, shuffle=True, **sized)
    return Blend([make([part], shuffle=True, **sized) for part in parts], phases, exact=False)


def _phases(parts: tuple[TokenRange, ...]) -> list[tuple[int, list[float]]]:
    """(step, weight of each part) from each step on at which one changes. Raises UserError where all are 0."""
    steps = sorted({0, *(step for part in parts for step, _ in part.weights)}) if parts[0].weights else []
    for part in parts:
        if [step for step, _ in part.weights] != sorted({step for step, _ in part.weights}):
            where = f"data.train: {part.dataset.prefix}"
            raise UserError(Problem(where, "the steps of its weights do not rise", "write them in order, each once"))
    phases = [(step, [in_force(part.weights, step, 0.0) for part in parts]) for step in steps]
    for step, weights in phases:
        if sum(weights) <= 0:
            raise UserError(Problem(f"data.train from step {step} on", "every weight is 0", "give a set some weight"))
    return phases


def sets_read(entries: Sequence[str], fingerprints: Sequence[str], *, steps: int) -> list[tuple[str, list]]:
    """(fingerprint, weights by step) of each set that the first `steps` steps may have rows of.

    entries: of data.train; none where data.path is one set.   fingerprints: of the sets, in that order.
    """
    weights = [parse_train(entry)[1] for entry in entries or ("",)]
    past = [
        (print_, [pair for pair in pairs if pair[0] < steps], pairs) for print_, pairs in zip(fingerprints, weights)
    ]
    return [(print_, before) for print_, before, pairs in past if before or not pairs]


def training_loader(config: Config, corpus: Corpus) -> Loader:
    """The batches a run trains on, without end."""
    data, train, rewrite = config.data, config.train, None
    if data.fim_rate:
        if max(data.fim_tokens) >= config.model.vocab_size:
            rule = f"is not below the vocabulary size, {config.model.vocab_size}"
            raise UserError(Problem(f"data.fim_tokens: {max(data.fim_tokens)}", rule, "raise model.vocab_size"))
        rewrite = Infill(corpus.tokenizer, train.seed, data.fim_rate, data.fim_spm_rate, data.fim_tokens)
    skip = skipped_batches(data.skip_steps)
    ramp = Ramp(train.batch_size, *train.batch_ramp, skip=skip)
    samples = training_samples(corpus.training, config, ramp)
    return _loader(config, corpus.tokenizer, samples, ramp, lengths=data.row_lengths, rewrite=rewrite)


def evaluation_loader(config: Config, parts: tuple[TokenRange, ...], tokenizer: Tokenizer) -> Loader:
    """The batches of an evaluation: every label of `parts` once, in file order; where training packs documents, packed."""
    order = Packed if config.data.packing == "best_fit" else Windows
    samples = order(parts, seq_len=config.train.seq_len, seed=0, shuffle=False)
    return _loader(config, tokenizer, samples, Ramp(config.train.batch_size))


def evaluation_loaders(config: Config, corpus: Corpus, note: Callable[[str], None]) -> dict[str, Loader]:
    """A loader for each set to evaluate on, by name; for none, a note. UserError if evaluations are asked for then."""
    if corpus.evaluation:
        sets = corpus.evaluation.items()
        return {name: evaluation_loader(config, parts, corpus.tokenizer) for name, parts in sets}
    if config.train.eval_every:
        where, rule = f"train.eval_every={config.train.eval_every}", "no text is held out"
        raise UserError(Problem(where, rule, "raise data.split's second share, name data.eval, or set it to 0"))
    note("no evaluation: data.split and data.eval hold no text out")
    return {}


def _loader(config: Config, tokenizer: Tokenizer, samples: Samples, ramp: Ramp, **more) -> Loader:
    data, size = config.data, config.model.vocab_size
    masks = dict(mask_eod_loss=data.mask_eod_loss, separates=data.separates)
    return Loader(samples, ramp, eod=tokenizer.eod, vocab_size=size, **masks, **more)
