"""The terms of `jaxspec compare`: draft vocabulary, draft LM and changes of recipes, on a target that is not theirs."""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import SIZE, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.config import DistillConfig, PretrainConfig, to_dict
from jaxspec.data.draft_vocab import load_maps, save_maps
from jaxspec.interchange.hf_config import read_config
from jaxspec.training.recipes import Arm, compared
from jaxspec.training.resolve import drafter_for
from jaxspec.training.terms import without_vocab

compare: Any = importlib.import_module("jaxspec.train.compare")
DRAFT_LMS = ("draft_lm_pretrained", "draft_lm_kld", "draft_lm_tvd", "draft_lm_tvdpp")
REQUIRED = (
    "eagle2", "hass", "fspad", "fspad_no_alignment", "fspad_no_sampling", "best", "eagle3", "parallelspec_eagle",
    "parallelspec_medusa", "medusa", *DRAFT_LMS,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A target, a pretrained LM with its tokenizer, and draft vocabularies; the working directory of all tests here."""
    path = tmp_path_factory.mktemp("terms")
    write_target(path / "target", layers=7)
    write_target(path / "lm")
    for name, size in (("vocab", 64), ("other", 32)):
        save_maps(path / f"{name}.safetensors", np.arange(size), SIZE)
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def planned(*recipes: str, **flags: Any) -> tuple[Any, dict[str, Any]]:
    """The plan of a comparison on the target here, and the configs of its arms."""
    args = compare.Args(recipes=recipes, target="target", **{"draft_vocab": "vocab.safetensors"} | flags)
    plan = compare.plan(args)
    return plan, {arm.recipe: arm.config for arm in plan.arms}


def scored(config: DistillConfig) -> int | None:
    """Size of a config's draft vocabulary."""
    return None if config.draft_vocab is None else len(load_maps(config.draft_vocab, SIZE))


def test_all_recipes_fit_another_target_with_a_draft_vocabulary_and_its_draft_lm():
    """Every drafter can be made as its training makes it, and the draft LM that is measured is the one trained on."""
    plan, configs = planned(*REQUIRED, draft_lm="lm")
    shape = read_config("target")
    for name, config in configs.items():
        if isinstance(config, DistillConfig):
            assert drafter_for(config, shape, scored(config)).module.vocab in (None, scored(config) or SIZE), name
    assert {name for name in REQUIRED[:-4] if configs[name].draft_vocab == "vocab.safetensors"} == set(REQUIRED[:-4])
    assert configs["draft_lm_pretrained"].export_folder == "lm"
    assert {configs[name].init_from for name in DRAFT_LMS[1:]} == {"lm"}
    assert {configs[name].draft_vocab for name in DRAFT_LMS[1:]} == {None}
    assert without_vocab(plan.terms, plan.recipes) == list(DRAFT_LMS[1:])


def test_what_a_recipe_says_of_itself_goes_before_what_is_said_of_all():
    _, configs = planned(
        *("eagle2", "hass", *DRAFT_LMS),
        draft_lm="nowhere",
        set=(
            *("hass:draft_vocab=other.safetensors", "eagle2:draft_vocab=none"),
            *("draft_lm_kld:init_from=lm", "draft_lm_kld:draft_vocab=none", "draft_lm_pretrained:name=draft_lm_larger"),
        ),
    )
    assert (configs["hass"].draft_vocab, configs["eagle2"].draft_vocab) == ("other.safetensors", None)
    assert (configs["draft_lm_kld"].init_from, configs["draft_lm_tvd"].init_from) == ("lm", "nowhere")
    assert configs["draft_lm_pretrained"].export_folder == "runs/draft_lm_larger/export"


def test_a_pretrained_recipe_takes_its_own_changes_and_not_those_of_all():
    own = "draft_lm_pretrained:export_folder=elsewhere/export"
    _, configs = planned(*DRAFT_LMS, set=("objective.noise=0.1", own), draft_vocab=None)
    ready = configs["draft_lm_pretrained"]
    assert isinstance(ready, PretrainConfig) and ready.export_folder == "elsewhere/export"
    assert configs["draft_lm_kld"].objective.noise == 0.1


def test_one_draft_vocabulary_serves_all_and_none_leaves_each_its_own():
    assert {c.draft_vocab for c in planned("eagle2", "hass")[1].values()} == {"vocab.safetensors"}
    assert {c.draft_vocab for c in planned("eagle2", "hass", draft_vocab=None)[1].values()} == {None}
    with pytest.raises(ValueError, match=r"gone\.safetensors: no such file; `jaxspec draft-vocab` makes one"):
        planned("eagle2", draft_vocab="gone.safetensors")


def test_an_arm_that_was_begun_before_goes_on():
    """An arm is resumed by the same settings as ever, for a drafter that takes the draft vocabulary."""
    for config in planned("eagle2", "eagle3", set=("data.batch=4",))[1].values():
        kept = compared(to_dict(config))
        assert (kept["draft_vocab"], kept["init_from"], kept["target"]) == ("vocab.safetensors", None, "target")
        assert kept["data"]["batch"] == 4 and not {"train", "eval", "features"} & kept["data"].keys()


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ("target=tiny", "--target"),
        ("hass:data.train=mine.jsonl", "--train"),
        ("optimizer.steps=5", "--tokens"),
        ("eagle2:seed=3", "--seeds"),
        ("export_folder=here", "--out"),
    ],
)
def test_a_change_of_what_all_recipes_share_is_refused_with_the_flag_that_says_it(change: str, flag: str):
    path = change.partition("=")[0].rpartition(":")[2]
    with pytest.raises(ValueError, match=rf"--set {path} of .*: all recipes share it; say it by {flag}"):
        planned("eagle2", "hass", set=(change,))


