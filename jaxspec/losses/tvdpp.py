"""TVD++ (Goel et al. 2024, arXiv 2403.00858): total variation as a policy gradient, its reward standardised.

With target `p`, draft `q` and reward `r(v) = 1{p_v > q_v}`, `grad TV(p, q) = -E_{v ~ q}[r(v) grad log q_v]` exactly.
TVD++ replaces `r` by the advantage `A = (r - mu) / sigma`, constant under differentiation. The text available of the
paper does not say over what the expectation, `mu` and `sigma` are taken, so there are four readings. Only their
gradients mean something.

`mu` and `sigma` are over all trained tokens of the batch, except in `tvdpp_exact_pos`. They only shift and scale the
rewards. So a token gives `(sum_v w r log q, sum_v w log q)` and, for `mu`, `(mean r, mean 1)`, and `standardised`
makes the loss of the sums over the batch: in one pass, in any chunks. `sigma^2 = mu (1 - mu)`, because `r` is 0 or 1.

Entries with `max(p, q) < TAIL` earn no reward and are left out of `mu`: most of a vocabulary is there, and rounding
would decide. As in `acceptance`, `p` is the whole target's where `rest` is given.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.acceptance import log_target
from jaxspec.losses.loss import log_probs
from jaxspec.sampling import argmax

TAIL = 1e-8
"""Probability below which an entry of both distributions is left out."""
EPSILON = 1e-6
"""Added to `sigma`."""


def standardised(sums: Array, count: Array) -> Array:
    """Returns `-(sums[0] - mu sums[1]) / ((sigma + EPSILON) count)`, `mu = sums[2] / sums[3]`.

    `[..., 4], [...] -> [...]`.
    """
    # Mean and deviation are a baseline: no gradient goes through them.
    reward, entries = jax.lax.stop_gradient((sums[..., 2], sums[..., 3]))
    mu = reward / jnp.where(entries > 0, entries, 1)
    sigma = jnp.sqrt(jnp.maximum(mu * (1 - mu), 0))
    return -(sums[..., 0] - mu * sums[..., 1]) / ((sigma + EPSILON) * jnp.where(count > 0, count, 1))


def _compare(draft_logits: Array, target_logits: Array, rest: Array | None) -> tuple[Array, Array, Array]:
    """Returns `log q`, the reward, and 1 where an entry is not in the tail, all `[..., U]`."""
    logp, logq = log_target(target_logits, rest), log_probs(draft_logits)
    live = jnp.maximum(logp, logq) >= math.log(TAIL)
    return logq, ((logp > logq) & live).astype(logq.dtype), live.astype(logq.dtype)


def tvdpp_exact(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns `-sum_v sg[q_v] A_v log q_v`, `mu` and `sigma` over vocabulary and batch: the literal reading.

    `[..., U], [..., U] -> [..., 4]` for `standardised`. The gradient is that of `tvd` divided by `sigma`: `mu` cancels.
    """
    logq, r, live = _compare(draft_logits, target_logits, rest)
    q = jax.lax.stop_gradient(jnp.exp(logq))
    parts = jnp.sum(q * r * logq, -1), jnp.sum(q * logq, -1), jnp.mean(r, -1), jnp.mean(live, -1)
    return jnp.stack(parts, axis=-1)


def tvdpp_exact_pos(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns `-sum_v sg[q_v] A_v log q_v`, with `mu = sum_v q_v r_v` and `sigma` of each token by itself.

    `[..., U], [..., U] -> [...]`. The gradient is that of `tvd` divided by the token's `sigma`.
    """
    logq, r, _ = _compare(draft_logits, target_logits, rest)
    q = jax.lax.stop_gradient(jnp.exp(logq))
    mu = jnp.sum(q * r, axis=-1, keepdims=True)
    sigma = jnp.sqrt(jnp.maximum(mu * (1 - mu), 0))
    return -jnp.sum(q * (r - mu) / (sigma + EPSILON) * logq, axis=-1)


def draw(key: Array, logq: Array, count: int) -> Array:
    """Returns `count` tokens drawn from `q` at every position, `[..., U] -> [count, ...]`."""
    # One draw after another, so that the noise of one draw alone is in memory.
    return jax.lax.map(
        lambda k: argmax(logq + jax.random.gumbel(k, logq.shape, logq.dtype)), jax.random.split(key, count)
    )


def tvdpp_sampled(
    draft_logits: Array, target_logits: Array, key: Array, draws: int = 4, rest: Array | None = None
) -> Array:
    """Returns `-mean_s A(v_s) log q(v_s)` over `v_s ~ q`, `mu` and `sigma` over all draws of the batch: REINFORCE.

    `[..., U], [..., U] -> [..., 4]` for `standardised`. For `n` draws in the batch, the expected gradient
    times `sigma` is `1 - 1/n` of that of `tvd`, because every draw is part of its own baseline.
    """
    logq, r, _ = _compare(draft_logits, target_logits, rest)
    drawn = jnp.moveaxis(draw(key, jax.lax.stop_gradient(logq), draws), 0, -1)
    logq, r = (jnp.take_along_axis(x, drawn, axis=-1) for x in (logq, r))
    return jnp.stack([jnp.mean(x, axis=-1) for x in (r * logq, logq, r, jnp.ones_like(r))], axis=-1)


def tvdpp_uniform_vocab(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns `-mean_v A_v log q_v`; all entries outside the tail count the same, so it is a biased reading.

    `[..., U], [..., U] -> [..., 4]` for `standardised`, with the `mu` and `sigma` of `tvdpp_exact`.
    """
    logq, r, live = _compare(draft_logits, target_logits, rest)
    entries = jnp.sum(live, axis=-1)
    parts = jnp.sum(r * logq, -1) / entries, jnp.sum(live * logq, -1) / entries, jnp.mean(r, -1), jnp.mean(live, -1)
    return jnp.stack(parts, axis=-1)
