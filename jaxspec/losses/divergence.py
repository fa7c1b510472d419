"""Cross-entropies and divergences between the target's distribution `p` and the draft's `q`.

All are `[..., U], [..., U] -> [...]`. Over a draft vocabulary of `U` tokens, `p` is the target's distribution
renormalised to them, as EAGLE-3 trains.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.loss import log_probs, of_token
from jaxspec.sampling import sharded_top_k


def soft_cross_entropy(draft_logits: Array, target_logits: Array) -> Array:
    """Returns `-sum_v p_v log q_v` (EAGLE), which is `kl` plus the entropy of `p`."""
    return -jnp.sum(jnp.exp(log_probs(target_logits)) * log_probs(draft_logits), axis=-1)


def cross_entropy(draft_logits: Array, token: Array) -> Array:
    """Returns `-log q_token`, 0 where the token is -1: the text's next token as a hard label (Medusa, PARD).

    `[..., U], [...] -> [...]`.
    """
    return -of_token(log_probs(draft_logits), token)


def kl(draft_logits: Array, target_logits: Array) -> Array:
    """Returns `sum_v p_v log(p_v / q_v)`, the forward KL divergence (DistillSpec, arXiv 2310.08461)."""
    logp, logq = log_probs(target_logits), log_probs(draft_logits)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def reverse_kl(draft_logits: Array, target_logits: Array) -> Array:
    """Returns `sum_v q_v log(q_v / p_v)`, the reverse KL divergence (DistillSpec): costly where `p` is small."""
    return kl(target_logits, draft_logits)


def jsd(draft_logits: Array, target_logits: Array, beta: float = 0.5) -> Array:
    """Returns `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q` (DistillSpec; Agarwal 2023).

    It is the Jensen-Shannon divergence. At `beta = 1/2` it is symmetric and at most `log 2`.
    """
    logp, logq = log_probs(target_logits), log_probs(draft_logits)
    logm = jnp.logaddexp(math.log(beta) + logp, math.log1p(-beta) + logq)
    return jnp.sum(beta * jnp.exp(logp) * (logp - logm) + (1 - beta) * jnp.exp(logq) * (logq - logm), axis=-1)


def top_k_cross_entropy(draft_logits: Array, target_logits: Array, k: int = 10, lumped: bool = False) -> Array:
    """Returns `-sum_{v in top k of p} p_v log q_v`: top-k distillation (HASS's objective, arXiv 2408.15766).

    Neither `p` nor `q` is renormalised on the `k` tokens. For `U <= k` tokens it is `soft_cross_entropy`. With `lumped`
    the last of the `U` stands for many tokens, and is never among the `k`.
    """
    tokens = target_logits.shape[-1] - lumped
    at, best = sharded_top_k(target_logits[..., :tokens], min(k, tokens))
    # A comparison with the last of the k is elementwise; a gather, and its scatter in the backward pass, is slow.
    ids, last, least = jnp.arange(target_logits.shape[-1]), at[..., -1:], best[..., -1:]
    taken = ((target_logits > least) | ((target_logits == least) & (ids <= last))) & (ids < tokens)
    return -jnp.sum(jnp.where(taken, jnp.exp(log_probs(target_logits)) * log_probs(draft_logits), 0), axis=-1)
