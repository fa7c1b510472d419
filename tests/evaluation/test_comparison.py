"""Figures of a comparison: bootstrap distributions, pairing, acceptance by depth, budgets, and cut trees."""

from __future__ import annotations

import numpy as np
import pytest

from jaxspec.console.results import jsonable
from jaxspec.console.tables import cell
from jaxspec.evaluation.comparison import EVERY, Decoded, seed_rows, summaries, tables
from jaxspec.evaluation.statistics import Counts, acceptance, pool, ratio_interval, resamples, tau_interval
from jaxspec.training.recipes import steps_for
from jaxspec.trees import cut_tree, parse_tree


def counts(tokens: object, calls: object, accepted: object = None) -> Counts:
    tokens, calls = np.asarray(tokens), np.asarray(calls)
    return Counts(tokens, calls, np.zeros((len(tokens), 3), int) if accepted is None else np.asarray(accepted))


def synthetic(seed: int, prompts: int = 80, rate: float = 2.5) -> Counts:
    """Prompts whose tau scatters about `rate`, in proportion to their own difficulty."""
    draw = np.random.default_rng(seed)
    calls = draw.integers(5, 60, prompts)
    difficulty = (
        np.random.default_rng(99).uniform(0.6, 1.4, prompts) if seed >= 1000 else draw.uniform(0.6, 1.4, prompts)
    )
    return counts(draw.poisson(calls * rate * difficulty), calls)


def test_the_interval_of_prompts_that_are_alike_is_a_point():
    assert tau_interval(counts([6] * 9, [2] * 9)) == (3.0, 3.0, 3.0)
    assert tau_interval(counts([6, 60, 3], [2, 20, 1])) == (3.0, 3.0, 3.0)


def test_tau_is_the_ratio_of_the_sums_and_lies_in_its_interval():
    found = tau_interval(counts([10, 2, 9], [2, 2, 3]))
    assert found.value == 3.0 and 1.0 <= found.low < 3.0 < found.high <= 5.0


def test_nine_in_ten_intervals_or_more_cover_the_true_tau():
    """Nominally 95 %; the percentile bootstrap of 80 prompts falls a little short."""
    covered = [found.low <= 2.5 <= found.high for found in (tau_interval(synthetic(seed)) for seed in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_ratio_of_equal_arms_is_exactly_one_and_a_point():
    arm = synthetic(3)
    assert ratio_interval(arm, arm) == (1.0, 1.0, 1.0)
    assert ratio_interval(counts(2 * arm.tokens_P, arm.calls_P), arm) == (2.0, 2.0, 2.0)


def test_pairing_takes_out_what_makes_prompts_hard():
    one, other = synthetic(1000), synthetic(1001)
    paired = ratio_interval(one, other)
    alone = tau_interval(one)
    assert paired.low < paired.value < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / alone.value


def test_arms_of_other_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="2 prompts cannot be paired with 3"):
        ratio_interval(counts([1, 2], [1, 1]), counts([1, 2, 3], [1, 1, 1]))


def test_resamples_are_fixed_and_whole():
    assert np.array_equal(resamples(7), resamples.__wrapped__(7))
    assert (resamples(7).sum(axis=1) == 7).all()


def test_no_call_is_no_tau():
    assert np.isnan(tau_interval(counts([0, 0], [0, 0]))).all()
    assert tau_interval(counts([0, 4], [0, 2])).value == 2.0


def test_acceptance_by_depth_is_conditional():
    found = acceptance(np.array([4, 3, 2, 1]))
    assert np.allclose(found.rate_T, [6 / 10, 3 / 6, 1 / 3]) and found.rounds_T.tolist() == [10, 6, 3]
    assert np.isnan(acceptance(np.array([5, 0, 0])).rate_T).tolist() == [False, True]


def test_a_budget_is_the_fewest_steps_that_hold_it():
    assert steps_for([5, 5, 4, 5], 10) == (2, 10)
    assert steps_for([5, 5, 4, 5], 11) == (3, 14)
    assert steps_for(iter([5, 5]), 10) == (2, 10)
    with pytest.raises(ValueError, match="ends after 10 tokens, before the 11"):
        steps_for([5, 5], 11)


@pytest.mark.parametrize(
    ("tree", "depth", "cut"),
    [
        ("chain:4", 2, "chain:2"), ("chain:2", 4, "chain:2"), ("static:0,1,00,10,000", 2, "static:0,1,00,10"),
        ("dynamic:60x6x10", 8, "dynamic:60x6x10"), ("dynamic:60x6x10", 3, "dynamic:60x3x10"),
        ("dynamic:60x6x10", 1, "dynamic:11x1x10"), ("dynamic:9x3x2", 0, "none"),
    ],
)  # fmt: skip
def test_a_tree_is_cut_to_the_depth_of_its_drafter(tree: str, depth: int, cut: str):
    assert cut_tree(parse_tree(tree), depth).spec == cut


def run(recipe: str, seed: int, found: Counts, drafted: str = "chain:2") -> Decoded:
    return Decoded(recipe, seed, "chain:2", drafted, 0.0, found, 2, 1000, 5000)


SOURCES = ["a", "b", "a", "b"]
BASE = counts([4, 6, 8, 3], [2, 3, 2, 3], [[1, 0, 1], [1, 1, 1], [0, 1, 1], [2, 1, 0]])
BETTER = counts([8, 12, 16, 6], [2, 3, 2, 3], BASE.accepted_PA)


def test_a_row_for_every_seed_and_source():
    rows = list(seed_rows([run("x", 0, BASE), run("x", 1, BETTER)], SOURCES))
    assert [(r["seed"], r["source"], r["prompts"]) for r in rows[:3]] == [(0, EVERY, 4), (0, "a", 2), (0, "b", 2)]
    assert rows[1]["tau"] == 3.0 and rows[4]["tau"] == 6.0
    assert rows[0]["drafter_parameters"] == 1000 and rows[0]["train_tokens"] == 5000 and jsonable(rows)


def test_ratios_are_taken_over_shared_seeds():
    runs = [run("x", 0, BASE), run("x", 1, BETTER), run("y", 1, BETTER), run("z", 7, BETTER)]
    found = {r["recipe"]: r for r in summaries(runs, SOURCES, "x") if r["source"] == EVERY}
    assert found["x"]["ratio"] == found["x"]["ratio_low"] == found["x"]["ratio_high"] == 1.0
    assert found["y"]["ratio"] == 1.0 and found["z"]["ratio"] == pytest.approx(2 / 1.5)
    assert found["x"]["tau"] == tau_interval(pool([BASE, BETTER])).value and found["x"]["tau_by_seed"] == [2.1, 4.2]


def test_without_the_baseline_there_are_tables_and_no_ratio():
    found = list(summaries([run("y", 0, BETTER), run("short", 0, BASE, "chain:1")], SOURCES, "x"))
    assert {r["ratio"] for r in found} == {None}
    shown = list(tables(found))
    assert [len(row) for t in shown for row in t.rows] == [len(t.columns) for t in shown for _ in t.rows]
    assert shown[0].rows[0][2] == "-" and shown[0].rows[1][-1] == "chain:1"
    assert all(cell(x) is not None for t in shown for row in t.rows for x in row)
