"""Acceptance rates of drafts, and losses made of them: `alpha = sum_v min(p_v, q_v)`, target `p`, draft `q`.

All are `[..., U], [..., U] -> [...]`. Over a draft vocabulary of `U` tokens, `rest` `[...]` is the log of the target's
mass outside it. Drafts are verified against the whole target, so `p` on the `U` tokens then sums to `1 - exp(rest)`;
without `rest` it sums to one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.divergence import cross_entropy, kl
from jaxspec.losses.loss import log_probs, wide
from jaxspec.sampling import argmax


def agreement(draft_logits: Array, target_logits: Array) -> Array:
    """Returns 1 where both argmaxes are the same token, else 0: the acceptance rate of greedy decoding."""
    return (argmax(draft_logits) == argmax(target_logits)).astype(jnp.float32)


def log_target(target_logits: Array, rest: Array | None) -> Array:
    """Returns `log p` on the `U` tokens `[..., U]`, not renormalised: its exponentials sum to `1 - exp(rest)`."""
    logp = log_probs(target_logits)
    if rest is None:
        return logp
    tiny = jnp.finfo(logp.dtype).tiny  # all of the target's mass may be elsewhere
    return logp + jnp.log(jnp.maximum(-jnp.expm1(rest.astype(logp.dtype)), tiny))[..., None]


def expected_acceptance(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns `alpha = sum_v min(p_v, q_v) = 1 - TV(p, q)`: expected acceptance at temperature 1 (Leviathan 2023)."""
    logp, logq = log_target(target_logits, rest), log_probs(draft_logits)
    return jnp.sum(jnp.exp(jnp.minimum(logp, logq)), axis=-1)


def tvd(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns the total variation distance `1/2 sum_v |p_v - q_v| = 1 - alpha` (DistillSpec, arXiv 2310.08461).

    It is over the whole vocabulary; `q` is 0 outside the `U` tokens. Its gradient vanishes where `p` and `q` hardly
    overlap, so training does not start with it.
    """
    p, q = jnp.exp(log_target(target_logits, rest)), jnp.exp(log_probs(draft_logits))
    # Outside its vocabulary the draft has no mass, so the distance there is the target's mass.
    outside = 0 if rest is None else jnp.exp(jnp.minimum(wide(rest), 0))
    return 0.5 * (jnp.sum(jnp.abs(p - q), axis=-1) + outside)


def neg_log_acceptance(draft_logits: Array, target_logits: Array, rest: Array | None = None) -> Array:
    """Returns `-log alpha` (LK losses, arXiv 2602.23881).

    Its gradient is that of `tvd` divided by `alpha`. If `p` is one-hot, it is cross-entropy.
    """
    logp, logq = log_target(target_logits, rest), log_probs(draft_logits)
    # In this form it is finite and has a gradient where `alpha` underflows.
    return -jax.nn.logsumexp(jnp.minimum(logp, logq), axis=-1)


def lk(draft_logits: Array, target_logits: Array, eta: float = 3.0, rest: Array | None = None) -> Array:
    """Returns `lambda KL(p || q) + (1 - lambda) TV(p, q)`: the hybrid of LK losses (arXiv 2602.23881).

    `lambda = exp(-eta alpha)` of each token, without a gradient: `kl` while drafts are poor, `tvd` as they become good.
    With `rest`, `alpha` and TV are of the whole target, and KL is of the renormalised target, as in `kl`.
    """
    weight = jnp.exp(-eta * jax.lax.stop_gradient(expected_acceptance(draft_logits, target_logits, rest)))
    return weight * kl(draft_logits, target_logits) + (1 - weight) * tvd(draft_logits, target_logits, rest)


def l1_ce(draft_logits: Array, target_logits: Array, token: Array, rest: Array | None = None) -> Array:
    """Returns `0.9 sum_v |p_v - q_v| - 0.1 log q_token` (DSpark, arXiv 2607.05147, without its confidence head).

    As in DSpark's code, L1 is the full distance, twice `tvd`, and CE is `cross_entropy` of the label.
    """
    return 1.8 * tvd(draft_logits, target_logits, rest) + 0.1 * cross_entropy(draft_logits, token)
