"""Lossless rules for children that were drawn at random: each child is tested against what the target has left.

Top down (recursive rejection) a node's children are tested in the order of their draws, and the first accepted child
is descended into. Bottom up (traversal verification; on a chain, block verification) a node is decided after all that
hangs below it, which never accepts less and often more. Both output exactly the target's law.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Tree

DraftMode = Literal["topk", "sample", "swor"]
"""How a node's children came about: its likeliest tokens; independent draws from the draft's law; draws from it without
replacement. Siblings stand in the order of their draws."""


class Verdict(NamedTuple):
    """What a rule decided, short of drawing the bonus token."""

    last_B: Array
    """Node at which the accepted path ends."""
    rest_BV: Array
    """Law of the token behind it; sums to 1."""
    tested_BN: Array
    """Nodes that a coin was tossed for."""
    chance_BN: Array
    """Probability with which each tested node was accepted."""


def _remove(law_V: Array, token: Array) -> Array:
    """The law without `token`; unchanged where nothing else is in it."""
    left_V = law_V.at[token].set(0)
    total = jnp.sum(left_V)
    return jnp.where(total > 0, left_V / jnp.where(total > 0, total, 1), law_V)


def _left(excess_V: Array, p_V: Array, tried_V: Array) -> Array:
    """`excess` normalised; where nothing is left but rounding, the target's law without the tokens already tested.

    That happens with a probability of the order of what is left, so which law stands there does not show.
    """
    total = jnp.sum(excess_V)
    other_V = jnp.where(tried_V, 0, p_V)
    other = jnp.sum(other_V)
    other_V = jnp.where(other > 0, other_V / jnp.where(other > 0, other, 1), p_V)
    spent = total <= 8 * jnp.finfo(excess_V.dtype).eps
    return jnp.where(spent, other_V, excess_V / jnp.where(spent, 1, total))


def _next_draw(mode: DraftMode, q_V: Array, token: Array) -> Array:
    """The law of a sibling's draw after `token` was drawn."""
    return _remove(q_V, token) if mode == "swor" else q_V


def _drawn_from(mode: DraftMode, q_V: Array, token: Array) -> Array:
    """The law that `token` came from: where nothing was drawn, all on itself."""
    return jnp.zeros_like(q_V).at[token].set(1) if mode == "topk" else q_V


def _chance(has: Array, asked: Array) -> Array:
    """`min(1, has / asked)`; where nothing is asked, whether there is anything."""
    some = asked > 0
    return jnp.where(some, jnp.minimum(1, has / jnp.where(some, asked, 1)), (has > 0).astype(has.dtype))


def top_down(mode: DraftMode, tree: Tree, target_BNV: Array, draft_BNV: Array | None, coin_BN: Array) -> Verdict:
    """Recursive rejection: SpecInfer's rule for `sample`, RSD's and Sequoia's for `swor`, EAGLE-2's for `topk`.

    On a chain with `sample` it is chain speculative sampling (Leviathan 2023; Chen 2023). `target_BNV` is the target's
    warped law at every node and `draft_BNV` the law its children were drawn from (None for `topk`); both sum to 1.
    `coin_BN` holds independent uniforms of [0, 1). Parents must stand before their children, siblings in the order of
    their draws.
    """

    def row(token_N: Array, parent_N: Array, valid_N: Array, p_NV: Array, q_NV: Array, coin_N: Array) -> Verdict:
        vocab = p_NV.shape[-1]

        def test(n: Array, carry: tuple) -> tuple:
            at, r_V, q_V, tried_V, tested_N, chance_N = carry
            x = token_N[n]
            active = valid_N[n] & (parent_N[n] == at)
            used_V = _drawn_from(mode, q_V, x)
            taken = active & (coin_N[n] * used_V[x] < r_V[x])
            tried_now_V = tried_V.at[x].set(True)
            left_V = _left(jnp.maximum(r_V - used_V, 0), p_NV[at], tried_now_V)
            refused, chance = active & ~taken, _chance(r_V[x], used_V[x])
            at = jnp.where(taken, n, at)
            r_V = jnp.where(taken, p_NV[n], jnp.where(refused, left_V, r_V))
            q_V = jnp.where(taken, q_NV[n], jnp.where(refused, _next_draw(mode, q_V, x), q_V))
            tried_V = jnp.where(taken, False, jnp.where(refused, tried_now_V, tried_V))
            return at, r_V, q_V, tried_V, tested_N.at[n].set(active), chance_N.at[n].set(chance)

        nobody_N = jnp.zeros(token_N.shape, bool)
        begin = (jnp.int32(0), p_NV[0], q_NV[0], jnp.zeros(vocab, bool), nobody_N, jnp.zeros(token_N.shape, p_NV.dtype))
        at, r_V, _, _, tested_N, chance_N = jax.lax.fori_loop(1, token_N.shape[0], test, begin)
        return Verdict(at, r_V, tested_N, chance_N)

    draft_BNV = target_BNV if draft_BNV is None else draft_BNV
    return jax.vmap(row)(tree.token_BN, tree.parent_BN, tree.valid_BN, target_BNV, draft_BNV, coin_BN)


