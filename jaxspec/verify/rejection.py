"""Lossless rules for children that were drawn at random: each child is tested against what the target has left.

Top down (recursive rejection) a node's children are tested in the order of their draws, and the first accepted child is
descended into. Bottom up (traversal verification; on a chain, block verification) a node is decided after all that
hangs below it, which never accepts less and often more. Both output exactly the target's distribution, for every tree
in which whether there is a node does not depend on the node's own token: then a child that is tested has the
distribution it was drawn from, whatever was seen before it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, DraftMode, Tree


class RejectionResult(NamedTuple):
    """What a rule decided, short of drawing the bonus token."""

    last_B: Array
    """Node at which the accepted path ends."""
    rest_BV: Array
    """Law of the token behind it; sums to 1."""
    tested_BN: Array
    """Nodes that a coin was tossed for."""
    chance_BN: Array
    """Probability with which each tested node was accepted."""


class _Row(NamedTuple):
    """One row's tree, distributions and coins."""

    token_N: Array
    parent_N: Array
    depth_N: Array
    valid_N: Array
    p_NV: Array
    distribution_EV: Array
    law_row_N: Array
    random: Array
    coin_N: Array

    def distribution(self, n: Array) -> Array:
        """What the first child of `n` was drawn from."""
        return self.distribution_EV[self.law_row_N[n]]

    def waiting(self, at: Array, behind: Array) -> Array:
        """Children of `at` that are not dealt with: those after node `behind`."""
        return self.valid_N & (self.parent_N == at) & (jnp.arange(self.token_N.shape[0]) > behind)


def top_down(mode: DraftMode, tree: Tree, target_BNV: Array, coin_BN: Array) -> RejectionResult:
    """Recursive rejection: SpecInfer's rule for `sample`, RSD's and Sequoia's for `swor`, EAGLE-2's for `topk`.

    On a chain with `sample` it is chain speculative sampling (Leviathan 2023; Chen 2023). `target_BNV` is the target's
    warped distribution at every node; it and `tree.distributions` sum to 1. `coin_BN` holds independent uniforms of [0,
    1). Parents must stand before their children, siblings in the order of their draws.
    """

    def walk(row: _Row) -> RejectionResult:
        w = jax.lax.while_loop(
            lambda w: jnp.any(row.waiting(w.at, w.behind)), lambda w: _test(mode, row, w), _at_top(row)
        )
        return RejectionResult(w.at, w.r_V, w.tested_N, w.chance_N)

    return jax.vmap(walk)(_rows(tree, target_BNV, coin_BN))


def bottom_up(mode: DraftMode, tree: Tree, target_BNV: Array, coin_BN: Array, depth: int) -> RejectionResult:
    """Traversal verification, leaves before their parents; block verification (Sun 2024) on a chain with `sample`.

    A node reached with weight `rho` hands each child in turn `min(1, rho b(x) / s(x))`, where `b` is the target's
    distribution that is left and `s` the distribution of the draw; a child that fails leaves `(rho b - s)+`, and when
    all have failed the node is taken with the weight that is left. Arguments as `top_down`'s; `depth` is the tree's
    `T`.
    """

    def climb(row: _Row) -> RejectionResult:
        def step(c: _Climb) -> _Climb:
            waiting_N = row.waiting(c.at, c.behind)
            child = jnp.argmax(waiting_N).astype(jnp.int32)
            return jax.lax.cond(
                jnp.any(waiting_N), lambda: _descend(mode, row, c, child), lambda: _decide(mode, row, c)
            )

        c = jax.lax.while_loop(lambda c: ~c.done, step, _at_root(row, depth))
        return RejectionResult(c.at, c.b_PV[row.depth_N[c.at]], c.tested_N, c.chance_N)

    return jax.vmap(climb)(_rows(tree, target_BNV, coin_BN))


