"""The table of rules: rows replaced from the config, and tables, degrees or models it refuses."""

import pytest
import tiny

from jaxlm.config import UserError
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.rules import RULES, Rule, with_rows
from jaxlm.step import make_program


def test_a_replaced_row_changes_that_row_alone():
    rules = with_rows(["embed=/ data + fsdp", "position = / fsdp"])
    assert Rule("embed", (), ("data", "fsdp")) in rules and Rule("position", (), ("fsdp",)) in rules
    assert [r for r in rules if r.dim not in ("embed", "position")] == [
        r for r in RULES if r.dim not in ("embed", "position")
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("embed=fsdp", "is not dim=axes/axes"),
        ("embd=/fsdp", "no dim is called 'embd'\n  did you mean embed?"),
        ("embed=/fdsp", "no axis is called 'fdsp'"),
    ],
)
def test_a_row_that_can_not_be_read_is_refused_with_what_is_known(row, message):
    with pytest.raises(UserError) as e:
        with_rows([row])
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("family", "mesh", "message"),
    [
        ("gpt2", dict(rules=("batch=data+data/data+data",)), "uses a mesh axis twice"),
        ("gpt2", dict(rules=("batch=data+model/data+model",)), "model also splits ['batch']"),
        ("gpt2", dict(rules=("mlp=model/",)), "does not come first at rest"),
        ("gpt2", dict(rules=("seq=/", "residual=model/model")), "mesh.context=2\n  no row of the table uses it"),
        ("gpt2", dict(rules=("residual=model/model",)), "must begin as seq=context/context"),
        ("gpt2", dict(rules=("mlp=/",)), "residual is split over model as well, and mlp is not"),
        ("gpt2", dict(rules=("kv_heads=/",)), "differs from heads=model/model"),
        ("gpt2", dict(rules=("embed=context/context",)), "products need it whole"),
        ("gpt2", dict(rules=("position=/model",)), "splits neither batch nor seq"),
        ("gpt2", dict(rules=("embed=/context",)), "axes that do not split batch"),
        ("bloom", dict(rules=("position=/fsdp",)), "this model has no dim position"),
        ("gpt2", dict(rules=("position=/fsdp",)), "use a mesh axis twice in embed.positions"),
        ("gpt2", dict(rules=("position=model/model",)), "products need it whole"),
        ("gpt2", dict(rules=("mlp=model/model+fsdp",)), "only embed and position rest split further"),
        ("gpt2", dict(rules=("vocab=model/model+data",), data=2, fsdp=1), "only embed and position rest split further"),
        ("gpt2", dict(rules=("batch=data+fsdp+pipeline/data+fsdp+pipeline",), fsdp=1, pipeline=2), "different rows"),
        ("gpt2", dict(rules=("embed=/", "embed=/fsdp")), "embed has a row before this one"),
    ],
)  # fmt: skip
def test_a_table_that_would_compute_something_else_is_refused(family, mesh, message):
    with pytest.raises(UserError) as e:
        make_program(tiny.config(family), tiny.layout(8, **({"data": 1, "fsdp": 2, "context": 2, "model": 2} | mesh)))
    assert message in str(e.value)


def test_large_parameters_left_whole_on_every_device_are_an_error_that_names_them():
    config = tiny.config("gpt2", **(PRESETS["gpt2-124m"] | dict(vocab_size=50257)))
    make_program(config, tiny.layout(8, data=1, model=4, fsdp=2))  # norms, biases, positions: under 2 %
    with pytest.raises(UserError) as e:
        make_program(config, tiny.layout(8, data=4, model=2, rules=("vocab=/", "residual=context/context")))
    assert "31.7% of the parameters' bytes lie whole on every device of model: embed.tokens, embed.positions" in str(
        e.value
    )
    with pytest.raises(UserError, match="whole on every device of fsdp"):  # model splits them, fsdp nothing
        make_program(config, tiny.layout(8, data=1, fsdp=4, model=2, rules=("embed=/",)))
    tiny_config = tiny.config("gpt2", vocab_size=512)  # the same share of a model of kilobytes hurts nobody
    make_program(tiny_config, tiny.layout(8, data=4, model=2, rules=("vocab=/", "residual=context/context")))
