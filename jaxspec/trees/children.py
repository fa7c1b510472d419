"""How the children of a node are chosen: its likeliest tokens, or draws from its draft law."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Children, ChooseChildren, DraftMode
from jaxspec.sampling import argmax
from jaxspec.sharding import constrain, splits

Noise = Callable[[int, tuple[int, ...]], Array]
"""`(scratch slot, shape behind the batch axis) -> standard Gumbel noise [B, *shape]`, new for every slot."""


def likeliest(logits_BWV: Array, count: int) -> Children:
    """The `count` likeliest tokens of each distribution, best first; ties to the lower id.

    Raises ValueError where the vocabulary has fewer than `count` tokens.
    """
    token_BWR, best_BWR = _greatest(logits_BWV, count)
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
        law_BWV = jax.nn.softmax(logits_BWV / jnp.where(random, temperature_B[:, None, None], 1.0), axis=-1)
        scores_BWV = jnp.log(law_BWV)  # -inf where the law has underflowed, so that what is drawn has probability
        if mode == "swor":
            token_BWR, _ = _greatest(scores_BWV + noise(slot, (width, vocab)), count)
        else:
            token_BWR = argmax(scores_BWV[:, :, None] + noise(slot, (width, count, vocab)))
        token_BWR = jnp.where(random, token_BWR, best.token_BWR)
        logp_BWR, left_BWR = _known_before(law_BWV, token_BWR)
        return Children(
            token_BWR,
            jnp.where(random, logp_BWR, best.logp_BWR),
            jnp.where(random, left_BWR, best.left_BWR),
            law_BWV,
            temperature_B > 0,
        )

    return choose


def _known_before(law_BWV: Array, token_BWR: Array) -> tuple[Array, Array]:
    """Log-probability of each token, -inf if it stands before; and of all that does not stand before it.

    The second is never below the first nor above 0, rounding included: dynamic trees rely on it.
    """
    logps, lefts, rest_BWV = [], [], law_BWV
    vocab = jnp.arange(law_BWV.shape[-1])
    for r in range(token_BWR.shape[-1]):
        token_BW1 = token_BWR[..., r : r + 1]
        logps.append(jnp.take_along_axis(rest_BWV, token_BW1, axis=-1)[..., 0])
        lefts.append(jnp.sum(rest_BWV, axis=-1))
        rest_BWV = jnp.where(vocab == token_BW1, 0.0, rest_BWV)
    return jnp.log(jnp.stack(logps, axis=-1)), jnp.log(jnp.minimum(jnp.stack(lefts, axis=-1), 1.0))


def _greatest(x_BWV: Array, count: int) -> tuple[Array, Array]:
    """Indices (int32) and values of the `count` greatest of the last axis; ties to the lower index.

    Where the mesh in context splits the vocabulary, every device picks its own best and only those meet: left alone,
    XLA gathers all logits and sorts them on every device.
    """
    batch, width, vocab = x_BWV.shape
    if count > vocab:
        raise ValueError(f"a tree that takes the {count} best children exceeds the draft vocabulary of {vocab} tokens")
    # Rows are flattened because XLA's partial top-k takes two axes; more fall back to a full sort.
    rows_QV = x_BWV.reshape(batch * width, vocab)
    parts = splits("vocab")
    if count == 1:
        index_QR, best_QR = argmax(rows_QV)[:, None], jnp.max(rows_QV, axis=-1, keepdims=True)
    elif parts > 1 and vocab % parts == 0 and count <= vocab // parts:
        index_QR, best_QR = _best_of_parts(rows_QV, count, parts)
    else:
        best_QR, index_QR = jax.lax.top_k(rows_QV, count)
    shape = (batch, width, count)
    return index_QR.astype(jnp.int32).reshape(shape), best_QR.reshape(shape)


def _best_of_parts(rows_QV: Array, count: int, parts: int) -> tuple[Array, Array]:
    """The best of the best of each part of the vocabulary: tokens and logits `[Q, R]`."""
    rows, vocab = rows_QV.shape
    part = vocab // parts
    local = constrain(jnp.swapaxes(rows_QV.reshape(rows, parts, part), 0, 1), "vocab", ..., None)
    best, token = jax.lax.top_k(local.reshape(parts * rows, part), count)
    token = token.reshape(parts, rows, count) + jnp.arange(0, vocab, part, dtype=token.dtype)[:, None, None]
    best, token = (
        jnp.swapaxes(constrain(x.reshape(parts, rows, count), None, ..., None), 0, 1).reshape(rows, parts * count)
        for x in (best, token)
    )
    # Parts stand in the order of their ids, so position breaks ties between them as the id would.
    best_QR, chosen_QR = jax.lax.top_k(best, count)
    return jnp.take_along_axis(token, chosen_QR, axis=1), best_QR