def _rows(tree: Tree, target_BNV: Array, coin_BN: Array) -> _Row:
    """The rules' arguments with the batch axis first; where nothing was drawn, a stand-in for the distributions."""
    batch, nodes = tree.token_BN.shape
    distributions = tree.distributions
    if distributions is None:
        row_BN = jnp.broadcast_to(jnp.arange(nodes), (batch, nodes))
        drawn = (target_BNV, row_BN, jnp.zeros(batch, bool))
    else:
        drawn = distributions
    return _Row(tree.token_BN, tree.parent_BN, tree.depth_BN, tree.valid_BN, target_BNV, *drawn, coin_BN)


# What both rules do to a distribution when a child is refused.


def _drawn_from(mode: DraftMode, row: _Row, s_V: Array, token: Array) -> Array:
    """The distribution that `token` came from: where nothing was drawn, all on itself."""
    itself_V = jnp.zeros_like(s_V).at[token].set(1)
    return itself_V if mode == "topk" else jnp.where(row.random, s_V, itself_V)


def _next_draw(mode: DraftMode, s_V: Array, token: Array) -> Array:
    """The distribution of a sibling's draw after `token` was drawn."""
    if mode != "swor":
        return s_V
    left_V = s_V.at[token].set(0)
    total = jnp.sum(left_V)
    return jnp.where(total > 0, left_V / jnp.where(total > 0, total, 1), s_V)


def _left(excess_V: Array, p_V: Array, tried_V: Array) -> Array:
    """`excess` normalised; where nothing is left but rounding, the target's distribution without the tokens already
    tested.

    That happens with a probability of the order of what is left, so which distribution stands there does not show.
    """
    total = jnp.sum(excess_V)
    other_V = jnp.where(tried_V, 0, p_V)
    other = jnp.sum(other_V)
    other_V = jnp.where(other > 0, other_V / jnp.where(other > 0, other, 1), p_V)
    spent = total <= 8 * jnp.finfo(excess_V.dtype).eps
    return jnp.where(spent, other_V, excess_V / jnp.where(spent, 1, total))


def _chance(has: Array, asked: Array) -> Array:
    """`min(1, has / asked)`; where nothing is asked, whether there is anything."""
    some = asked > 0
    return jnp.where(some, jnp.minimum(1, has / jnp.where(some, asked, 1)), (has > 0).astype(has.dtype))


# Top down.


class _Walk(NamedTuple):
    """Where a row's walk from the root stands."""

    at: Array
    behind: Array
    """Children of `at` up to this node have been refused."""
    r_V: Array
    """What is left of the target's distribution."""
    s_V: Array
    """The distribution of the next child's draw."""
    tried_V: Array
    tested_N: Array
    chance_N: Array


def _at_top(row: _Row) -> _Walk:
    nodes, vocab = row.p_NV.shape
    nobody_N, zero = jnp.zeros(nodes, bool), jnp.int32(0)
    none_N = jnp.zeros(nodes, row.p_NV.dtype)
    return _Walk(zero, zero, row.p_NV[0], row.distribution(zero), jnp.zeros(vocab, bool), nobody_N, none_N)


def _test(mode: DraftMode, row: _Row, w: _Walk) -> _Walk:
    """Toss for the next child of the node at hand: descend into it, or take from the distribution what it had."""
    n = jnp.argmax(row.waiting(w.at, w.behind)).astype(jnp.int32)
    x = row.token_N[n]
    used_V = _drawn_from(mode, row, w.s_V, x)
    taken = row.coin_N[n] * used_V[x] < w.r_V[x]
    tried_V = w.tried_V.at[x].set(True)
    left_V = _left(jnp.maximum(w.r_V - used_V, 0), row.p_NV[w.at], tried_V)
    return _Walk(
        at=jnp.where(taken, n, w.at),
        behind=n,
        r_V=jnp.where(taken, row.p_NV[n], left_V),
        s_V=jnp.where(taken, row.distribution(n), _next_draw(mode, w.s_V, x)),
        tried_V=~taken & tried_V,
        tested_N=w.tested_N.at[n].set(True),
        chance_N=w.chance_N.at[n].set(_chance(w.r_V[x], used_V[x])),
    )


