"""Losses and measures between the draft's next-token distribution and the target's, from their logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.sampling import argmax


def soft_cross_entropy(draft_logits: Array, target_logits: Array) -> Array:
    """`-sum_v p_v log q_v` with `p, q` the softmax of target and draft (EAGLE section 4.2).

    `[..., V], [..., V] -> [...]`, fp32. It is KL(p || q) up to the entropy of `p`; finite for any finite logits.
    """
    p = jax.nn.softmax(target_logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(p * jax.nn.log_softmax(draft_logits.astype(jnp.float32), axis=-1), axis=-1)


def expected_acceptance(draft_logits: Array, target_logits: Array) -> Array:
    """`sum_v min(p_v, q_v) = 1 - TV(p, q)`: how often a drafted sample is kept at temperature 1 (Leviathan 2023)."""
    p = jax.nn.softmax(target_logits.astype(jnp.float32), axis=-1)
    q = jax.nn.softmax(draft_logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.minimum(p, q), axis=-1)


def agreement(draft_logits: Array, target_logits: Array) -> Array:
    """1 where both argmaxes are the same token, else 0: how often a greedy draft is kept."""
    return (argmax(draft_logits) == argmax(target_logits)).astype(jnp.float32)
