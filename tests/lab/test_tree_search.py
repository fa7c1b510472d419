"""Tests of the search for a tree: the choice by replay, plain decoding among the candidates, halves of the prompts."""

import functools
import time

import numpy as np
import pytest
from brute_shapes import every_tree
from lab_toys import ROW, cost_table, ridge_cost, times

from jaxspec.evaluation.statistics import Interval
from jaxspec.lab.candidates import Limits, ReplayedShapes, find_candidates
from jaxspec.lab.cost_model import RoundCost, round_cost
from jaxspec.lab.costs import CostRow, CostTable
from jaxspec.lab.drawing import draw
from jaxspec.lab.forest import Shape, make_forest, shape_of
from jaxspec.lab.optimal import heap
from jaxspec.lab.profile import Profile, split_prompts
from jaxspec.lab.replay import node_shares, replay_calls, tokens_of
from jaxspec.lab.search import NEAR, Rated, Search, frontier, pick
from jaxspec.lab.simulate import join, simulate
from jaxspec.trees import chain

STAIRS = {"row_steps": {"ends": [], "every": 4}}


@functools.cache
def toy() -> Profile:
    """Returns a profile of the specification's toy rates."""
    return simulate(np.tile(ROW, (6, 1)), prompts=80, tokens=129)


def test_the_toy_search_finds_the_trees_of_the_specification():
    """By the table they are (120, 6), (24, 4) and (8, 5); of shapes as good on these prompts it takes smaller ones."""
    costs = [ridge_cost(240, batch) for batch in (2, 8, 64)]
    search = Search(toy(), costs, Limits(nodes=128, multiple=8))
    wide, middle, narrow = (search.choose(cost).chosen.tree for cost in costs)
    assert 104 <= wide.nodes <= 120 and wide.depth == 6
    assert middle.nodes == 24 and middle.depth in (4, 5)
    assert narrow.nodes == 8 and narrow.depth in (4, 5)
    assert search.choose(ridge_cost(153, 64)).chosen.tree.spec == "none"


def test_no_tree_pays_where_a_twentieth_is_accepted():
    profile = simulate(np.full((6, 1), 0.05), prompts=20, tokens=100)
    cost = RoundCost(1, 512, 1.1, 1 + 0.02 * np.arange(65), np.full(65, 0.3), np.full(9, 0.3), 0.1)
    choice = Search(profile, [cost], Limits()).choose(cost)
    assert choice.chosen.tree.spec == "none" and choice.index == 0
    assert choice.chosen.tokens_per_second.value == choice.plain.tokens_per_second.value == pytest.approx(1 / 1.1)
    assert choice.runner_up is not None and choice.runner_up.tree.nodes > 1


def test_the_choice_is_near_the_best_of_all_small_trees_on_the_choosing_prompts():
    profile = simulate([[0.5, 0.25, 0.1], [0.6, 0.1, 0.05], [0.5, 0.2, 0.1]], prompts=60, tokens=80)
    cost = ridge_cost(6, 1, nodes=8, step=1)
    shapes = [shape_of(tree) for nodes in range(1, 8) for tree in every_tree(nodes, 3, 3)]
    forest = make_forest(shapes)
    whole = ReplayedShapes(forest, replay_calls(profile, forest), tokens_of(profile), None, 0)  # type: ignore[arg-type]
    limits = Limits(nodes=7, depth=3)
    found = find_candidates(profile, [cost], limits)
    assert found.rates(cost, limits).max() >= 0.999 * whole.rates(cost, limits).max()


def test_a_search_for_wide_stairs_tries_every_depth_and_every_number_of_nodes():
    found = find_candidates(toy(), [ridge_cost(240, 1)], Limits(nodes=20, depth=4))
    tried = {(len(shape) + 1, len(shape[-1]) if shape else 0) for shape in found.forest.shapes}
    assert {nodes for nodes, _ in tried} == set(range(1, 21))
    assert {(d + 1, d) for d in range(5)} <= tried


