"""The children of a node: its likeliest tokens, or draws from its draft distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Children, ChooseChildren, DraftMode, Tree
from jaxspec.sampling import argmax, sharded_top_k

Noise = Callable[[int, tuple[int, ...]], Array]
"""`(scratch slot, shape behind the batch axis) -> standard Gumbel noise [B, *shape]`, new for every slot."""


def likeliest(logits_BWV: Array, count: int) -> Children:
    """Returns the `count` likeliest tokens of each distribution, best first; ties go to the lower id.

    Raises ValueError where the vocabulary has fewer than `count` tokens.
    """
    token_BWR, best_BWR = sharded_top_k(logits_BWV, count)
    top_BW1 = best_BWR[..., :1]
    logp_BWR = best_BWR - top_BW1 - jnp.log(jnp.sum(jnp.exp(logits_BWV - top_BW1), axis=-1, keepdims=True))
    return Children(token_BWR, logp_BWR, logp_BWR)


def drawn(mode: DraftMode, temperature_B: Array, noise: Noise) -> ChooseChildren:
    """Returns a function that draws children from `softmax(logits / temperature)`.

    `sample` draws each child independently, `swor` without replacement. Rows at temperature 0 take their likeliest
    tokens, as all rows do with `topk`.
    """
    if mode == "topk":
        return lambda logits_BWV, count, _: likeliest(logits_BWV, count)
    return functools.partial(_draw_children, mode, temperature_B, noise)


def _draw_children(
    mode: DraftMode, temperature_B: Array, noise: Noise, logits_BWV: Array, count: int, slot: int
) -> Children:
    """Draws `count` children of each node; `slot` is the scratch slot of the first node."""
    width, vocab = logits_BWV.shape[1:]
    best = likeliest(logits_BWV, count)
    random = (temperature_B > 0)[:, None, None]
    distribution_BWV = jax.nn.softmax(logits_BWV / jnp.where(random, temperature_B[:, None, None], 1.0), axis=-1)
    # The log of the distribution, not the logits: where it has underflowed to 0 nothing may be drawn.
    scores_BWV = jnp.log(distribution_BWV)
    if mode == "swor":
        # Gumbel-top-k (Kool 2019): the greatest noisy scores, best first, are successive draws without replacement.
        token_BWR, _ = sharded_top_k(scores_BWV + noise(slot, (width, vocab)), count)
    else:
        token_BWR = argmax(scores_BWV[:, :, None] + noise(slot, (width, count, vocab)))
    token_BWR = jnp.where(random, token_BWR, best.token_BWR)
    logp_BWR, bound_BWR = _log_probabilities(distribution_BWV, token_BWR)
    return Children(
        token_BWR,
        jnp.where(random, logp_BWR, best.logp_BWR),
        jnp.where(random, bound_BWR, best.bound_BWR),
        distribution_BWV,
        temperature_B > 0,
    )


def _log_probabilities(distribution_BWV: Array, token_BWR: Array) -> tuple[Array, Array]:
    """Returns each token's log-probability, -inf for a token drawn before, and the log of what elder siblings left.

    The second is never below the first nor above 0, rounding included: dynamic trees rely on it.
    """
    logps, bounds, rest_BWV = [], [], distribution_BWV
    vocab = jnp.arange(distribution_BWV.shape[-1])
    for r in range(token_BWR.shape[-1]):
        token_BW1 = token_BWR[..., r : r + 1]
        logps.append(jnp.take_along_axis(rest_BWV, token_BW1, axis=-1)[..., 0])
        bounds.append(jnp.sum(rest_BWV, axis=-1))
        rest_BWV = jnp.where(vocab == token_BW1, 0.0, rest_BWV)
    # A sum may round to a little more than 1.
    return jnp.log(jnp.stack(logps, axis=-1)), jnp.log(jnp.minimum(jnp.stack(bounds, axis=-1), 1.0))


def over_whole_vocabulary(tree: Tree, token_U: Array, size: int) -> Tree:
    """Returns a tree with the distributions of a draft vocabulary over the whole one of `size` tokens.

    The target's distributions are over that.
    """
    distributions = tree.distributions
    if distributions is None:
        return tree
    whole_BEV = jnp.zeros((*distributions.distribution_BEV.shape[:2], size), distributions.distribution_BEV.dtype)
    whole_BEV = whole_BEV.at[..., token_U].set(distributions.distribution_BEV)
    return tree._replace(distributions=distributions._replace(distribution_BEV=whole_BEV))
