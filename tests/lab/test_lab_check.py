"""Tests of `jaxspec lab check`: errors by hand, a ledger that is not measured twice, refusals."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from lab_toys import ROW, cost_table, times
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_USAGE
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.statistics import Interval
from jaxspec.lab.candidates import Limits
from jaxspec.lab.check import CheckedTree, rows_of, summarize, trees_of_sizes
from jaxspec.lab.cost_model import round_cost
from jaxspec.lab.profile import load_profile
from jaxspec.lab.replay import replay
from jaxspec.lab.search import Rated, rate_tree
from jaxspec.lab.simulate import simulate
from jaxspec.lab.trial import TriedTree
from jaxspec.serving import loading
from jaxspec.trees import StaticTree


def checked(batch: int, predicted: tuple[float, float], measured: tuple[float, float], shape=((0,),)) -> CheckedTree:
    """Returns a tree by tau and seconds of a round."""
    tau, seconds = predicted
    rated = Rated(StaticTree(shape), batch, 100, Interval(tau, tau, tau), seconds)
    return CheckedTree(rated, TriedTree(1.0, measured[0], measured[1]))


def test_errors_and_picks_by_hand():
    trees = [
        checked(2, (1.0, 0.02), (1.0, 0.025), shape=()),  # predicted at 100, measured at 80
        checked(2, (2.0, 0.02), (1.6, 0.02)),  # 200, 160
        checked(2, (1.8, 0.02), (1.8, 0.018), shape=((0,), (1,))),  # 180, 200
        checked(4, (1.0, 0.03), (1.0, 0.03), shape=()),  # exact
        checked(4, (1.5, 0.03), (1.5, 0.03)),
    ]
    assert trees[0].tokens_per_second == pytest.approx(80)
    assert trees[1].errors == pytest.approx({"tokens_per_second": 0.25, "tau": 0.25, "round_seconds": 0})
    found = summarize(trees)
    medians = {"tokens_per_second": 0.1, "tau": 0, "round_seconds": 0, "speedup": 0}
    assert found["median_error"] == pytest.approx(medians)
    assert found["worst_error"]["tokens_per_second"] == pytest.approx(0.25)
    assert found["worst_error"]["round_seconds"] == pytest.approx(-0.2)
    # Of all batches, whichever has it.
    assert summarize(trees[3:])["worst_error"]["tokens_per_second"] == pytest.approx(0)
    assert summarize([*trees[3:], *trees[:2]])["worst_error"]["tau"] == pytest.approx(0.25)
    first, second = (row["error_of_speedup"] for row in rows_of(trees[:3])[1:])
    assert first == pytest.approx(0) and second == pytest.approx(1.8 / 2.5 - 1)
    assert summarize(trees[:3])["bias"]["speedup"] == pytest.approx((0 + 1.8 / 2.5 - 1) / 2)
    assert found["picked_share"] == pytest.approx({"2": 0.8, "4": 1})


def test_trees_of_sizes_are_the_fastest_of_each_size_and_spread():
    profile = simulate(np.tile(ROW, (5, 1)), prompts=20, tokens=80, seed=0, source="s")
    cost = round_cost(cost_table(), 2, 1000)
    shapes = trees_of_sizes(profile, cost, Limits(nodes=24, depth=4), 6)
    sizes = [1 + len(shape) for shape in shapes]
    assert sizes == sorted(set(sizes)) and len(sizes) == 6 and sizes[0] == 2 and sizes[-1] == 24
    widest = max(b / a for a, b in itertools.pairwise(sizes))
    assert widest <= 2  # a step of the logarithm is 12 ** (1 / 5) = 1.64
    rates = [
        rate_tree(StaticTree(shape), cost, replay(profile, shape)).tokens_per_second.value
        for shape in (shapes[0], ((1,),))
    ]
    assert rates[0] >= rates[1]
    assert len(trees_of_sizes(profile, cost, Limits(nodes=3, depth=2), 12)) == 2


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Flags of a check of random models, whose profile is of other texts."""
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    profile = simulate(np.tile(ROW, (5, 1)), prompts=20, tokens=80, seed=0, source="s")
    facts = profile.facts | {"kind": "ranks", "target": str(target), "drafter": str(drafter)}
    dataclasses.replace(profile, facts=facts).save(tmp_path / "profile.npz")
    cost_table(contexts=(16, 64)).save(tmp_path / "costs.json")  # prompts here are short
    (tmp_path / "prompts.txt").write_text("how much is 2 and 3?\nsay it again\nwhat does everybody know\n")
    files = {"profile": "profile.npz", "cost": "costs.json", "prompts": "prompts.txt", "json": "found.json"}
    return [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]


