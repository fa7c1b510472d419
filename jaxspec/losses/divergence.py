"""Cross-entropies and divergences between the target's distribution `p` and the draft's `q`.

All are `[..., U], [..., U] -> [...]`. Over a draft vocabulary of `U` tokens `p` is the target's distribution given that
its token is one of them (renormalised, as EAGLE-3 trains).
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.loss import log_probs, of_token
from jaxspec.sampling import sharded_top_k


def soft_cross_entropy(draft_logits: Array, target_logits: Array) -> Array:
    """`-sum_v p_v log q_v` (EAGLE section 4.2). It is `kl` up to the entropy of `p`."""
    return -jnp.sum(jnp.exp(log_probs(target_logits)) * log_probs(draft_logits), axis=-1)


def cross_entropy(draft_logits: Array, token: Array) -> Array:
    """`-log q_token`, and 0 where the token is -1: the text's own token as a hard label (Medusa, PARD).

    `[..., U], [...] -> [...]`.
    """
    return -of_token(log_probs(draft_logits), token)


def kl(draft_logits: Array, target_logits: Array) -> Array:
    """`sum_v p_v log(p_v / q_v)`, the forward KL (DistillSpec, arXiv 2310.08461)."""
    logp, logq = log_probs(target_logits), log_probs(draft_logits)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def reverse_kl(draft_logits: Array, target_logits: Array) -> Array:
    """`sum_v q_v log(q_v / p_v)`: it punishes drafts the target would not write (DistillSpec)."""
    return kl(target_logits, draft_logits)


def jsd(draft_logits: Array, target_logits: Array, beta: float = 0.5) -> Array:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q` (DistillSpec; Agarwal 2023).

    At one half symmetric and at most `log 2`.
    """
    logp, logq = log_probs(target_logits), log_probs(draft_logits)
    logm = jnp.logaddexp(math.log(beta) + logp, math.log1p(-beta) + logq)
    return jnp.sum(beta * jnp.exp(logp) * (logp - logm) + (1 - beta) * jnp.exp(logq) * (logq - logm), axis=-1)


def top_k_cross_entropy(draft_logits: Array, target_logits: Array, k: int = 10, lumped: bool = False) -> Array:
    """`-sum_{v in top k of p} p_v log q_v`, neither side renormalised on the `k` tokens (HASS, arXiv 2408.15766).

    Of `U <= k` tokens it is `soft_cross_entropy`. Where the last of them is many tokens `lumped`, it is never a term.
    """
    tokens = target_logits.shape[-1] - lumped
    at, best = sharded_top_k(target_logits[..., :tokens], min(k, tokens))
    # By comparison with the last of them: elementwise, where gathers (and their scatters on the way back) are slow.
    ids, last, least = jnp.arange(target_logits.shape[-1]), at[..., -1:], best[..., -1:]
    taken = ((target_logits > least) | ((target_logits == least) & (ids <= last))) & (ids < tokens)
    return -jnp.sum(jnp.where(taken, jnp.exp(log_probs(target_logits)) * log_probs(draft_logits), 0), axis=-1)