# Bottom up.


class _Climb(NamedTuple):
    """Where a row's traversal stands; axis `P` is the depth of the nodes on the way from the root to `at`."""

    at: Array
    behind: Array
    """Children of `at` up to this node are dealt with."""
    b_PV: Array
    """What is left of the target's distribution."""
    s_PV: Array
    """The distribution of the next child's draw."""
    tried_PV: Array
    rho_P: Array
    """Probability that the node is accepted, as far as its children have been dealt with."""
    tested_N: Array
    chance_N: Array
    done: Array


def _at_root(row: _Row, depth: int) -> _Climb:
    nodes, vocab = row.p_NV.shape
    distributions_PV = jnp.zeros((depth + 1, vocab), row.p_NV.dtype)
    return _Climb(
        at=jnp.int32(0),
        behind=jnp.int32(0),
        b_PV=distributions_PV.at[0].set(row.p_NV[0]),
        s_PV=distributions_PV.at[0].set(row.distribution(jnp.int32(0))),
        tried_PV=jnp.zeros((depth + 1, vocab), bool),
        rho_P=jnp.ones(depth + 1, row.p_NV.dtype),
        tested_N=jnp.zeros(nodes, bool),
        chance_N=jnp.zeros(nodes, row.p_NV.dtype),
        done=jnp.asarray(False),
    )


def _descend(mode: DraftMode, row: _Row, c: _Climb, child: Array) -> _Climb:
    """Go to `child`, handing it its weight."""
    d, x = row.depth_N[c.at], row.token_N[child]
    return c._replace(
        at=child,
        behind=child,
        b_PV=c.b_PV.at[d + 1].set(row.p_NV[child]),
        s_PV=c.s_PV.at[d + 1].set(row.distribution(child)),
        tried_PV=c.tried_PV.at[d + 1].set(False),
        rho_P=c.rho_P.at[d + 1].set(_chance(c.rho_P[d] * c.b_PV[d, x], _drawn_from(mode, row, c.s_PV[d], x)[x])),
    )


def _decide(mode: DraftMode, row: _Row, c: _Climb) -> _Climb:
    """Toss for a node whose children have all failed: end there, or go back to its parent with what it leaves."""
    d, root = row.depth_N[c.at], c.at == 0
    taken = root | (row.coin_N[c.at] < c.rho_P[d])
    back = _leave(mode, row, c)
    kept = jax.tree.map(lambda here, there: jnp.where(taken, here, there), c, back)
    return kept._replace(
        done=taken, tested_N=c.tested_N.at[c.at].set(~root), chance_N=c.chance_N.at[c.at].set(c.rho_P[d])
    )


def _leave(mode: DraftMode, row: _Row, c: _Climb) -> _Climb:
    """Back at the parent, its distribution and weight lowered by what the failed child had taken."""
    parent, x = jnp.maximum(row.parent_N[c.at], 0), row.token_N[c.at]
    up = row.depth_N[parent]
    weight = c.rho_P[up]
    excess_V = jnp.maximum(weight * c.b_PV[up] - _drawn_from(mode, row, c.s_PV[up], x), 0)
    total, tiny = jnp.sum(excess_V), 8 * jnp.finfo(excess_V.dtype).eps
    over = total + 1 - weight
    sure = (weight >= 1 - tiny).astype(weight.dtype)
    rho = jnp.where((over <= tiny) | (weight >= 1), sure, total / jnp.where(over <= tiny, 1, over))
    tried_V = c.tried_PV[up].at[x].set(True)
    return c._replace(
        at=parent,
        behind=c.at,
        b_PV=c.b_PV.at[up].set(_left(excess_V, row.p_NV[parent], tried_V)),
        s_PV=c.s_PV.at[up].set(_next_draw(mode, c.s_PV[up], x)),
        tried_PV=c.tried_PV.at[up].set(tried_V),
        rho_P=c.rho_P.at[up].set(rho),
    )
