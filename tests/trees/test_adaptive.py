"""Adaptive trees: what pays is drafted and verified, no more; without a price they are EAGLE-2's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import draft_from, path_tables

from jaxspec.base import Frontier
from jaxspec.trees import AdaptiveTree, DynamicTree
from jaxspec.trees.adaptive import MEMORY, Drafting, PolicyState, RoundPlan
from jaxspec.trees.children import drawn

VOCAB, BATCH = 5, 3
BASE = DynamicTree(8, 3, 3)
FREE = AdaptiveTree(BASE, (1, 3, 8), (1.0, 1.0, 1.0), 0.0, 0.0, rate=1.0)
NO_NOISE: Any = None


class TableDrafting:
    """Drafts by a table of the next tokens behind every path, each row by its own; counts the levels that run."""

    def __init__(self, seed: int) -> None:
        tables = path_tables(seed, VOCAB, 3, batch=BATCH)
        self.draft, self.root_logits_BV = draft_from(tables), jnp.asarray(tables[0][:, 0])
        self.calls: list[int] = []

    def __call__(self, scratch: jax.Array, frontier: Frontier) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: self.calls.append(frontier.depth))
        return self.draft(scratch, frontier)


def plan_of(tree: AdaptiveTree, drafting: TableDrafting, rate: float, running=(True,) * BATCH) -> RoundPlan:
    policy = tree.begin(jnp.zeros(BATCH, jnp.int32))
    policy = policy._replace(tokens_B=jnp.full(BATCH, rate), seconds_B=jnp.ones(BATCH))

    @jax.jit
    def program(policy: PolicyState) -> RoundPlan:
        choose, scratch = drawn("topk", jnp.zeros(BATCH), NO_NOISE), jnp.zeros((BATCH, tree.slots), jnp.int32)
        by = Drafting(drafting, choose, scratch, drafting.root_logits_BV, jnp.arange(BATCH))
        return tree.plan(by, policy, jnp.asarray(running))

    drafting.calls.clear()
    plan = jax.block_until_ready(program(policy))
    jax.effects_barrier()
    return plan


def base_tree(drafting: TableDrafting, nodes: int) -> Any:
    choose = drawn("topk", jnp.zeros(BATCH), NO_NOISE)
    base = dataclasses.replace(BASE, nodes=nodes)
    scratch = jnp.zeros((BATCH, base.slots), jnp.int32)
    return jax.jit(lambda: base.grow(drafting, choose, scratch, drafting.root_logits_BV, jnp.arange(BATCH)))()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nodes", [3, 8])
def test_where_nothing_has_a_price_every_budget_is_the_dynamic_trees(seed: int, nodes: int):
    drafting = TableDrafting(seed)
    plan = plan_of(FREE, drafting, rate=1.0)
    assert sorted(drafting.calls) == [1, 2] and int(plan.levels) == 3
    assert FREE.budgets[int(plan.index)] == 8  # more nodes cost nothing
    for a, b in zip(FREE.cut(plan, nodes)[:6], base_tree(drafting, nodes)[:6], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def values(plan: RoundPlan, running: Any = (True,) * BATCH) -> np.ndarray:
    """Expected tokens of the likeliest candidates of every row, best first, summed over the running rows."""
    score = np.sort(np.asarray(plan.pool.score_BQ, np.float64), axis=1)[:, ::-1][:, : BASE.nodes - 1]
    return np.cumsum(np.exp(score)[np.asarray(running)].sum(0))


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_the_one_that_pays_most(seed: int):
    rng = np.random.default_rng(seed)
    running = (True, *(rng.random(BATCH - 1) < 0.7))
    seconds = tuple(np.cumsum(rng.random(3) + 0.01))
    tree = dataclasses.replace(FREE, verify_seconds=seconds)
    rate = float(rng.choice([0.1, 0.5, 1.0, 3.0]))
    plan = plan_of(tree, TableDrafting(seed), rate, running)
    tokens = [0.0 if n == 1 else values(plan, running)[n - 2] for n in tree.budgets]
    worth = np.array(tokens) - rate * sum(running) * np.array(seconds)
    assert int(plan.index) == int(np.argmax(worth))


@pytest.mark.parametrize("price", [0.0, 0.3, 0.6, 0.9, 10.0])
def test_a_level_is_drafted_while_its_frontier_is_worth_its_seconds(price: float):
    drafting = TableDrafting(3)
    every = plan_of(FREE, drafting, 1.0)
    reached = [np.exp(np.asarray(every.pool.score_BQ[:, :3])).sum(1)]  # all of depth 1 is expanded
    deeper = np.asarray(every.pool.score_BQ[:, 3:12])
    reached.append(np.exp(np.sort(deeper, axis=1)[:, -3:]).sum(1))  # the beam of depth 2
    pays = [bool(0.8 * np.minimum(r, 1).sum() > BATCH * price) for r in reached]
    want = 1 + pays[0] + (pays[0] and pays[1])
    tree = dataclasses.replace(FREE, level_seconds=price, reach=(1.0, 0.8))
    plan = plan_of(tree, drafting, rate=1.0)
    assert int(plan.levels) == want and len(drafting.calls) == want - 1
    pool = np.asarray(plan.pool.score_BQ)
    known = [3, 12, 21][want - 1]
    np.testing.assert_array_equal(pool[:, :known], np.asarray(every.pool.score_BQ)[:, :known])
    assert np.all(pool[:, known:] == -np.inf)


def test_levels_that_are_not_drafted_hold_no_node():
    drafting = TableDrafting(1)
    tree = dataclasses.replace(FREE, level_seconds=100.0)
    cut = tree.cut(plan_of(tree, drafting, rate=1.0), 8)
    assert np.asarray(cut.valid_BN).sum(1).tolist() == [4] * BATCH  # the root and its three children
    assert np.all(np.asarray(cut.depth_BN)[np.asarray(cut.valid_BN)] <= 1)


def test_where_a_call_is_dear_plain_decoding_is_chosen():
    tree = dataclasses.replace(FREE, verify_seconds=(1.0, 5.0, 9.0), level_seconds=1.0)
    plan = plan_of(tree, TableDrafting(0), rate=10.0)
    assert int(plan.index) == 0 and int(plan.levels) == 1
    cut = tree.cut(plan, 1)
    assert cut.token_BN.shape == (BATCH, 1) and cut.ancestors_BNN.shape == (BATCH, 1, 1)


def test_a_calibration_that_changes_nothing_is_none():
    line = (tuple(np.linspace(0, 1, 257).tolist()),) * 2
    plans = [plan_of(t, TableDrafting(2), 1.0) for t in (FREE, dataclasses.replace(FREE, calibration=(line,)))]
    known = np.asarray(plans[0].pool.score_BQ)
    likely = known > np.log(0.01)
    np.testing.assert_allclose(np.asarray(plans[1].pool.score_BQ)[likely], known[likely], atol=1e-4)


def test_a_calibration_is_of_its_depth():
    halved = ((0.0, 1.0), (0.0, 0.5))
    same = ((0.0, 1.0), (0.0, 1.0))
    plan = plan_of(dataclasses.replace(FREE, calibration=(same, halved)), TableDrafting(2), 1.0)
    plain = plan_of(FREE, TableDrafting(2), 1.0)
    first, second = (np.asarray(p.pool.score_BQ[:, :3]) for p in (plan, plain))
    np.testing.assert_allclose(np.maximum(first, -9), np.maximum(second, -9), atol=1e-4)
    best = [np.max(np.asarray(p.pool.score_BQ[:, 3:12]), axis=1) for p in (plan, plain)]
    np.testing.assert_allclose(best[0], best[1] - np.log(2), atol=1e-4)


def test_a_row_learns_from_its_own_rounds_and_remembers_what_was_chosen():
    plan = plan_of(FREE, TableDrafting(0), 1.0)
    before = FREE.begin(jnp.zeros(BATCH, jnp.int32))
    count, running = jnp.asarray([0, 2, 3]), jnp.asarray([True, True, False])
    after = FREE.learn(before, plan, jnp.zeros((BATCH, 4), jnp.int32), count, running)
    began = FREE.rate * (FREE.fixed_seconds + FREE.verify_seconds[-1])
    np.testing.assert_allclose(
        after.tokens_B, [began + MEMORY * (1 - began), began + MEMORY * (3 - began), began], rtol=1e-6
    )
    assert np.asarray(after.budgets_BX).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert np.asarray(after.levels_BT).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


BAD: dict[str, dict[str, Any]] = {
    "must rise": {"budgets": (3, 1, 8)},
    "and 21 are drafted": {"budgets": (1, 3, 23)},
    "to draft from": {"base": None},
    "for each of its budgets": {"verify_seconds": (1.0,)},
    "all above 0": {"verify_seconds": (0.0, 1.0, 1.0)},
    "rate above 0": {"rate": 0.0},
    "map rising": {"calibration": (((0.5, 0.1), (0.0, 1.0)),)},
}


@pytest.mark.parametrize("complaint", BAD)
def test_an_adaptive_tree_that_cannot_be_is_refused(complaint: str):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(FREE, **BAD[complaint])


def test_drawn_children_are_refused():
    assert FREE.modes == ("topk",)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_ragged_budget_goes_to_the_likeliest_nodes_of_all_running_rows(seed: int, nodes: int):
    tree = dataclasses.replace(FREE, budgets=(1, nodes, 8), ragged=True)
    running = (True, bool(seed % 2), True)
    plan = plan_of(tree, TableDrafting(seed), 1.0, running)
    cut = tree.cut_ragged(plan, nodes, jnp.asarray(running))
    valid = np.asarray(cut.valid_BN)
    assert valid.sum() == BATCH * nodes and valid[:, 0].all()
    assert running[1] or valid[1].sum() == 1
    score = np.where(np.asarray(running)[:, None], np.asarray(plan.pool.score_BQ), -np.inf)
    most = np.sort(score, axis=1)[:, ::-1][:, : tree.nodes - 1]  # a row has at most the largest budget
    best = np.sort(most.ravel())[::-1][: BATCH * (nodes - 1)]
    kept = np.asarray(cut.score_BN)[:, 1:][valid[:, 1:]]
    np.testing.assert_allclose(np.sort(kept)[::-1], best, rtol=1e-6)
    parent, ancestors = np.asarray(cut.parent_BN), np.asarray(cut.ancestors_BNN)
    for b, n in zip(*np.nonzero(valid), strict=True):
        assert n == 0 or valid[b, parent[b, n]]
        assert not ancestors[b, n][~valid[b]].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_ragged_budget_is_the_one_that_pays_most(seed: int):
    rng = np.random.default_rng(seed)
    running = (True, *(rng.random(BATCH - 1) < 0.7))
    seconds, rate = tuple(np.cumsum(rng.random(3) + 0.01)), float(rng.choice([0.1, 0.5, 1.0, 3.0]))
    tree = dataclasses.replace(FREE, verify_seconds=seconds, ragged=True)
    plan = plan_of(tree, TableDrafting(seed), rate, running)
    score = np.sort(np.asarray(plan.pool.score_BQ, np.float64), axis=1)[:, ::-1][:, : BASE.nodes - 1]
    worth = np.sort(np.exp(score)[np.asarray(running)].ravel())[::-1]
    tokens = [worth[: BATCH * (n - 1)].sum() for n in tree.budgets]
    assert int(plan.index) == int(np.argmax(np.array(tokens) - rate * sum(running) * np.array(seconds)))


def test_budgets_are_whole_numbers():
    with pytest.raises(ValueError, match="whole numbers of nodes"):
        dataclasses.replace(FREE, budgets=(1.0, 3.0, 8.0))
