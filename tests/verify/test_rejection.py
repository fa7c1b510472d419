"""Rules for drawn children have exactly the target's distribution: every tree that can be drawn, and every coin, in
fp64."""

from __future__ import annotations

import functools
from typing import Any

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    PLAIN,
    RULES,
    SHAPES,
    T_AND_WARPS,
    UNCHANGED,
    Changes,
    TreeCase,
    Warp,
    accept,
    grow_with,
    measure,
    pair,
    same,
    warped,
)
from toys import path_tables

from jaxspec.base import DRAFT_MODES, Array, DraftMode, Tree
from jaxspec.trees import chain
from jaxspec.trees.children import drawn
from jaxspec.verify import rejection

pytestmark = pytest.mark.usefixtures("compile_fully")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", DRAFT_MODES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_exactly_the_targets_distribution(rule: str, mode: DraftMode, shape: str):
    s = SHAPES[shape]
    if (mode, shape) == ("sample", "deep dynamic"):
        s = s._replace(vocab=2)  # 59,049 trees otherwise
    with jax.enable_x64(True):
        for seed, case in enumerate(("random", "zeros", "same")):
            outcomes = measure(rule, mode, s, pair(case, seed, s), T_AND_WARPS)
            for warp, outcome in zip(T_AND_WARPS, outcomes, strict=True):
                assert outcome.distance < 1e-12, (case, warp)


# Wrong rules. The same measure must see each of them.


def worst(rule: str, mode: DraftMode, shape: str, changes: Changes = UNCHANGED, warp: Warp = PLAIN) -> float:
    """Returns the greatest distance over a few random pairs."""
    s = SHAPES[shape]
    with jax.enable_x64(True):
        pairs = [pair("random", seed, s) for seed in range(4)]
        return max(measure(rule, mode, s, tables, [warp], changes)[0].distance for tables in pairs)


def without_duplicates(tree: Tree) -> Tree:
    """Returns the tree without siblings that repeat a token, and without the nodes below them."""
    valid = np.array(tree.valid_BN)
    for n in range(1, valid.shape[1]):
        for m in range(1, n):
            twin = (tree.parent_BN[:, m] == tree.parent_BN[:, n]) & (tree.token_BN[:, m] == tree.token_BN[:, n])
            valid[:, n] &= ~np.asarray(twin)
        above = np.maximum(np.asarray(tree.parent_BN)[:, n], 0)[:, None]
        valid[:, n] &= np.take_along_axis(valid, above, 1)[:, 0]
    return tree._replace(valid_BN=valid)


@pytest.mark.parametrize("rule", RULES)
def test_leaving_out_duplicate_siblings_is_not_lossless(rule: str):
    assert worst(rule, "sample", "2x2", Changes(seen_tree=without_duplicates)) > 1e-3


@pytest.fixture
def changed_rules(monkeypatch: pytest.MonkeyPatch):
    """Patches the rules, and clears the programs compiled from them before and after."""
    accept.clear_cache()  # type: ignore[attr-defined]
    yield monkeypatch
    monkeypatch.undo()
    accept.clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_law_that_is_not_renormalised_is_not_lossless(rule: str, changed_rules: pytest.MonkeyPatch):
    changed_rules.setattr(rejection, "_next_draw", lambda mode, s_V, token: s_V.at[token].set(0))
    assert worst(rule, "swor", "2x2") > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_testing_likeliest_children_by_the_drafts_softmax_is_not_lossless(rule: str, changed_rules: pytest.MonkeyPatch):
    distribution = jax.nn.softmax(jnp.asarray(path_tables(900, 3, 0)[0][0, 0], jnp.float32))
    changed_rules.setattr(rejection, "_drawn_from", lambda mode, row, s_V, token: distribution.astype(s_V.dtype))
    assert worst(rule, "topk", "2x2") > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_one_uniform_for_all_tests_is_not_lossless(rule: str):
    grid = (np.arange(600)[:, None] + 0.5) / 600
    assert worst(rule, "swor", "2x2", Changes(coins=lambda tests: np.broadcast_to(grid, (600, tests)))) > 1e-2


def test_the_measure_of_reused_uniforms_is_finer_than_what_it_shows():
    """On a tree of one child the same grid gives its only test a uniform of its own, so nothing is reused."""
    grid = (np.arange(600)[:, None] + 0.5) / 600
    with jax.enable_x64(True):
        one = TreeCase(chain(1), 3, 1)
        coins = Changes(coins=lambda _: grid)
        (found,) = measure("recursive-rejection", "sample", one, pair("random", 0, one), [PLAIN], coins)
    assert found.distance < 3e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_bonus_token_from_the_plain_softmax_is_not_lossless(rule: str):
    assert worst(rule, "swor", "2x2", Changes(rest=same)) > 1e-3


def heated(distributions: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the distributions at temperature 1.5."""
    powers = [x ** (1 / 1.5) for x in distributions]
    return [x / x.sum(-1, keepdims=True) for x in powers]


@pytest.mark.parametrize("rule", RULES)
def test_top_p_before_temperature_is_not_lossless(rule: str):
    with jax.enable_x64(True):
        found = []
        for seed in range(4):
            tables = pair("random", seed, SHAPES["2x2"])
            wrong = heated(warped(tables[0], 1.0, 0, 0.8))
            changes = Changes(seen_distributions=lambda _, wrong=wrong: wrong)
            found += measure(rule, "swor", SHAPES["2x2"], tables, [(1.5, (0, 0.8))], changes)
    assert max(outcome.distance for outcome in found) > 1e-3


def upside_down(distributions: list[np.ndarray]) -> list[np.ndarray]:
    return [np.eye(x.shape[-1])[x.argmin(-1)] for x in distributions]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_rows_at_a_negative_temperature_are_not_greedy(rule: str):
    assert worst(rule, "swor", "2x2", Changes(seen_distributions=upside_down), (0.0, (0, 1.0))) > 1e-3


def choose_by_own(choose: Any, logits_BWV: Array, count: int, slot: int) -> Any:
    """Chooses children whose bound is their own probability."""
    found = choose(logits_BWV, count, slot)
    return found._replace(bound_BWR=found.logp_BWR)


def drawn_by_own(mode: DraftMode, temperature_B: Array, noise: Any) -> Any:
    """Returns the choice of drawn children, with `choose_by_own`."""
    return functools.partial(choose_by_own, drawn(mode, temperature_B, noise))


def test_keeping_drawn_nodes_by_their_own_probability_is_not_lossless(monkeypatch: pytest.MonkeyPatch):
    """A dynamic tree must not prefer the likelier of drawn tokens, as other systems do."""
    monkeypatch.setattr(enumeration, "drawn", drawn_by_own)
    grow_with.clear_cache()  # type: ignore[attr-defined]
    try:
        assert worst("recursive-rejection", "swor", "dynamic") > 1e-3
    finally:
        grow_with.clear_cache()  # type: ignore[attr-defined]
