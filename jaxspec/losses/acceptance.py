"""Measures of how often drafts are kept, and losses made of that: `alpha = sum_v min(p_v, q_v)`, target `p`, draft `q`.

All are `[..., U], [..., U] -> [...]`. Over a draft vocabulary of `U` tokens `rest` `[...]` is the log of the target's
mass outside it. Drafts are checked against all of the target, so `p` is then left as it is on the `U` tokens, with sum
`1 - exp(rest)`; without `rest` it sums to one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.divergence import cross_entropy, kl
from jaxspec.losses.loss import log_probs, wide
from jaxspec.sampling import argmax


def agreement(draft_logits: Array, target_logits: Array) -> Array:
    """1 where both argmaxes are the same token, else 0: how often a greedy draft is kept."""
    return (argmax(draft_logits) == argmax(target_logits)).astype(jnp.float32)


def log_target(target_logits: Array, rest: Array | None) -> Array:
    """`log p` on the `U` tokens `[..., U]`, not renormalised: its exponentials sum to `1 - exp(rest)`."""
    logp = log_probs(target_logits)
    if rest is None:
        return logp
    tiny = jnp.finfo(logp.dtype).tiny  # where all of the target's mass is elsewhere
    return logp + jnp.log(jnp.maximum(-jnp.expm1(rest.astype(logp.dtype)), tiny))[..., None]


def expected_acceptance(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """`alpha = sum_v min(p_v, q_v) = 1 - TV(p, q)`: how often a draft is kept at temperature 1 (Leviathan 2023)."""
    logp, logq = log_target(target_logits, rest), log_probs(draft_logits)
    return jnp.sum(jnp.exp(jnp.minimum(logp, logq)), axis=-1)


def tvd(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """`1/2 sum_v |p_v - q_v| = 1 - alpha` over the whole vocabulary, where `q` is 0 outside the `U` (DistillSpec).

    Its gradient vanishes where `p` and `q` hardly overlap: not a loss to start with.
    """
    p, q = jnp.exp(log_target(target_logits, rest)), jnp.exp(log_probs(draft_logits))
    outside = 0 if rest is None else jnp.exp(jnp.minimum(wide(rest), 0))
    return 0.5 * (jnp.sum(jnp.abs(p - q), axis=-1) + outside)


def neg_log_acceptance(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """`-log alpha` (LK losses, arXiv 2602.23881): the gradient of `tvd` over `alpha`, cross-entropy if `p` is one-hot.

    As `-logsumexp_v min(log p_v, log q_v)`, which is finite and has a gradient where `alpha` underflows.
    """
    logp, logq = log_target(target_logits, rest), log_probs(draft_logits)
    return -jax.nn.logsumexp(jnp.minimum(logp, logq), axis=-1)


def lk(draft_logits: Array, target_logits: Array, eta: float = 3.0, rest: Array | None = None) -> Array:
    """`lambda KL(p || q) + (1 - lambda) TV(p, q)`, `lambda = exp(-eta alpha)` of each token, no gradient through it.

    The hybrid of LK losses (arXiv 2602.23881): `kl` while drafts are poor, `tvd` as they become good. With `rest`,
    `alpha` and TV are the whole target's and KL is that of `kl`, of the renormalised target.
    """
    weight = jnp.exp(-eta * jax.lax.stop_gradient(expected_acceptance(draft_logits, target_logits, rest)))
    return weight * kl(draft_logits, target_logits) + (1 - weight) * tvd(draft_logits, target_logits, rest)


def l1_ce(draft_logits: Array, target_logits: Array, token: Array, rest: Array | None = None) -> Array:
    """`0.9 sum_v |p_v - q_v| - 0.1 log q_token` (DSpark, arXiv 2607.05147, without its confidence head).

    Read as its code has it: L1 is the full distance, twice `tvd`, and CE the hard `cross_entropy` of the text's token.
    """
    return 1.8 * tvd(draft_logits, target_logits, rest) + 0.1 * cross_entropy(draft_logits, token)