def rate_of(found: ReplayedShapes, cost: RoundCost, shape: Shape) -> float:
    """Returns tokens a second of a tree by the table of the search."""
    forest = make_forest([shape])
    return float(forest.sums(found.table.values(forest))[0] / cost.round_seconds(forest.nodes_S, forest.width_SD)[0])


def test_on_stairs_the_search_has_the_best_of_all_trees_where_a_first_fall_has_not():
    """Stairs are of padded rows of a table of costs; all trees of up to 9 nodes are tried beside the search."""
    rng, early = np.random.default_rng(0), 0
    shapes = [shape_of(tree) for nodes in range(1, 10) for tree in every_tree(nodes, 3, 3)]
    for _ in range(12):
        rates = np.tile(-np.sort(-rng.dirichlet(np.ones(4))[:3]), (3, 1))
        flat, rise = rng.uniform(0.5, 5), rng.uniform(0.02, 0.6)
        rows = [("verify", n, 0, flat + rise * -(-n // 4)) for n in (4, 8, 9)]
        rows += [("draft", 1, w, 0.01) for w in (1, 4)] + [("extend", 1, 0, 0.01), ("plain", 1, 0, flat + rise)]
        table = CostTable(tuple(CostRow("measured", "toy", p, n, w, 1, 64, t) for p, n, w, t in rows), STAIRS)
        cost = round_cost(table, 1, 64)
        found = find_candidates(simulate(rates, prompts=20, tokens=60), [cost], Limits(nodes=9, depth=3))
        best = max(rate_of(found, cost, shape) for shape in shapes)
        assert max(rate_of(found, cost, shape) for shape in found.forest.shapes) == pytest.approx(best)
        order = [path for path, _ in heap(found.table, 9)]
        rate = [rate_of(found, cost, shape_of(order[:n])) for n in range(2, 10)]
        falls = np.flatnonzero(np.diff(rate) < 0)
        early += rate[falls[0] if falls.size else -1] < best - 1e-9
    assert early > 2


@pytest.mark.slow
def test_a_search_over_ten_thousand_shapes_replays_as_many_in_seconds():
    """Twenty seconds are aimed at; three times as many are allowed, for machines that are busy."""
    rng = np.random.default_rng(2)
    rates = -np.sort(-rng.dirichlet(np.ones(9) / 2, 8)[:, :8], axis=1)
    profile = simulate(rates, prompts=64, tokens=129, seed=1)
    costs = [ridge_cost(ridge, batch, nodes=224, step=1) for ridge in (153, 240, 560) for batch in (1, 4, 16, 64)]
    started = time.monotonic()
    search = Search(profile, costs, Limits(nodes=224), most=10_000)
    choices = [search.choose(cost) for cost in costs]
    assert time.monotonic() - started < 60
    assert search.candidates.tried >= 10_000 and len(search.candidates.forest.shapes) == 10_000
    assert len({choice.chosen.tree.spec for choice in choices}) > 3


def test_limits_hold():
    cost = ridge_cost(240, 2)
    found = find_candidates(toy(), [cost], Limits(nodes=30, depth=3, branch=2, multiple=8))
    for shape in found.forest.shapes:
        assert (len(shape) + 1) % 8 == 0 or shape == ()
        assert all(len(path) <= 3 and max(path) < 2 for path in shape)
    chains = find_candidates(toy(), [cost], Limits(branch=1, depth=5))
    assert [len(shape) for shape in chains.forest.shapes] == list(range(6))
    assert find_candidates(toy(), [cost], Limits(nodes=1)).forest.shapes == ((),)
    assert find_candidates(toy(), [cost], Limits(depth=0)).forest.shapes == ((),)
    few = find_candidates(toy(), [cost], Limits(nodes=30), most=40)
    assert len(few.forest.shapes) == 40 and () in few.forest.shapes
    assert few.tried > 200


def test_the_memory_of_the_caches_limits_nodes_and_refuses_what_plain_decoding_does_not_fit():
    cost = ridge_cost(240, 4)
    room = Limits(cache_bytes=4 * 100 * (512 + 10), bytes_per_token=100)
    assert room.allow(cost) == 10
    assert Search(toy(), [cost], room).choose(cost).chosen.tree.nodes <= 10
    with pytest.raises(ValueError, match="lower the batch"):
        Limits(cache_bytes=100, bytes_per_token=100).allow(cost)
    with pytest.raises(ValueError, match="bytes that a token takes"):
        Limits(cache_bytes=100)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"multiple": 0}, {"depth": -1}, {"branch": 0}])
