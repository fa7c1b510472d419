"""Figures of a comparison: what is read from metric logs, and that what is drawn is a whole picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxspec.evaluation import figures
from jaxspec.evaluation.comparison import Decoded, summaries
from jaxspec.evaluation.statistics import Counts


def test_a_curve_is_read_by_trained_tokens(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 3.0, "tokens_per_second": 9.0}, {"step": 2, "eval": {"simulated_tau": 1.5}}]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4, "loss": 2.0}]))
    curve = figures.read_curve("x", log, 100.0)
    assert curve.loss_tokens.tolist() == [200, 400] and curve.loss.tolist() == [3, 2]
    assert curve.eval_tokens.tolist() == [200] and curve.simulated_tau.tolist() == [1.5]
    log.write_text("")
    assert figures.read_curve("x", log, 100.0).loss.size == 0


def test_recipes_look_different():
    looks = figures._looks([f"recipe {i}" for i in range(21)])
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == 21


def test_a_recipe_looks_the_same_where_others_are_not_drawn():
    every = figures._looks(["a", "b", "c"])
    assert figures._looks(["c"], ["a", "b", "c"]) == {"c": every["c"]}


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert '".[plot]"' in (figures.missing() or "")


@pytest.mark.parametrize("rounds", [0, 400])
def test_what_is_drawn_is_a_picture_even_of_next_to_nothing(tmp_path: Path, rounds: int):
    pytest.importorskip("matplotlib")
    size = rounds // 10
    line = np.linspace(1, 2, size)
    figures.draw_learning_curves(
        tmp_path / "a.png", [figures.Curve("x", 1e6 * line, 99**line, 1e6 * line, line, (1.5e6,))]
    )
    counts = Counts(np.array([9, 9]), np.array([4, 4]), np.array([[rounds, rounds // 2, 0]] * 2))
    runs = [Decoded(name, 0, "chain:2", "chain:2", t, counts, 2, 1, 1) for name in "xy" for t in (0.0, 0.5, 1.0)]
    figures.draw_acceptance(tmp_path / "b.png", list(summaries(runs, ["s", "s"], "x")))
    assert [path.read_bytes()[1:4] for path in sorted(tmp_path.iterdir())] == [b"PNG", b"PNG"]