def test_trees_are_decoded_once_and_set_beside_their_predictions(flags, tmp_path, capsys, monkeypatch):
    more = ["--batches", "1,2", "--tree", "chain:2", "--tree", "static:0,1", "--max-new-tokens", "8", "--repeats", "1"]
    assert main(["lab", "check", *flags, *more]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(r["batch"], r["spec"]) for r in found["rows"]] == [
        (b, spec) for b in (1, 2) for spec in ("none", "chain:2", "static:0,1")
    ]
    for row in found["rows"]:
        assert row["measured_tau"] >= 1 and row["measured_round_seconds"] > 0
        speed = row["batch"] * row["measured_tau"] / row["measured_round_seconds"]
        assert row["measured_tokens_per_second"] == pytest.approx(speed)
        error = row["predicted_tokens_per_second"] / speed - 1
        assert row["error_of_tokens_per_second"] == pytest.approx(error)
    assert found["rows"][0]["measured_tau"] == 1 and set(found["picked_share"]) == {"1", "2"}
    printed = capsys.readouterr().out
    assert "Batch 2, context" in printed and "6 predictions, errors in the median: tokens/s" in printed
    assert printed.count("at worst") == 4
    assert set(found["worst_error"]) == set(found["median_error"])

    monkeypatch.setattr("jaxspec.infer.lab_check.try_trees", None)  # a second run decodes nothing
    assert main(["lab", "check", *flags, *more]) == 0
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["rows"] == found["rows"]
    # Other costs are held to the same measurements.
    times(cost_table(contexts=(16, 64)), 2).save(tmp_path / "costs.json")
    assert main(["lab", "check", *flags, *more]) == 0
    slower = json.loads((tmp_path / "found.json").read_text())
    for row, before in zip(slower["rows"], found["rows"], strict=True):
        assert row["round_seconds"] == pytest.approx(2 * before["round_seconds"])
        assert row["error_of_speedup"] == pytest.approx(before["error_of_speedup"])
        assert row["measured_tau"] == before["measured_tau"]
    assert main(["lab", "check", *flags, *more, "--repeats", "3"]) == 1
    assert "repeats was 1, is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--tree", "lookup:4"], "is adaptive, so its rounds depend on seconds"),
        (["--max-new-tokens", "1"], "give at least 2"),
        (["--batches", "0"], "--batches is '0'"),
        (["--trees", "0"], "it must be at least 1"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, more, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["lab", "check", *flags, *more])
    assert stopped.value.code == EXIT_USAGE
    assert sentence in capsys.readouterr().err


def test_a_tree_that_cannot_be_predicted_is_refused_before_anything_is_decoded(flags, capsys, monkeypatch):
    monkeypatch.setattr("jaxspec.infer.lab_check.try_trees", None)
    assert main(["lab", "check", *flags, "--tree", "chain:2", "--tree", "chain:9"]) == 1
    assert "a tree 9 deep cannot be replayed on a profile of 5 depths" in capsys.readouterr().err


def test_simulated_texts_cannot_be_decoded(flags, tmp_path, capsys):
    simulate(np.tile(ROW, (5, 1)), prompts=20, tokens=80, seed=0, source="s").save(tmp_path / "profile.npz")
    assert main(["lab", "check", *flags]) == 1
    assert "holds simulated texts" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["drafter", "template"])
def test_a_profile_of_another_drafter_or_template_is_refused(flags, tmp_path, capsys, monkeypatch, other: str):
    profile = load_profile(tmp_path / "profile.npz")
    models = loading.load_models(str(tmp_path / "target"), drafter=str(tmp_path / "drafter"))
    hashes = {"drafter": fingerprint(models), **models.tokenizer.fingerprint}
    for made_with, code in ((hashes, 0), (hashes | {other: "0"}, 1)):
        dataclasses.replace(profile, facts=profile.facts | {"hashes": made_with}).save(tmp_path / "profile.npz")
        monkeypatch.setattr("jaxspec.infer.lab_check.check_all", lambda *_: iter(()))
        monkeypatch.setattr("jaxspec.infer.lab_check.summarize", lambda _: None)
        monkeypatch.setattr("jaxspec.infer.lab_check.print_summary", lambda *_: None)
        monkeypatch.setattr("jaxspec.infer.lab_check.make_result", lambda *_: {})
        assert main(["lab", "check", *flags]) == code
    assert f"the profile was made with another {other} than" in capsys.readouterr().err