def test_limits_that_leave_nothing_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="at least"):
        Limits(**wrong)


def test_the_choice_stays_when_all_times_scale():
    table = cost_table()
    specs = []
    for factor in (1.0, 1e-3, 37.0):
        cost = round_cost(times(table, factor), 4, 512)
        specs.append(Search(toy(), [cost], Limits(nodes=32)).choose(cost).chosen.tree.spec)
    assert len(set(specs)) == 1 and specs[0] != "none"


def test_a_tree_on_a_dearer_chip_is_smaller():
    costs = [ridge_cost(240, batch, step=1) for batch in (1, 8, 32)]
    search = Search(toy(), costs, Limits(nodes=64))
    nodes = [search.choose(cost).chosen.tree.nodes for cost in costs]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > nodes[-1]


def test_of_shapes_that_prompts_cannot_tell_apart_the_smallest_is_picked():
    profile, cost = toy(), ridge_cost(240, 1)
    found = find_candidates(profile, [cost], Limits(nodes=64))
    rate_S = found.rates(cost, Limits(nodes=64))
    picked, best = pick(found, rate_S), int(rate_S.argmax())
    assert found.forest.nodes_S[picked] <= found.forest.nodes_S[best]
    assert rate_S[picked] >= NEAR * rate_S[best]
    # Equal rates: fewer nodes, then fewer levels.
    assert pick(found, np.ones(len(rate_S))) == 0


def test_the_prompts_that_choose_are_not_those_that_report_and_halves_have_all_sources():
    profile = join([simulate([[0.5]], prompts=n, source=s) for n, s in ((5, "a"), (4, "b"), (1, "c"))])
    choosing, reporting = split_prompts(profile)
    assert sorted([*choosing, *reporting]) == list(range(10))
    assert {len(choosing), len(reporting)} == {5}
    assert all({profile.sources[p] for p in half} >= {"a", "b"} for half in (choosing, reporting))
    with pytest.raises(ValueError, match="one prompt"):
        split_prompts(simulate([[0.5]], prompts=1))


def half_profile(choosing: float, reporting: float) -> Profile:
    """Returns two prompts, which keep drafted tokens at these rates: one chooses, one reports."""
    parts = [simulate([[rate]], prompts=1, tokens=60) for rate in (choosing, reporting)]
    first, _ = split_prompts(join(parts))
    return join(parts if first[0] == 0 else parts[::-1])


def test_a_tree_that_was_only_lucky_is_reported_for_what_it_is():
    """The prompts that report have no say in the choice, not even for plain decoding, and a sentence warns."""
    cost = ridge_cost(240, 1)
    choice = Search(half_profile(1.0, 0.0), [cost], Limits()).choose(cost)
    assert choice.chosen.tree.nodes > 1 and choice.chosen.tau.value == 1
    assert choice.chosen.tokens_per_second.value < choice.plain.tokens_per_second.value
    assert choice.choosing[0] > choice.choosing[2]
    assert choice.doubt is not None and "slower than plain decoding" in choice.doubt


