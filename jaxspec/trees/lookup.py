"""A branch of a draft tree that repeats what stood behind the newest tokens before: prompt lookup, at no pass's cost.

How far such a branch is right depends on how many tokens match, and on the text: some repeat themselves, some never do.
So a row counts, by the length of the match, how often the next token was right, and begins with what is usual.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Lookup
from jaxspec.parallel.rows import gather_rows
from jaxspec.trees.dynamic import Candidates
from jaxspec.trees.shape import check_size

USUAL = (0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
"""Chance that the token behind a match of 1, 2 .. tokens comes again, before a row has counted any."""


class Branch(NamedTuple):
    """The looked-up tokens of a round."""

    token_BK: Array
    logp_BK: Array
    """Log-probability that the text follows the branch up to each; -inf where nothing was found."""
    match_B: Array


class MatchCounts(NamedTuple):
    """Trials of the token behind a match of 1, 2 .. tokens (axis `M`; the last stands for longer ones)."""

    right_BM: Array
    tried_BM: Array


@dataclasses.dataclass(frozen=True)
class LookupBranch:
    """Settings of a looked-up branch. Raises ValueError for those that cannot be."""

    length: int = 15
    """Most nodes of the branch."""
    usual: tuple[float, ...] = USUAL
    """Chances by the length of the match, as in `USUAL`."""
    weight: float = 4.0
    """Tokens that `usual` counts for, beside a row's own."""

    def __post_init__(self) -> None:
        if self.length < 1 or not self.usual or not self.weight > 0 or not all(0 < p < 1 for p in self.usual):
            raise ValueError(
                f"a tree's looked-up branch needs a length of at least 1, not {self.length}, chances between 0 and 1, "
                "and a weight above 0"
            )
        check_size("length", self.length)

    def begin(self, zeros_B: Array) -> MatchCounts:
        """Returns the counts of rows that have tried nothing."""
        # Two buffers, or a program that takes them over would be given one twice.
        return MatchCounts(*(jnp.broadcast_to(zeros_B[:, None], (len(zeros_B), len(self.usual))) for _ in range(2)))

    def branch(self, lookup: Lookup, counts: MatchCounts) -> Branch:
        """Returns the looked-up tokens, each with the chance that the text follows the branch up to it."""
        step_K = jnp.arange(self.length)
        # Where the earlier place reaches the text's end, its tokens come again and again.
        period_B1 = jnp.maximum(lookup.length_B - lookup.at_B, 1)[:, None]
        token_BK = gather_rows(lookup.tokens_BS, lookup.at_B[:, None] + step_K % period_B1)
        usual_M = jnp.asarray(self.usual, jnp.float32)
        chance_BM = (self.weight * usual_M + counts.right_BM) / (self.weight + counts.tried_BM)
        # A token that was right makes the match longer.
        chance_BK = jnp.take_along_axis(chance_BM, self._bin(lookup.match_B[:, None] + step_K), axis=1)
        logp_BK = jnp.cumsum(jnp.log(chance_BK), axis=1)
        return Branch(token_BK, jnp.where(lookup.match_B[:, None] > 0, logp_BK, -jnp.inf), lookup.match_B)

    def count(
        self, counts: MatchCounts, branch: Branch, token_BP: Array, count_B: Array, running_B: Array
    ) -> MatchCounts:
        """Returns the counts behind a round that wrote `count + 1` of the tokens `token_BP`.

        The branch is held to the text whether it was verified or not; rows that have ended keep their counts.
        """
        length = min(self.length, token_BP.shape[1])
        written_BK = jnp.arange(length) <= count_B[:, None]
        same_BK = (token_BP[:, :length] == branch.token_BK[:, :length]) & written_BK
        right_BK = jnp.cumprod(same_BK, axis=1).astype(bool)
        # Tried are the tokens behind right ones only: behind a wrong one the branch is not of this text.
        reached_BK = jnp.pad(right_BK, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
        tried_BK = reached_BK & written_BK & (running_B & (branch.match_B > 0))[:, None]
        bin_BK = self._bin(branch.match_B[:, None] + jnp.arange(length))
        is_bin_BKM = bin_BK[..., None] == jnp.arange(len(self.usual))
        right_BM, tried_BM = (
            jnp.sum(is_bin_BKM & x_BK[..., None], axis=1, dtype=jnp.int32) for x_BK in (right_BK & tried_BK, tried_BK)
        )
        return MatchCounts(counts.right_BM + right_BM, counts.tried_BM + tried_BM)

    def _bin(self, match_BK: Array) -> Array:
        return jnp.clip(match_BK - 1, 0, len(self.usual) - 1)


def attach(pool: Candidates, branch: Branch) -> Candidates:
    """Returns the candidates of a pool and behind them those of a branch, which begins where the pool ends it.

    As far as the pool holds the branch's tokens, its own candidates stand for them, with the greater of both chances.
    """
    batch, size = pool.token_BQ.shape
    at_B, held_B = jnp.full(batch, ROOT), jnp.ones(batch, bool)
    score_BQ, scores, parents = pool.score_BQ, [], []
    for step in range(branch.token_BK.shape[1]):
        here_BQ = (pool.token_BQ == branch.token_BK[:, step, None]) & (pool.parent_BQ == at_B[:, None])
        here_BQ &= held_B[:, None] & (pool.score_BQ > -jnp.inf) & (branch.match_B > 0)[:, None]
        logp_B = branch.logp_BK[:, step]
        score_BQ = jnp.where(here_BQ, jnp.maximum(score_BQ, logp_B[:, None]), score_BQ)
        held_B = jnp.any(here_BQ, axis=1) if size else jnp.zeros(batch, bool)
        scores.append(jnp.where(held_B, -jnp.inf, logp_B))
        parents.append(at_B)
        at_B = jnp.where(held_B, jnp.argmax(here_BQ, axis=1) if size else 0, size + step)
    own = Candidates(branch.token_BK, jnp.stack(scores, 1), jnp.stack(scores, 1), jnp.stack(parents, 1))
    pool = pool._replace(score_BQ=score_BQ, bound_BQ=score_BQ)
    return Candidates(*(jnp.concatenate(pair, axis=1) for pair in zip(pool, own, strict=True)))
