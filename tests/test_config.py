"""Finding experiments and overriding their fields."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from jaxspec import config as configs
from jaxspec.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    completed,
    load,
    override,
    to_dict,
)
from jaxspec.console.results import differences
from jaxspec.drafters import EagleOptions, MedusaOptions
from jaxspec.training.loop import refuse_other_settings


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    parts: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    count: int = 1
    limit: int | None = None
    fast: bool = False
    mode: Literal["a", "b"] = "a"
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("item", "field", "value"),
    [
        ("name=a=b", "name", "a=b"),
        ("count=7", "count", 7),
        ("count=1e3", "count", 1000),
        ("limit=3", "limit", 3),
        ("limit=none", "limit", None),
        ("fast=true", "fast", True),
        ("mode=b", "mode", "b"),
        ("inner.rate=1e-3", "inner", Inner(rate=1e-3)),
        ("inner.betas=0.8,0.9", "inner", Inner(betas=(0.8, 0.9))),
        ("inner.sizes=(1,2,3)", "inner", Inner(sizes=(1, 2, 3))),
        ("inner.parts=l1:1,top_k:10:.5", "inner", Inner(parts=(("l1", 1.0), ("top_k:10", 0.5)))),
        ("inner.parts=l1:1", "inner", Inner(parts=(("l1", 1.0),))),
    ],
)
def test_an_override_is_read_by_the_fields_type(item: str, field: str, value: object):
    assert override(Outer(), [item]) == dataclasses.replace(Outer(), **{field: value})


def test_the_last_override_of_a_field_wins_and_others_stay():
    assert override(Outer(), ["inner.rate=1", "count=2", "inner.rate=3"]) == Outer(count=2, inner=Inner(rate=3.0))


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("cout=1", "unknown field 'cout' in Outer; did you mean count"),
        ("inner.rat=1", "unknown field 'inner.rat' in Inner; did you mean rate"),
        ("count=many", "field 'count' cannot be 'many'; it takes a whole number"),
        ("count=1.5", "field 'count' cannot be '1.5'"),
        ("limit=x", "it takes a whole number or none"),
        ("fast=maybe", "it takes true or false"),
        ("mode=c", "it takes a or b"),
        ("inner.betas=1", "field 'inner.betas' cannot be '1'"),
        ("inner.parts=l1", "it takes values separated by commas, each text:number"),
        ("inner=1", "field 'inner' is a group; set one of its fields: rate, betas, sizes, parts"),
        ("count.x=1", "field 'count' has no fields of its own"),
        ("count", "not of the form field=value"),
        ("=1", "not of the form field=value"),
    ],
)
def test_a_wrong_override_is_named(item: str, match: str):
    with pytest.raises(ValueError, match=match):
        override(Outer(), [item])


@pytest.mark.parametrize("name", configs.experiments())
def test_every_experiment_loads_and_is_json(name: str):
    assert json.loads(json.dumps(to_dict(load(name)))) == to_dict(load(name))


def test_an_override_that_breaks_a_rule_names_the_group():
    with pytest.raises(ValueError, match=r"data: .*'batch' cannot be 0"):
        load("tiny", ["data.batch=0"])


def test_a_config_is_found_by_path(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("from jaxspec.configs.tiny import config\n")
    assert load(str(path), ["seed=5"]) == dataclasses.replace(load("tiny"), seed=5)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("tinny", None, "did you mean tiny"),
        ("no.py", None, "no such config file"),
        ("bad.py", "x = 1", "has no dataclass"),
    ],
)
def test_a_config_that_is_not_there_is_named(tmp_path: Path, name: str, text: str | None, match: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        load(str(tmp_path / name) if name.endswith(".py") else name)


@pytest.mark.parametrize(
    "build",
    [
        lambda: OptimizerConfig(peak_lr=1e-3),
        lambda: OptimizerConfig(peak_lr=1e-3, steps=1, epochs=1),
        lambda: OptimizerConfig(peak_lr=-1.0, steps=1),
        lambda: DataConfig("a", "b", length=1),
        lambda: DataConfig("a", "b", mix="c", mix_share=1.0),
        lambda: CheckpointConfig("a", save_every=0),
    ],
)
def test_settings_that_cannot_be_are_refused(build):
    with pytest.raises(ValueError, match=r"optimizer|peak_lr|length|save_every|mix_share is 1"):
        build()


def test_differences_name_the_fields():
    other = dataclasses.replace(Outer(), count=2, inner=Inner(rate=0.1))
    assert differences(to_dict(Outer()), to_dict(other)) == ["count was 1, is 2", "inner.rate was 0.5, is 0.1"]
    assert differences(to_dict(Outer()), to_dict(Outer())) == []


def test_what_an_earlier_version_did_not_know_is_at_its_default():
    config = DataConfig("a.jsonl", "b.jsonl", length=64)
    early = {"train": "a.jsonl", "eval": "b.jsonl", "length": 64}
    assert completed(early, config) == to_dict(config)
    assert completed({"length": 64, "gone": 1}, config)["gone"] == 1  # and nothing is dropped
    assert "train" not in completed({"length": 64}, config)  # which has no default
    outer = dataclasses.replace(Outer(), inner=Inner(rate=0.1))
    assert completed({"count": 1, "inner": {}}, outer)["inner"] == to_dict(Inner())


EARLY_HEAD = dict.fromkeys(
    ("heads", "mlp", "bias", "head_norm", "feature_sampling", "taps", "tokens", "host", "mask_token", "vocab", "tied")
)
"""Options as runs before had them: those of all drafters, null where nothing was said."""


def test_a_run_whose_options_were_those_of_all_drafters_goes_on():
    for name, said in (("medusa", {"tokens": 5}), ("eagle2", {}), ("fspad_no_sampling", {"feature_sampling": False})):
        config = load(name)
        early = to_dict(config) | {"head": EARLY_HEAD | said}
        refuse_other_settings(early, config, ("head",), Path("run"))
        with pytest.raises(ValueError, match=r"run: belongs to a run with other settings \(head\.mlp was 7, is None"):
            refuse_other_settings(early | {"head": EARLY_HEAD | said | {"mlp": 7}}, config, ("head",), Path("run"))
    with pytest.raises(ValueError, match=r"head\.vocab was 9"):
        refuse_other_settings(to_dict(load("eagle2")) | {"head": {"vocab": 9}}, load("eagle2"), ("head",), Path("run"))


def test_options_are_those_of_the_drafter_that_the_overrides_name():
    assert load("eagle2").head == EagleOptions()
    assert load("eagle2", ["head.tokens=5", "drafter=medusa"]).head == MedusaOptions(tokens=5)
    assert load("medusa", ["head.tokens=none", "head.layers=2"]).head == MedusaOptions(layers=2)
    assert load("best", ["drafter=eagle"]).head == EagleOptions(embedding_norm=True)  # which both have
    for name, words in (("eagle2", ["head.tokens=5"]), ("medusa", ["drafter=eagle"])):
        with pytest.raises(
            ValueError, match=r"head\.tokens is nothing that drafter 'eagle' has; it has heads, kv_heads"
        ):
            load(name, words)
    with pytest.raises(ValueError, match="drafter 'eagel' is not one of eagle, fspad"):
        load("eagle2", ["drafter=eagel", "head.bias=true"])