class _Climb(NamedTuple):
    """Where a row's traversal stands; axis `P` is the depth of the nodes on the way from the root to `at`."""

    at: Array
    behind: Array
    """Children of `at` up to this node are dealt with."""
    b_PV: Array
    """What is left of the target's law."""
    s_PV: Array
    """The law of the next child's draw."""
    tried_PV: Array
    rho_P: Array
    """Probability that the node is accepted, as far as its children have been dealt with."""
    tested_N: Array
    chance_N: Array
    done: Array


class _Row(NamedTuple):
    """One row's tree, laws and coins."""

    token_N: Array
    parent_N: Array
    depth_N: Array
    valid_N: Array
    p_NV: Array
    q_NV: Array
    coin_N: Array


def bottom_up(
    mode: DraftMode, tree: Tree, target_BNV: Array, draft_BNV: Array | None, coin_BN: Array, depth: int
) -> Verdict:
    """Traversal verification, leaves before their parents; block verification (Sun 2024) on a chain with `sample`.

    A node reached with weight `rho` hands each child in turn `min(1, rho b(x) / s(x))`, where `b` is the target's
    law that is left and `s` the law of the draw; a child that fails leaves `(rho b - s)+`, and when all have failed the
    node is taken with the weight that is left. Arguments as `top_down`'s; `depth` is the tree's `T`.
    """

    def climb(row: _Row) -> Verdict:
        def step(c: _Climb) -> _Climb:
            waiting_N = row.valid_N & (row.parent_N == c.at) & (jnp.arange(row.token_N.shape[0]) > c.behind)
            child = jnp.argmax(waiting_N).astype(jnp.int32)
            return jax.lax.cond(
                jnp.any(waiting_N), lambda: _descend(mode, row, c, child), lambda: _decide(mode, row, c)
            )

        c = jax.lax.while_loop(lambda c: ~c.done, step, _at_root(row, depth))
        return Verdict(c.at, c.b_PV[row.depth_N[c.at]], c.tested_N, c.chance_N)

    draft_BNV = target_BNV if draft_BNV is None else draft_BNV
    shape = (tree.token_BN, tree.parent_BN, tree.depth_BN, tree.valid_BN)
    return jax.vmap(climb)(_Row(*shape, target_BNV, draft_BNV, coin_BN))


def _at_root(row: _Row, depth: int) -> _Climb:
    nodes, vocab = row.p_NV.shape
    laws_PV = jnp.zeros((depth + 1, vocab), row.p_NV.dtype)
    return _Climb(
        at=jnp.int32(0),
        behind=jnp.int32(0),
        b_PV=laws_PV.at[0].set(row.p_NV[0]),
        s_PV=laws_PV.at[0].set(row.q_NV[0]),
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
        s_PV=c.s_PV.at[d + 1].set(row.q_NV[child]),
        tried_PV=c.tried_PV.at[d + 1].set(False),
        rho_P=c.rho_P.at[d + 1].set(_chance(c.rho_P[d] * c.b_PV[d, x], _drawn_from(mode, c.s_PV[d], x)[x])),
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
    """Back at the parent, its law and weight lowered by what the failed child had taken."""
    parent, x = jnp.maximum(row.parent_N[c.at], 0), row.token_N[c.at]
    up = row.depth_N[parent]
    weight = c.rho_P[up]
    excess_V = jnp.maximum(weight * c.b_PV[up] - _drawn_from(mode, c.s_PV[up], x), 0)
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
