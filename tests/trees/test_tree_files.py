"""Tests of tree files: they name a tree wherever the text of one is taken, and broken ones are refused by name."""

import json
from pathlib import Path

import pytest

from jaxspec.trees import (
    AdaptiveTree,
    DynamicTree,
    StaticTree,
    chain,
    other_batches,
    parse_tree,
    policy_fields,
    read_tree,
    resolve_tree,
    write_tree,
)

WIDE = StaticTree(((0,), (12,), (0, 0), (12, 10), (3,)))


@pytest.mark.parametrize("tree", [chain(0), chain(4), WIDE, StaticTree(((0,), (1,), (1, 0))), DynamicTree(20, 4, 5)])
def test_a_tree_comes_back_from_its_file(tree: StaticTree | DynamicTree, tmp_path: Path):
    path = tmp_path / "made" / "tree.json"
    write_tree(path, {"spec": tree.spec, "nodes": tree.nodes})
    assert parse_tree(str(path)) == tree
    assert parse_tree(f" {path} ").spec == tree.spec
    assert read_tree(path)["nodes"] == tree.nodes
    assert resolve_tree(str(path)) == tree.spec


def test_a_text_that_is_no_file_stays_as_it_is():
    assert resolve_tree("static:eagle1") == "static:eagle1"
    with pytest.raises(ValueError, match=r"FILE\.json"):
        resolve_tree("bush:4")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "jaxspec tree 1"}',
        '{"format": "jaxspec tree 1", "spec": 4}',
        '{"format": "jaxspec tree 2", "spec": "chain:4"}',
        '{"format": "jaxspec tree 1", "spec": "bush:4"}',
        '{"format": "jaxspec tree 1", "spec": "static:00"}',
        '{"format": "jaxspec tree 1", "spec": "other.json"}',
    ],
)
def test_a_broken_file_is_refused_by_its_name(text: str, tmp_path: Path):
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tree\.json: "):
        parse_tree(str(path))


def test_a_missing_file_and_bytes_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match="no such tree file"):
        parse_tree(str(tmp_path / "none.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.json"):
        parse_tree(str(tmp_path / "bytes.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"folder\.json"):
        parse_tree(str(tmp_path / "folder.json"))


def test_an_adaptive_file_of_another_batch_is_told_in_one_sentence(tmp_path: Path):
    one = AdaptiveTree(DynamicTree(4, 2, 2), (1, 4), (1.0, 2.0), level_seconds=0.1, fixed_seconds=0.1, rate=1.0)
    adaptive, static = str(tmp_path / "adaptive.json"), str(tmp_path / "static.json")
    write_tree(adaptive, {**policy_fields(one), "batch": 2})
    write_tree(static, {"spec": "chain:2", "batch": 2})
    (note,) = other_batches([adaptive, static, "chain:4", None], 8)
    assert note.startswith(f"note: {adaptive}: its costs are of a batch of 2, and up to 8 rows")
    assert "\n" not in note and "--batch 8" in note
    assert other_batches([adaptive, static], 2) == []
    # Nobody said for which batch a file by hand is.
    write_tree(adaptive, policy_fields(one))
    assert other_batches([adaptive], 8) == []


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path):
    write_tree(tmp_path / "a.json", {"spec": "none", "tau_low": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["tau_low"] is None
