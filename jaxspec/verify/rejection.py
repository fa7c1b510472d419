"""Rejection rules for children drawn at random: each child is tested against the target's distribution that is left.

Recursive rejection works from the root down. It tests a node's children in the order of their draws and goes on below
the first child that is accepted. Traversal verification (block verification on a chain) works from the leaves up: it
decides about a node after everything below the node. It never accepts less and often more.

Both are lossless: the output has exactly the target's distribution. They need one thing of the tree: whether a node is
in it must not depend on the node's own token. A child that is tested then has the distribution it was drawn from,
whatever was seen before it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, DraftMode, Tree


class RejectionResult(NamedTuple):
    """The decision of a rule; the bonus token is still to be drawn."""

    last_B: Array
    """Node at which the accepted path ends."""
    rest_BV: Array
    """Distribution of the bonus token behind it; sums to 1."""
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
    """The target's distribution at every node."""
    distribution_EV: Array
    distribution_row_N: Array
    """Which of the `E` distributions each node's children were drawn from."""
    random: Array
    """Whether the row's children were drawn at all."""
    coin_N: Array
    """Uniforms of [0, 1)."""

    def distribution(self, n: Array) -> Array:
        """Returns the distribution `[V]` of the first child of `n`."""
        return self.distribution_EV[self.distribution_row_N[n]]

    def waiting(self, at: Array, behind: Array) -> Array:
        """Returns a mask `[N]` of the children of `at` that are still undecided: those after node `behind`."""
        return self.valid_N & (self.parent_N == at) & (jnp.arange(self.token_N.shape[0]) > behind)


def recursive_rejection(mode: DraftMode, tree: Tree, target_BNV: Array, coin_BN: Array) -> RejectionResult:
    """Tests children from the root down (recursive rejection sampling).

    It is SpecInfer's multi-step speculative sampling for `sample` (arXiv 2305.09781), the rule of RSD (arXiv
    2402.14160) and Sequoia (arXiv 2402.12374) for `swor`, and EAGLE-2's for `topk`. On a chain with `sample` it is
    speculative sampling (Leviathan 2023; Chen 2023).

    `target_BNV` is the target's warped distribution at every node; it and `tree.distributions` sum to 1. `coin_BN`
    holds independent uniforms of [0, 1). Parents stand before their children, siblings in the order of their draws.
    """
    return jax.vmap(functools.partial(_walk, mode))(_rows(tree, target_BNV, coin_BN))


def traversal_verification(
    mode: DraftMode, tree: Tree, target_BNV: Array, coin_BN: Array, depth: int
) -> RejectionResult:
    """Decides about nodes from the leaves up (traversal verification, arXiv 2505.12398).

    On a chain with `sample` it is block verification (Sun 2024, arXiv 2403.10444). A node reached with weight `rho`
    hands each child in turn the weight `min(1, rho b(x) / s(x))`: `b` is the target's distribution that is left, `s`
    the distribution of the draw. A child that fails leaves `(rho b - s)+`. When all children have failed, the node is
    accepted with the weight that is left. Arguments are those of `recursive_rejection`; `depth` is the tree's `T`.
    """
    return jax.vmap(functools.partial(_traverse, mode, depth))(_rows(tree, target_BNV, coin_BN))


def _rows(tree: Tree, target_BNV: Array, coin_BN: Array) -> _Row:
    """Returns the rules' arguments with the batch axis first; where nothing was drawn, a stand-in for `tree`'s own."""
    batch, nodes = tree.token_BN.shape
    distributions = tree.distributions
    if distributions is None:
        # Children that are the likeliest tokens count as drawn from all mass on themselves, see `_drawn_from`.
        row_BN = jnp.broadcast_to(jnp.arange(nodes), (batch, nodes))
        drawn = (target_BNV, row_BN, jnp.zeros(batch, bool))
    else:
        drawn = distributions
    return _Row(tree.token_BN, tree.parent_BN, tree.depth_BN, tree.valid_BN, target_BNV, *drawn, coin_BN)


# What both rules do to a distribution when a child is rejected.


def _drawn_from(mode: DraftMode, row: _Row, s_V: Array, token: Array) -> Array:
    """Returns the distribution that `token` came from; where nothing was drawn, all mass on `token`."""
    itself_V = jnp.zeros_like(s_V).at[token].set(1)
    return itself_V if mode == "topk" else jnp.where(row.random, s_V, itself_V)


def _next_draw(mode: DraftMode, s_V: Array, token: Array) -> Array:
    """Returns the distribution of the next sibling's draw after `token`: the same, or without `token` (`swor`)."""
    if mode != "swor":
        return s_V
    left_V = s_V.at[token].set(0)
    total = jnp.sum(left_V)
    return jnp.where(total > 0, left_V / jnp.where(total > 0, total, 1), s_V)


def _left(excess_V: Array, p_V: Array, tried_V: Array) -> Array:
    """Returns `excess` normalised; where only rounding is left of it, `p` without the tokens already tested."""
    total = jnp.sum(excess_V)
    other_V = jnp.where(tried_V, 0, p_V)
    other = jnp.sum(other_V)
    other_V = jnp.where(other > 0, other_V / jnp.where(other > 0, other, 1), p_V)
    # This happens with a probability of the order of what is left, so the stand-in does not show in the output.
    spent = total <= 8 * jnp.finfo(excess_V.dtype).eps
    return jnp.where(spent, other_V, excess_V / jnp.where(spent, 1, total))


def _chance(has: Array, asked: Array) -> Array:
    """Returns `min(1, has / asked)`; where nothing is asked, 1 if there is anything and else 0."""
    some = asked > 0
    return jnp.where(some, jnp.minimum(1, has / jnp.where(some, asked, 1)), (has > 0).astype(has.dtype))


