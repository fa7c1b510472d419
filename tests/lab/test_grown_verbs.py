"""The verbs of the lab with trees that are grown anew each round: predictions for one-pass drafters, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_toys import cost_table
from random_models import random_weights, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import save_drafter
from jaxspec.console.cli import EXIT_FAILED
from jaxspec.drafters import Medusa, MedusaConfig
from jaxspec.lab.profile import load_profile

PROMPTS = ("3 and 4 make 7, they say", "what do 5 and 6 make?", "8 and 9", "1 and 1 make 2, or so it seems")
BUDGET = ("--max-new-tokens", "24")
TREES = ("best_first:8x3x4", "dynamic:7x3x3", "chain:2")


class Place:
    """A target, two drafters, prompts, costs and profiles in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, write_target(folder / "target")
        one_pass = Medusa(MedusaConfig(32, 3))
        params = random_weights(one_pass, 0.1, 2)
        save_drafter(folder / "one_pass", "medusa", one_pass, params, {"tree": "chain:2"})
        write_drafter(folder / "by_level")
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
        cost_table(contexts=(16, 64)).save(folder / "costs.json")
        for name in ("one_pass", "by_level"):
            sizes = ("--depth", "3", "--ranks", "4", *BUDGET, "--out", str(folder / f"{name}.npz"))
            models = ("--target", str(self.target), "--drafter", str(folder / name))
            assert main(["lab", "profile", *models, "--prompts", str(folder / "prompts.txt"), *sizes]) == 0

    def run(self, verb: str, drafter: str, *more: str) -> int:
        files = ("--profile", str(self.folder / f"{drafter}.npz"), "--cost", str(self.folder / "costs.json"))
        return main(["lab", verb, *files, *more, "--json", str(self.folder / f"{verb}_{drafter}.json")])

    def found(self, verb: str, drafter: str = "one_pass") -> dict[str, Any]:
        return json.loads((self.folder / f"{verb}_{drafter}.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("grown"))


def test_a_check_finds_the_predicted_tau_in_decoding(place: Place):
    """Greedy, and of the profile's own prompts: prediction and measurement are of the same texts."""
    trees = [word for tree in TREES for word in ("--tree", tree)]
    prompts = ("--prompts", str(place.folder / "prompts.txt"))
    assert place.run("check", "one_pass", *prompts, *BUDGET, "--batches", "1", "--repeats", "1", *trees) == 0
    rows = place.found("check")["rows"]
    assert [row["spec"] for row in rows] == ["none", *TREES]
    for row in rows:
        assert row["expected_tau"] == pytest.approx(row["measured_tau"])
    assert rows[1]["expected_tau"] > 1 and (rows[1]["nodes"], rows[1]["depth"]) == (8, 3)
    # A second run takes the trees of the ledger.
    assert place.run("check", "one_pass", *prompts, *BUDGET, "--batches", "1", "--repeats", "1", *trees) == 0
    assert place.found("check")["rows"] == rows


@pytest.mark.parametrize("tree", TREES[:2])
def test_a_drafter_that_drafts_by_levels_is_refused_with_what_to_do(place: Place, tree: str, capsys: Any):
    prompts = ("--prompts", str(place.folder / "prompts.txt"))
    assert place.run("check", "by_level", *prompts, "--tree", tree) == EXIT_FAILED
    told = capsys.readouterr().err
    assert "a profile does not hold its probabilities off the text" in told and "jaxspec bench decode --tree" in told
    assert place.run("table", "by_level", "--tree", tree, "--batches", "1", "--contexts", "64") == EXIT_FAILED
    assert "drafts a level at a time" in capsys.readouterr().err


def test_a_search_shows_the_best_first_tree_of_a_one_pass_drafter(place: Place, capsys: Any):
    assert place.run("search", "one_pass", "--max-nodes", "12") == 0
    found = place.found("search")["best_first"]
    assert found["spec"].startswith("best_first:") and found["nodes"] <= 12 and found["expected_tau"] >= 1
    assert found["tokens_per_second_choosing"] > 0 and "best-first" in capsys.readouterr().out
    assert place.run("search", "by_level", "--max-nodes", "12") == 0
    assert place.found("search", "by_level")["best_first"] is None and "best-first" not in capsys.readouterr().out


def test_the_best_first_tree_is_measured_beside_the_others(place: Place):
    more = ("--measure", str(place.folder / "prompts.txt"), "--limit", "2", "--repeats", "1")
    assert place.run("search", "one_pass", "--max-nodes", "8", *more) == 0
    assert {"plain", "chosen", "best-first"} <= place.found("search")["measured"].keys()


def test_a_table_of_a_grown_tree_is_no_schedule_of_chains(place: Place):
    assert place.run("table", "one_pass", "--tree", "best_first:4x3x4", "--batches", "1,4", "--contexts", "64") == 0
    table = place.found("table")
    assert {row["spec"] for row in table["rows"]} == {"best_first:4x3x4"} and table["draft_len_schedule"] is None


def test_a_profile_at_a_temperature_holds_the_probabilities_of_the_target(place: Place):
    folder = place.folder
    models = (
        "--target",
        str(place.target),
        "--drafter",
        str(folder / "one_pass"),
        "--drafter",
        str(folder / "by_level"),
    )
    sizes = ("--depth", "2", "--ranks", "4", *BUDGET, "--temperature", "0", "1", "--top-k", "9")
    assert (
        main(["lab", "profile", *models, "--prompts", str(folder / "prompts.txt"), *sizes, "--out", f"{folder}/p"]) == 0
    )
    for name in ("one_pass", "by_level"):
        assert load_profile(folder / "p" / f"{name}_t0.npz").p_TK is None
        warm = load_profile(folder / "p" / f"{name}_t1.npz")
        assert warm.p_TK is not None and warm.p_TK.shape == (len(warm.prompt_T), 4)
        hit_TK = warm.rank_TD[:, :1] == np.arange(4)
        assert (warm.p_TK[hit_TK] > 0).all() and (warm.p_TK.sum(1) <= 1 + 1e-5).all()
