"""How the children of a node are chosen: its likeliest tokens, or draws from its draft distribution."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Children, ChooseChildren, DraftMode
from jaxspec.sampling import argmax, sharded_top_k

Noise = Callable[[int, tuple[int, ...]], Array]
"""`(scratch slot, shape behind the batch axis) -> standard Gumbel noise [B, *shape]`, new for every slot."""


def likeliest(logits_BWV: Array, count: int) -> Children:
    """The `count` likeliest tokens of each distribution, best first; ties to the lower id.

    Raises ValueError where the vocabulary has fewer than `count` tokens.
    """
    token_BWR, best_BWR = sharded_top_k(logits_BWV, count)
    top_BW1 = best_BWR[..., :1]
    logp_BWR = best_BWR - top_BW1 - jnp.log(jnp.sum(jnp.exp(logits_BWV - top_BW1), axis=-1, keepdims=True))
    return Children(token_BWR, logp_BWR, logp_BWR)


def drawn(mode: DraftMode, temperature_B: Array, noise: Noise) -> ChooseChildren:
    """Children drawn from `softmax(logits / temperature)`; rows at temperature 0 take their likeliest tokens.

    `sample` draws each child anew, `swor` without replacement, by the greatest `count` of log-probability plus Gumbel
    noise (Kool 2019): their order is that of successive draws.
    """
    if mode == "topk":
        return lambda logits_BWV, count, _: likeliest(logits_BWV, count)

    def choose(logits_BWV: Array, count: int, slot: int) -> Children:
        width, vocab = logits_BWV.shape[1:]
        best = likeliest(logits_BWV, count)
        random = (temperature_B > 0)[:, None, None]
        distribution_BWV = jax.nn.softmax(logits_BWV / jnp.where(random, temperature_B[:, None, None], 1.0), axis=-1)
        scores_BWV = jnp.log(
            distribution_BWV
        )  # -inf where the distribution has underflowed, so that what is drawn has probability
        if mode == "swor":
            token_BWR, _ = sharded_top_k(scores_BWV + noise(slot, (width, vocab)), count)
        else:
            token_BWR = argmax(scores_BWV[:, :, None] + noise(slot, (width, count, vocab)))
        token_BWR = jnp.where(random, token_BWR, best.token_BWR)
        logp_BWR, left_BWR = _known_before(distribution_BWV, token_BWR)
        return Children(
            token_BWR,
            jnp.where(random, logp_BWR, best.logp_BWR),
            jnp.where(random, left_BWR, best.left_BWR),
            distribution_BWV,
            temperature_B > 0,
        )

    return choose


def _known_before(distribution_BWV: Array, token_BWR: Array) -> tuple[Array, Array]:
    """Log-probability of each token, -inf if it stands before; and of all that does not stand before it.

    The second is never below the first nor above 0, rounding included: dynamic trees rely on it.
    """
    logps, lefts, rest_BWV = [], [], distribution_BWV
    vocab = jnp.arange(distribution_BWV.shape[-1])
    for r in range(token_BWR.shape[-1]):
        token_BW1 = token_BWR[..., r : r + 1]
        logps.append(jnp.take_along_axis(rest_BWV, token_BW1, axis=-1)[..., 0])
        lefts.append(jnp.sum(rest_BWV, axis=-1))
        rest_BWV = jnp.where(vocab == token_BW1, 0.0, rest_BWV)
    return jnp.log(jnp.stack(logps, axis=-1)), jnp.log(jnp.minimum(jnp.stack(lefts, axis=-1), 1.0))