# Recursive rejection.


class _Walk(NamedTuple):
    """State of a row's walk from the root."""

    at: Array
    behind: Array
    """Children of `at` up to this node have been rejected."""
    r_V: Array
    """The target's distribution that is left."""
    s_V: Array
    """Distribution of the next child's draw."""
    tried_V: Array
    """Tokens of the rejected children."""
    tested_N: Array
    chance_N: Array


def _walk(mode: DraftMode, row: _Row) -> RejectionResult:
    """Walks one row's tree until the node at hand has no child left to test."""
    w = jax.lax.while_loop(
        lambda w: jnp.any(row.waiting(w.at, w.behind)), functools.partial(_test_child, mode, row), _start_walk(row)
    )
    return RejectionResult(w.at, w.r_V, w.tested_N, w.chance_N)


def _start_walk(row: _Row) -> _Walk:
    """Returns the state at the root, before any child is tested."""
    nodes, vocab = row.p_NV.shape
    nobody_N, zero = jnp.zeros(nodes, bool), jnp.int32(0)
    none_N = jnp.zeros(nodes, row.p_NV.dtype)
    return _Walk(zero, zero, row.p_NV[0], row.distribution(zero), jnp.zeros(vocab, bool), nobody_N, none_N)


def _test_child(mode: DraftMode, row: _Row, w: _Walk) -> _Walk:
    """Tosses for the next child: goes on below it, or takes the child's share from the distribution that is left."""
    n = jnp.argmax(row.waiting(w.at, w.behind)).astype(jnp.int32)
    x = row.token_N[n]
    used_V = _drawn_from(mode, row, w.s_V, x)
    # Accepts with min(1, r(x) / s(x)), without a division that could be 0 / 0.
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


# Traversal verification.


class _Traversal(NamedTuple):
    """State of a row's traversal. Axis `P` is the depth of the nodes on the way from the root to `at`."""

    at: Array
    behind: Array
    """Children of `at` up to this node have been decided."""
    b_PV: Array
    """The target's distribution that is left."""
    s_PV: Array
    """Distribution of the next child's draw."""
    tried_PV: Array
    """Tokens of the rejected children."""
    rho_P: Array
    """Probability that the node is accepted, given the children decided so far."""
    tested_N: Array
    chance_N: Array
    done: Array


def _traverse(mode: DraftMode, depth: int, row: _Row) -> RejectionResult:
    """Traverses one row's tree until a node is accepted; the root always is."""
    c = jax.lax.while_loop(lambda c: ~c.done, functools.partial(_step, mode, row), _start_traversal(row, depth))
    return RejectionResult(c.at, c.b_PV[row.depth_N[c.at]], c.tested_N, c.chance_N)


def _step(mode: DraftMode, row: _Row, c: _Traversal) -> _Traversal:
    """Goes to the next child of the node at hand; decides about the node where none is left."""
    waiting_N = row.waiting(c.at, c.behind)
    child = jnp.argmax(waiting_N).astype(jnp.int32)
    return jax.lax.cond(jnp.any(waiting_N), lambda: _descend(mode, row, c, child), lambda: _decide(mode, row, c))


def _start_traversal(row: _Row, depth: int) -> _Traversal:
    """Returns the state at the root, before any child is decided."""
    nodes, vocab = row.p_NV.shape
    distributions_PV = jnp.zeros((depth + 1, vocab), row.p_NV.dtype)
    return _Traversal(
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


def _descend(mode: DraftMode, row: _Row, c: _Traversal, child: Array) -> _Traversal:
    """Goes to `child` and hands it its weight."""
    d, x = row.depth_N[c.at], row.token_N[child]
    return c._replace(
        at=child,
        behind=child,
        b_PV=c.b_PV.at[d + 1].set(row.p_NV[child]),
        s_PV=c.s_PV.at[d + 1].set(row.distribution(child)),
        tried_PV=c.tried_PV.at[d + 1].set(False),
        rho_P=c.rho_P.at[d + 1].set(_chance(c.rho_P[d] * c.b_PV[d, x], _drawn_from(mode, row, c.s_PV[d], x)[x])),
    )


def _decide(mode: DraftMode, row: _Row, c: _Traversal) -> _Traversal:
    """Tosses for a node whose children have all failed: ends there, or goes back to its parent."""
    d, root = row.depth_N[c.at], c.at == 0
    # The root is no drafted token: it is accepted without a coin.
    taken = root | (row.coin_N[c.at] < c.rho_P[d])
    # Both outcomes are computed: under `vmap` a conditional is a select anyway.
    back = _return_to_parent(mode, row, c)
    kept = jax.tree.map(lambda here, there: jnp.where(taken, here, there), c, back)
    return kept._replace(
        done=taken, tested_N=c.tested_N.at[c.at].set(~root), chance_N=c.chance_N.at[c.at].set(c.rho_P[d])
    )


def _return_to_parent(mode: DraftMode, row: _Row, c: _Traversal) -> _Traversal:
    """Goes back to the parent and lowers its distribution and weight by what the failed child had taken."""
    parent, x = jnp.maximum(row.parent_N[c.at], 0), row.token_N[c.at]
    up = row.depth_N[parent]
    weight = c.rho_P[up]
    excess_V = jnp.maximum(weight * c.b_PV[up] - _drawn_from(mode, row, c.s_PV[up], x), 0)
    total, tiny = jnp.sum(excess_V), 8 * jnp.finfo(excess_V.dtype).eps
    # The new weight is total / (total + 1 - weight). Near 0 / 0, a node whose weight was 1 keeps it.
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
