"""Tests of experiments: how they are found, derived from each other, resolved and shown."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from jaxspec import config as configs
from jaxspec.__main__ import main
from jaxspec.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    completed,
    derive,
    docstring,
    load,
    override,
    resolve,
    to_dict,
)
from jaxspec.console.overrides import dotted_fields
from jaxspec.console.results import differences
from jaxspec.drafters import EagleOptions, MedusaOptions
from jaxspec.training.loop import refuse_other_settings

MINE = """'''My own head.

For a test.'''
from jaxspec.config import derive

config = derive("fspad", name="mine", optimizer={"peak_lr": 1e-3})
"""


@pytest.mark.parametrize("name", configs.experiments())
def test_every_experiment_loads_and_is_json(name: str):
    assert json.loads(json.dumps(to_dict(load(name)))) == to_dict(load(name))


@pytest.mark.parametrize("name", configs.experiments())
def test_an_experiment_is_named_as_its_file_and_its_folders_as_the_experiment(name: str):
    config = load(name)
    export = "drafter" if isinstance(config, DistillConfig) else "export"
    assert (config.name, config.checkpoint.folder, config.export_folder) == (
        name,
        f"runs/{name}",
        f"runs/{name}/{export}",
    )


@pytest.mark.parametrize("name", configs.experiments())
def test_an_experiment_says_its_source_its_hardware_and_what_to_expect(name: str):
    first, *others = docstring(name).splitlines()
    assert first.endswith(".") and len(first) <= 120
    assert all(any(line.startswith(word) for line in others) for word in ("Source: ", "Hardware: ", "Expected: "))


@pytest.mark.parametrize("name", configs.experiments())
def test_what_an_experiment_expects_stands_in_the_results(name: str):
    results = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    expected = docstring(name).partition("Expected: ")[2].partition("\n\n")[0]
    assert all(heading in results for heading in re.findall(r'"([^"]+)"', " ".join(expected.split())))
    assert all(figure in results for figure in re.findall(r"\d+\.\d+", expected))


@pytest.mark.parametrize("name", configs.experiments())
def test_the_fields_that_are_shown_are_overrides_that_change_nothing(name: str):
    config = load(name)
    assert override(config, [f"{path}={text}" for path, text in dotted_fields(config).items()]) == config


def test_folders_follow_the_name_unless_they_are_set():
    assert load("hass", ["name=mine"]).checkpoint.folder == "runs/mine"
    assert load("hass", ["name=mine"]).export_folder == "runs/mine/drafter"
    moved = load("hass", ["checkpoint.folder=here", "name=mine", "checkpoint.keep=5"])
    assert (moved.checkpoint.folder, moved.export_folder) == ("here", "here/drafter")
    assert load("hass", ["export_folder=head"]).checkpoint.folder == "runs/hass"
    assert resolve(moved) == moved == resolve(resolve(moved))


def test_a_length_in_steps_replaces_one_in_epochs_and_the_other_way_round():
    assert load("hass").optimizer.epochs
    assert load("hass", ["optimizer.steps=7"]).optimizer.epochs is None
    for length in ("steps", "epochs"):
        for wrong in (0, -3):
            with pytest.raises(ValueError, match=f"field '{length}' cannot be {wrong}; it must be at least 1"):
                load("hass", [f"optimizer.{length}={wrong}"])
    with pytest.raises(ValueError, match="give exactly one"):
        load("hass", ["optimizer.steps=7", "optimizer.epochs=1"])


def test_a_derived_experiment_changes_what_it_names_and_keeps_the_rest(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    mine, base = load(str(tmp_path / "mine.py")), load("fspad")
    assert mine.checkpoint.folder == "runs/mine" and mine.optimizer.peak_lr == 1e-3
    lines = differences(to_dict(base), to_dict(mine))
    assert [line.split()[0] for line in lines] == ["checkpoint.folder", "export_folder", "name", "optimizer.peak_lr"]
    assert derive("fspad", mesh=MeshConfig(fsdp=2)).mesh == MeshConfig(fsdp=2)
    with pytest.raises(ValueError, match=r"unknown field 'optimizer\.lr' in OptimizerConfig"):
        derive("fspad", optimizer={"lr": 1.0})


@pytest.mark.parametrize(("loss", "weights"), [("kld", "kl:1"), ("tvd", "tvd:1"), ("tvdpp", "tvdpp_exact_pos:1")])
def test_the_three_direct_alignments_are_one_experiment_and_a_loss(loss: str, weights: str):
    name = f"draft_lm_{loss}"
    assert load(name) == load("draft_lm", [f"name={name}", f"objective.weights={weights}"])


def test_an_override_that_breaks_a_rule_names_the_group():
    with pytest.raises(ValueError, match=r"data: .*'batch' cannot be 0; it must be at least 1"):
        load("tiny", ["data.batch=0"])


OUTSIDE = {
    **dict.fromkeys(("data.batch", "data.limit", "data.eval_limit", "data.top_k", "data.workers"), "0"),
    **dict.fromkeys(("data.length", "optimizer.b1", "optimizer.b2", "data.mix_share"), "1"),
    **dict.fromkeys(("optimizer.peak_lr", "optimizer.clip_norm", "optimizer.clip_value", "optimizer.steps"), "0"),
    **dict.fromkeys(("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.eps", "optimizer.epochs"), "-1"),
    **dict.fromkeys(("checkpoint.save_every", "checkpoint.save_minutes", "checkpoint.keep", "mesh.data"), "0"),
    **dict.fromkeys(("mesh.fsdp", "mesh.tensor", "mesh.slices", "query_block", "eval_every", "log_every"), "0"),
    **dict.fromkeys(("checkpoint.keep_best", "seed", "objective.noise", "objective.feature_steps"), "-1"),
    **dict.fromkeys(("objective.steps", "objective.chunk", "objective.step_decay"), "0"),
    "optimizer.final_lr_fraction": "2",
}
"""Numbers that a field cannot be."""


def test_every_number_of_an_experiment_has_a_range_which_its_refusal_names():
    config = load("eagle2", ["optimizer.clip_norm=1", "data.limit=1"])
    for path, text in OUTSIDE.items():
        with pytest.raises(ValueError, match=f"{path.rpartition('.')[2]}.*{text}.* (must be|above) "):
            override(config, [f"{path}={text}"])
    fields = {p for p in dotted_fields(config) if not p.startswith("head.")}
    numeric = {p for p in fields if isinstance(functools.reduce(getattr, p.split("."), config), int | float)}
    numeric -= {p for p in numeric if isinstance(functools.reduce(getattr, p.split("."), config), bool)}
    assert numeric <= OUTSIDE.keys()
    with pytest.raises(ValueError, match="'loss_block' cannot be 0; it must be at least 1"):
        load("tiny", ["loss_block=0"])
    with pytest.raises(ValueError, match="head: field 'kv_heads' cannot be 0; it must be at least 1"):
        load("eagle2", ["head.kv_heads=0"])


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
    with pytest.raises(ValueError, match=r"optimizer|peak_lr|length|save_every|mix_share"):
        build()


def test_differences_name_the_fields():
    config = load("eagle2")
    other = dataclasses.replace(config, seed=2, optimizer=dataclasses.replace(config.optimizer, b1=0.5))
    assert differences(to_dict(config), to_dict(other)) == ["optimizer.b1 was 0.9, is 0.5", "seed was 0, is 2"]
    assert differences(to_dict(config), to_dict(config)) == []


def test_what_an_earlier_version_did_not_know_is_at_its_default():
    config = DataConfig("a.jsonl", "b.jsonl", length=64)
    early = {"train": "a.jsonl", "eval": "b.jsonl", "length": 64}
    assert completed(early, config) == to_dict(config)
    assert completed({"length": 64, "gone": 1}, config)["gone"] == 1  # and nothing is dropped
    assert "train" not in completed({"length": 64}, config)  # which has no default
    groups = completed({"name": "x", "optimizer": {"peak_lr": 1.0}}, load("eagle2"))
    assert groups["optimizer"] == to_dict(OptimizerConfig(1.0, steps=1)) | {"steps": None}


def test_the_verb_lists_every_experiment_with_its_verb_and_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["configs", "--json", str(tmp_path / "all.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    assert [row["name"] for row in found["configs"]] == configs.experiments() and found["command"] == "configs"
    assert all(row["name"] in shown and row["summary"] in shown for row in found["configs"])
    verbs = {row["name"]: row["verb"] for row in found["configs"]}
    assert (verbs["tiny"], verbs["best"]) == ("pretrain", "train")


def test_an_experiment_is_shown_as_it_is_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "one.json")
    assert main(["configs", "best", "name=mine", "objective.late=", "--json", out]) == 0
    lines, found = capsys.readouterr().out.splitlines(), json.loads(Path(out).read_text())
    assert lines[0] == f"# {docstring('best').splitlines()[0]}"
    assert {"checkpoint.folder = runs/mine", "optimizer.kind = muon", "optimizer.steps = none"} < set(lines)
    assert {"objective.weights = smooth_l1:1.0,soft_cross_entropy:0.1,top_k:10:1.0", "objective.late ="} < set(lines)
    assert found["config"] == to_dict(load("best", ["name=mine", "objective.late="]))
    assert (found["dtype"], found["seed"]) == ("float32", 0)


def test_the_verb_names_an_experiment_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["configs", "egle3"]) == 1
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith("jaxspec configs: there is no config 'egle3'")
    assert "did you mean eagle3" in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(("verb", "name", "kind"), [("train", "tiny", "Distill"), ("pretrain", "eagle2", "Pretrain")])
def test_a_training_verb_refuses_experiments_of_the_other(verb: str, name: str, kind: str, capsys):
    assert main([verb, name]) == 1
    assert f"not a {kind}Config" in capsys.readouterr().err


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