def test_plain_decoding_is_chosen_where_the_choosing_prompts_have_it_fastest():
    cost = ridge_cost(240, 1)
    choice = Search(half_profile(0.0, 1.0), [cost], Limits()).choose(cost)
    assert choice.chosen.tree.spec == "none" and choice.index == 0


def test_reported_gains_are_not_cut_off_at_plain_decoding():
    """If no tree helps, those that were lucky lose as often and as much as others win on the prompts that report."""
    cost = RoundCost(1, 512, 1.0, np.ones(65), np.full(65, 0.0), np.full(9, 0.29), 0.0)
    gains = []
    for seed in range(60):
        profile = simulate([[0.29]], prompts=8, tokens=40, seed=seed)
        choice = Search(profile, [cost], Limits(nodes=2), seed=seed).choose(cost)
        gains.append(choice.chosen.tokens_per_second.value / choice.plain.tokens_per_second.value - 1)
    assert min(gains) < -0.01 and abs(np.mean(gains)) < 0.01


def test_a_choice_under_errors_loses_nothing_to_itself_and_little_to_others():
    cost = ridge_cost(240, 8)
    search = Search(toy(), [cost], Limits(nodes=64, multiple=8))
    choice = search.choose(cost)
    rows = search.sensitivity(cost, choice.index)
    assert {(row["error"], row["factor"]) for row in rows} == {
        (name, factor) for name in ("acceptance", "target", "draft", "other") for factor in (0.9, 1.1)
    }
    assert all(0 <= row["lost"] < 0.1 for row in rows)
    by_error = {(row["error"], row["factor"]): row["predicted_tokens_per_second"] for row in rows}
    assert by_error["acceptance", 0.9] < by_error["acceptance", 1.1]
    assert by_error["target", 0.9] > by_error["target", 1.1]


def test_a_profile_without_starts_and_one_of_another_rule_are_refused():
    cost = ridge_cost(240, 1)
    with pytest.raises(ValueError, match="no starts"):
        find_candidates(simulate([[0.5]], prompts=3, tokens=1), [cost], Limits())
    with pytest.raises(ValueError, match="target-draw"):
        find_candidates(simulate([[0.5]], facts={"rule": "block", "kind": "ranks"}), [cost], Limits())


def test_drawn_children_are_never_chosen_out_of_turn():
    profile = simulate([[0.2, 0.1, 0.5]] * 3, prompts=20, facts={"mode": "swor"})
    found = find_candidates(profile, [ridge_cost(240, 1)], Limits(nodes=12))
    for shape in found.forest.shapes:
        assert all(path[-1] == 0 or (*path[:-1], path[-1] - 1) in shape for path in shape)
    drawn = find_candidates(simulate([[0.2, 0.1, 0.5]] * 3, prompts=20), [ridge_cost(240, 1)], Limits(nodes=12))
    assert any((2,) in shape and (1,) not in shape for shape in drawn.forest.shapes)


def test_the_frontier_holds_what_nothing_beats_in_both():
    def point(batch: int, tau: float, seconds: float) -> Rated:
        return Rated(chain(0), batch, 512, Interval(tau, tau, tau), seconds)

    slow, fast, beaten, batched = point(1, 2, 1.0), point(1, 2, 0.5), point(2, 1, 0.5), point(8, 2, 1.0)
    assert frontier([slow, beaten, batched, fast]) == [fast, batched]


def test_a_drawing_has_a_line_a_node_and_counts_those_it_leaves_out():
    profile = toy()
    shape = shape_of([(0,), (1,), (0, 0), (0, 1), (2,)])
    lines = draw(shape, node_shares(profile, shape)).split("\n")
    assert lines[0] == "root" and len(lines) == 6
    assert lines[1].startswith("├─ 0  ") and lines[2].startswith("│  ├─ 0") and lines[5].startswith("└─ 2")
    short = draw(shape, node_shares(profile, shape), most=3).split("\n")
    assert len(short) == 4 and "3 nodes" in short[-1]
    assert draw((), {(): 1.0}) == "root"
