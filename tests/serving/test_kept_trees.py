"""The tree that a drafter's folder keeps: what decoding takes where none is named."""

import json
from pathlib import Path

import pytest
from random_models import random_weights, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import load_drafter, save_drafter
from jaxspec.drafters import Medusa, MedusaConfig
from jaxspec.interchange.target_folders import target_folder
from jaxspec.serving.loading import load_models, open_drafter
from jaxspec.trees import AdaptiveTree, DynamicTree, StaticTree, chain, kept_tree, parse_tree, policy_fields, tree_kept
from jaxspec.trees.lookup import LookupBranch
from jaxspec.trees.tree_file import write_tree

ADAPTIVE = AdaptiveTree(
    DynamicTree(4, 2, 2), (1, 4), (1.0, 1.5), level_seconds=0.1, fixed_seconds=0.2, rate=3.0, lookup=LookupBranch(3)
)


@pytest.mark.parametrize("tree", [chain(0), chain(3), DynamicTree(8, 3, 3), parse_tree("lookup:5"), ADAPTIVE])
def test_a_record_keeps_any_tree(tree: StaticTree | DynamicTree | AdaptiveTree):
    kept = json.loads(json.dumps(kept_tree(tree)))
    assert tree_kept(kept) == tree
    assert isinstance(kept, dict) == (tree is ADAPTIVE)


def test_a_tree_that_no_text_holds_whole_is_refused():
    with pytest.raises(ValueError, match="fields that its text does not hold"):
        kept_tree(chain(3, rows=8))
    for wrong in ({}, {"spec": "chain:1"}, 3):
        with pytest.raises(ValueError, match="a kept tree is a text or has a policy"):
            tree_kept(wrong)  # type: ignore[arg-type]


def test_an_export_with_another_tree_is_decoded_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    target, drafter, file = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter"), tmp_path / "a.json"
    write_tree(file, policy_fields(ADAPTIVE))
    out = tmp_path / "out"
    assert main(["export", str(drafter), str(out), "--tree", str(file)]) == 0
    assert load_models(str(target), drafter=out).engine.tree == ADAPTIVE
    assert load_models(str(target), drafter=out, tree="chain:2").engine.tree == chain(2)
    # Other formats say what they leave out by the tree's text.
    assert main(["export", str(out), str(tmp_path / "eagle"), "--to", "eagle", "--target", str(target)]) == 0
    assert f"its tree {ADAPTIVE.spec} is left out" in capfd.readouterr().err
    assert main(["export", str(target), str(tmp_path / "no"), "--tree", "chain:1"]) == 1
    assert "--tree is for a drafter" in capfd.readouterr().err


def test_a_drafter_that_was_saved_to_draft_nothing_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter", tree="none")
    load_models(str(target), drafter=drafter)
    assert "was saved with the tree none, so it drafts nothing: give --tree chain:3" in capfd.readouterr().err
    load_models(str(target), drafter=drafter, tree="none")
    assert "saved with" not in capfd.readouterr().err


def test_a_shallow_drafter_without_a_tree_drafts_as_deep_as_it_can(tmp_path: Path):
    target, folder = write_target(tmp_path / "target"), tmp_path / "medusa"
    module = Medusa(MedusaConfig(32, 3))
    save_drafter(folder, "medusa", module, random_weights(module, 0.3, 5))
    assert load_models(str(target), drafter=folder).engine.tree == DynamicTree(60, 3, 10)


def test_the_bundled_head_is_read_by_its_name(capfd: pytest.CaptureFixture[str]):
    head = open_drafter("smollm2-head")
    assert head.name == "eagle" and head.module.feature_width == 576
    assert head.draft_vocab is not None and 0 <= head.draft_vocab[0] and head.draft_vocab[-1] < 49_152
    assert tree_kept(head.about["tree"]).nodes > 1 and head.about["target"] == "smollm2"
    assert load_drafter(target_folder("smollm2-head")).draft_vocab == head.draft_vocab
    assert main(["generate", "Hi", "--drafter", "smollm2-head"]) == 1
    assert "reads features of width 576, and the target's are 256 wide" in capfd.readouterr().err
    assert main(["inspect", "smollm2-head"]) == 0