def test_a_draft_lm_that_no_recipe_starts_from_is_refused():
    with pytest.raises(ValueError, match="--draft-lm lm: no recipe is of a pretrained draft LM"):
        planned("eagle2", draft_lm="lm")


def test_a_draft_lm_reads_all_tokens_and_so_takes_no_draft_vocabulary():
    sizes = [f"head.{k}={v}" for k, v in (("width", 8), ("layers", 1), ("heads", 2), ("head_dim", 4), ("mlp", 8))]
    _, configs = planned("draft_lm_kld", set=("init_from=none", "head.kv_heads=1", *sizes))
    fresh = configs["draft_lm_kld"]
    assert fresh.draft_vocab is None and drafter_for(fresh, read_config("target")).module.vocab == SIZE
    with pytest.raises(ValueError, match=r"'draft_lm': its own LM head scores 300 tokens, .*: leave draft_vocab out"):
        drafter_for(fresh, read_config("target"), 64)


def test_a_missing_draft_lm_is_a_failure_of_its_own_recipe(tmp_path: Path):
    _, configs = planned("eagle2", *DRAFT_LMS[:2])  # the recipe's own folder is not here
    assert configs["draft_lm_kld"].init_from == "runs/draft_lm_pretrained/export"
    arm = Arm("draft_lm_pretrained", 0, configs["draft_lm_pretrained"], tmp_path)
    with pytest.raises(ValueError, match=r"run jaxspec pretrain draft_lm_pretrained first, or name another"):
        compare.train_arm(arm, None, tokens=1)


RECIPE = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy",
    target="elsewhere",
    data=DataConfig("elsewhere.jsonl", "elsewhere.jsonl", length=64, batch=8, loss_on="assistant", limit=3),
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=2, epochs=9),
    drafter="{drafter}",
    init_from={init_from},
)
"""


def test_the_result_tells_what_decided_its_figures(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    """An EAGLE head and a draft LM on a target with a draft vocabulary, and changes of all and of one."""

    def trained(config: DistillConfig, data: Any) -> dict[str, int]:
        kept = None if config.draft_vocab is None else load_maps(config.draft_vocab, SIZE).tolist()
        if config.drafter == "eagle":
            write_drafter(Path(config.export_folder), draft_vocab=kept)
        else:
            shutil.copytree("lm", config.export_folder)
        return {"steps": config.optimizer.steps or 0}

    monkeypatch.setattr("jaxspec.training.recipes.run_distillation", trained)
    (folder / "head.py").write_text(RECIPE.format(drafter="eagle", init_from=None))
    (folder / "lm.py").write_text(RECIPE.format(drafter="draft_lm", init_from="'elsewhere'"))
    turns = [{"role": "user", "content": "2 and 2 make"}, {"role": "assistant", "content": "4, they say"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"id": str(i), "messages": turns}) + "\n" for i in range(9)))
    words = [
        "head.py",
        "lm.py",
        "--target",
        "target",
        "--train",
        "chats.jsonl",
        "--eval",
        "chats.jsonl",
        "--limit",
        "2",
    ]
    words += ["--tokens", "90", "--max-new-tokens", "4", "--tree", "chain:1", "--temperature", "0"]
    words += ["--out", "told", "--draft-vocab", "vocab.safetensors", "--draft-lm", "lm", "--set", "data.batch=4"]
    words += ["--set", "head:optimizer.kind=muon"]
    assert main(["compare", *words]) == 0
    assert capfd.readouterr().err.count("--draft-vocab is left out for lm: an LM head that is there already") == 1
    found = json.loads((folder / "told" / "compare.json").read_text())
    chats = {"name": "chats.jsonl", "sha256": hash_of("chats.jsonl"), "count": 9}
    assert found["files"] == {"train": chats, "eval": chats, "prompts": {**chats, "asked": 2}}
    assert (found["target"], len(found["target_weights"]), found["template"]) == ("target", 16, None)
    assert found["set"] == ["data.batch=4", "head:optimizer.kind=muon"] and found["limit"] == 2
    vocab = {"name": "vocab.safetensors", "sha256": hash_of("vocab.safetensors"), "tokens": 64}
    assert found["settings"] == {
        "head": {
            "changed": {"optimizer.kind": "muon", "data.batch": 4},
            "draft_vocab": vocab,
            "features": False,
        },
        "lm": {"changed": {"init_from": "lm", "data.batch": 4}, "draft_vocab": None, "features": False},
    }


def hash_of(path: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
