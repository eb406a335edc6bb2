"""Batches that grow, rows that lengthen, weights that change: the step alone says what it reads, so a run resumes as if
unbroken, and says what it may not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_train import numbers

from jaxlm import train
from jaxlm.config import UserError
from jaxlm.data.indexed import IndexedWriter
from jaxlm.data.merge import merge
from jaxlm.metrics.writer import read_metrics

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        model=dict(num_layers=1, embed_dim=16, num_heads=2, max_seq_len=16, vocab_multiple=2),
        train=dict(num_steps=12, batch_size=12, batch_ramp=(4, 4, 20), eval_every=6),
        mesh=dict(data=2, fsdp=2, model=2),
        optim=dict(peak_lr=1e-2, schedule="constant"),
        data=dict(
            train=("{weights}:{folder}/low", "0.3:{folder}/high"), eval=("low={folder}/low", "high={folder}/high"),
            seq_lens=("8@2", "16@8"), reset_at_eod=True,
        ),
        log=dict(tensorboard=False, sample_tokens=0),
    ))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growth")
    for name, first in (("low", 0), ("high", 100)):
        with IndexedWriter(folder / name, dtype="u2") as writer:
            for k in range(60):
                writer.add_document([*range(first + k % 7, first + k % 7 + 9), 256])
    return folder


def run(folder: Path, workdir: str, *, steps: int = 12, weights: str = "0.7/0.2@6") -> int:
    (folder / "growth.py").write_text(CONFIG.format(weights=weights, folder=folder))
    more = ["--workdir", str(folder / workdir), f"--config.train.num_steps={steps}"]
    return train.main(["--config", str(folder / "growth.py"), *more])


@pytest.mark.nightly
def test_a_run_that_grows_resumes_to_the_bit_and_names_what_it_evaluates(folder: Path) -> None:
    assert run(folder, "unbroken") == 0
    assert run(folder, "broken", steps=7) == 0
    for weights in ("0.7/0.2@5", "0.6/0.2@6", "0.7"):  # steps that were taken read other rows
        with pytest.raises(UserError, match=r"token sets are not those(.|\n)*data\.train"):
            run(folder, "broken", weights=weights)
    kept = (folder / "high.idx").read_bytes(), (folder / "high.bin").read_bytes()
    merge([str(folder / "high"), str(folder / "low")], str(folder / "high"))
    with pytest.raises(UserError, match=r"1:high +600 uint16 tokens"):
        run(folder, "broken")
    for ending, content in zip(("idx", "bin"), kept, strict=True):
        (folder / f"high.{ending}").write_bytes(content)
    assert run(folder, "broken", weights="0.7/0.2@6/0.2@7") == 0
    whole, parts = (
        [row for row in numbers(folder / name) if row["step"] != 7 or "loss" in row] for name in ("unbroken", "broken")
    )
    assert whole[:8] == parts[:8] and len(whole) == len(parts) == 14
    records = read_metrics(folder / "unbroken")
    rows = [4, 8, 12, 20, 32, 44, 56, 68, 80, 92, 104, 116]  # samples by then, of 16 tokens
    assert [r["tokens"] for r in records if "loss" in r] == [16 * n for n in rows]
    for record in records:
        if "eval_loss" in record:  # 599 labels each: the mean of both
            assert record["eval_loss"] == pytest.approx((record["eval_loss_low"] + record["eval_loss_high"]) / 2)


ORDERS = {
    "megatron": ['order="megatron"', "mesh=dict(data=4, fsdp=2)"],
    "best_fit": ['packing="best_fit"', "mesh=dict(data=1, pipeline=2, context=2, fsdp=2)"],
    "infill": ["fim_rate=0.7, fim_tokens=(257, 258, 259)", "mesh=dict(data=8)"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_resumes_to_the_bit(folder: Path, order: str) -> None:
    data, mesh = ORDERS[order]
    (folder / "order.py").write_text(
        f"""
def get_config():
    return dict(
        model=dict(num_layers=2, embed_dim=16, num_heads=2, max_seq_len=16, vocab_multiple=2, vocab_size=260),
        train=dict(num_steps=6, batch_size=16, eval_every=6), {mesh},
        data=dict(train=("0.7:{folder}/low", "0.3:{folder}/high"), split=(0.8, 0.2), {data}),
        checkpoint=dict(every_steps=3, keep=9), log=dict(tensorboard=False, sample_tokens=0),
    )
"""
    )
    command = ["--config", str(folder / "order.py"), "--workdir", str(folder / order)]
    assert train.main(command) == 0
    before = numbers(folder / order)
    assert len(before) == 7 and "eval_loss" in before[-1]
    shutil.rmtree(folder / order / "checkpoints" / "6")
    assert train.main(command) == 0
    assert numbers(folder / order) == before
    if order == "megatron":  # whose shuffle is of all steps together
        with pytest.raises(UserError, match=r"train\.num_steps  6 +7"):
            train.main([*command, "--config.train.num_steps=7"])
