"""Looked-up branches: the place that is found, what it promises, what a row counts, and how it joins a drafted pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import ROOT, Lookup
from jaxspec.drafters.prompt_lookup import look_up
from jaxspec.trees.dynamic import Candidates, best_of_pool
from jaxspec.trees.lookup import Branch, LookupBranch, MatchCounts, attach

LONGEST, SLOTS = 4, 40


def found_slowly(text: list[int]) -> tuple[int, int]:
    """Returns the match and the index behind it, the longest of all earlier places, of equals the latest."""
    best = (0, 0)
    for at in range(1, len(text)):
        match = 0
        while match < min(LONGEST, at) and text[at - 1 - match] == text[len(text) - 1 - match]:
            match += 1
        best = max(best, (match, at)) if match else best
    return best


def padded(texts: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    tokens = np.full((len(texts), SLOTS), 1, np.int32)  # a token of the texts: what is behind them must not count
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(tokens), jnp.asarray([len(t) for t in texts])


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_and_latest_earlier_place_is_found(seed: int):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 3, rng.integers(1, SLOTS + 1)).tolist() for _ in range(24)] + [[5], [5, 5], [1, 2, 3]]
    lookup = jax.jit(look_up, static_argnums=2)(*padded(texts), LONGEST)
    for text, at, match in zip(texts, lookup.at_B.tolist(), lookup.match_B.tolist(), strict=True):
        want = found_slowly(text)
        assert match == want[0] and (not match or at == want[1]), text


def looked(*texts: list[int]) -> Lookup:
    return look_up(*padded(list(texts)), LONGEST)


NOTHING = LookupBranch(6, (0.2, 0.4, 0.8), 2.0).begin(jnp.zeros(3, jnp.int32))
BRANCH = LookupBranch(6, (0.2, 0.4, 0.8), 2.0)


def test_a_branch_repeats_what_stood_behind_and_goes_round_where_it_meets_the_end():
    branch = BRANCH.branch(looked([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], [7, 8, 9, 7, 8, 9], [1, 2]), NOTHING)
    assert branch.token_BK[:2].tolist() == [[3, 4, 5, 6, 7, 8], [7, 8, 9, 7, 8, 9]]
    assert branch.match_B.tolist() == [2, 3, 0]
    chances = [[0.4, 0.8, 0.8, 0.8, 0.8, 0.8], [0.8] * 6, [0.0] * 6]
    np.testing.assert_allclose(jnp.exp(branch.logp_BK), np.cumprod(chances, axis=1), rtol=1e-5)


def test_a_row_counts_by_the_length_of_the_match_and_only_what_it_has_seen():
    branch = BRANCH.branch(looked([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], [7, 8, 9, 7, 8, 9], [1, 2]), NOTHING)
    token_BP = jnp.asarray([[3, 4, 9, 0], [7, 8, 9, 7], [3, 4, 5, 6]])
    counts = BRANCH.count(NOTHING, branch, token_BP, jnp.asarray([2, 1, 3]), jnp.asarray([True, True, True]))
    # The first: right behind matches of 2 and 3, wrong behind one of 4. The second wrote two tokens, both right.
    assert counts.right_BM.tolist() == [[0, 1, 1], [0, 0, 2], [0, 0, 0]]
    assert counts.tried_BM.tolist() == [[0, 1, 2], [0, 0, 2], [0, 0, 0]]
    ended = BRANCH.count(NOTHING, branch, token_BP, jnp.asarray([2, 1, 3]), jnp.zeros(3, bool))
    assert not np.asarray(ended.tried_BM).any()
    again = BRANCH.branch(looked([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], [7, 8, 9, 7, 8, 9], [1, 2]), counts)
    want = [(0.8 + 1) / 3, (1.6 + 1) / 4, (1.6 + 2) / 4]
    np.testing.assert_allclose(jnp.exp(again.logp_BK[:2, 0]), [want[0], want[2]], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(again.logp_BK[0, 1]), want[0] * want[1], rtol=1e-5)


def pool_of(*rows: list[tuple[int, int, float]]) -> Candidates:
    """Candidates (token, parent, probability of the path)."""
    token, parent, p = (jnp.asarray(x) for x in zip(*(zip(*row, strict=True) for row in rows), strict=True))
    score = jnp.log(p.astype(jnp.float32))
    return Candidates(token, score, score, parent)


def branch_of(tokens: list[list[int]], chances: list[list[float]], match: list[int]) -> Branch:
    logp = jnp.log(jnp.asarray(chances, jnp.float32))
    return Branch(jnp.asarray(tokens), jnp.where(jnp.asarray(match)[:, None] > 0, logp, -jnp.inf), jnp.asarray(match))


def test_a_branch_begins_where_the_pool_ends_it():
    drafted = [(3, ROOT, 0.6), (4, ROOT, 0.3), (5, 0, 0.2), (6, 1, 0.1)]
    pool = pool_of(drafted, drafted, drafted)
    branch = branch_of([[3, 5, 9], [7, 5, 9], [3, 5, 9]], [[0.9, 0.1, 0.05]] * 3, [1, 2, 0])
    joined = attach(pool, branch)
    # The first row's pool holds 3 and, below it, 5: with the greater chance of both. Only 9 is new, below 5.
    np.testing.assert_allclose(jnp.exp(joined.score_BQ[0]), [0.9, 0.3, 0.2, 0.1, 0, 0, 0.05], rtol=1e-5)
    assert joined.parent_BQ[0, 6] == 2
    # The second's holds nothing of it, though a 5 stands below another node; the third found nothing.
    np.testing.assert_allclose(jnp.exp(joined.score_BQ[1]), [0.6, 0.3, 0.2, 0.1, 0.9, 0.1, 0.05], rtol=1e-5)
    assert joined.parent_BQ[1, 4:].tolist() == [ROOT, 4, 5]
    np.testing.assert_allclose(jnp.exp(joined.score_BQ[2]), [0.6, 0.3, 0.2, 0.1, 0, 0, 0], rtol=1e-5)


def test_the_tree_of_a_joined_pool_has_no_token_twice_below_a_node():
    rng = np.random.default_rng(0)
    depths = np.array([1, 1, 2, 2, 1, 2, 3])
    for _ in range(20):
        drafted = [(3, ROOT, 0.6), (4, ROOT, 0.3), (3, 0, 0.2), (4, 0, 0.1)]
        branch = branch_of([rng.integers(3, 6, 3).tolist()], [np.sort(rng.random(3))[::-1].tolist()], [1])
        tree, _ = best_of_pool(attach(pool_of(drafted), branch), depths, 6, jnp.zeros(1, jnp.int32))
        valid = np.asarray(tree.valid_BN[0])
        places = list(zip(np.asarray(tree.parent_BN[0])[valid], np.asarray(tree.token_BN[0])[valid], strict=True))
        assert len(set(places)) == len(places)
        parents = np.asarray(tree.parent_BN[0])[valid][1:]
        assert np.all(parents < np.flatnonzero(valid)[1:]) and np.all(valid[parents])
        assert np.all(np.asarray(tree.depth_BN[0])[1:][valid[1:]] == np.asarray(tree.depth_BN[0])[parents] + 1)


def test_a_pool_of_nothing_takes_the_branch_as_it_is():
    empty = Candidates(*(jnp.zeros((1, 0), t) for t in (jnp.int32, jnp.float32, jnp.float32, jnp.int32)))
    joined = attach(empty, branch_of([[3, 5]], [[0.5, 0.2]], [2]))
    assert joined.token_BQ.tolist() == [[3, 5]] and joined.parent_BQ.tolist() == [[ROOT, 0]]


@pytest.mark.parametrize("wrong", [{"length": 0}, {"usual": ()}, {"usual": (0.0, 0.5)}, {"weight": 0.0}])
def test_a_branch_that_cannot_be_is_refused(wrong: dict):
    with pytest.raises(ValueError, match="looked-up branch needs"):
        LookupBranch(**wrong)


def test_counts_are_of_every_row():
    assert isinstance(NOTHING, MatchCounts) and NOTHING.right_BM.shape == (3, 3)
