"""What every tree policy shares: the likeliest tokens of a draft distribution, and ancestor masks from parents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.sampling import argmax
from jaxspec.sharding import constrain, splits


def likeliest(logits_BWV: Array, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens of each distribution and their log-probabilities, best first; ties to the lower id.

    Where the mesh in context splits the vocabulary, every device picks its own best and only those meet: left alone,
    XLA gathers all logits and sorts them on every device.
    Raises ValueError where the vocabulary has fewer than `count` tokens.
    """
    batch, width, vocab = logits_BWV.shape
    if count > vocab:
        raise ValueError(f"a tree that takes the {count} best children exceeds the draft vocabulary of {vocab} tokens")
    # Rows are flattened because XLA's partial top-k takes two axes; more fall back to a full sort.
    rows_QV = logits_BWV.reshape(batch * width, vocab)
    parts = splits("vocab")
    if count == 1:
        token_QR, best_QR = argmax(rows_QV)[:, None], jnp.max(rows_QV, axis=-1, keepdims=True)
    elif parts > 1 and vocab % parts == 0 and count <= vocab // parts:
        token_QR, best_QR = _best_of_parts(rows_QV, count, parts)
    else:
        best_QR, token_QR = jax.lax.top_k(rows_QV, count)
    top_Q1 = best_QR[:, :1]
    logp_QR = best_QR - top_Q1 - jnp.log(jnp.sum(jnp.exp(rows_QV - top_Q1), axis=-1, keepdims=True))
    shape = (batch, width, count)
    return token_QR.astype(jnp.int32).reshape(shape), logp_QR.reshape(shape)


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


def ancestor_mask(parent_BN: Array, depth: int) -> Array:
    """`[B, N, N]`: node `m` is `n` or above it. `depth` rounds of doubling reach from parents to all ancestors."""
    nodes = parent_BN.shape[1]
    above = (jnp.arange(nodes) == parent_BN[:, :, None]) | jnp.eye(nodes, dtype=bool)
    reach = 1
    while reach < depth:
        above = jnp.einsum("bnm,bmk->bnk", above.astype(jnp.float32), above.astype(jnp.float32)) > 0
        reach *= 2
    return above
