"""One path from logits to a token, shared by plain and speculative decoding: warp, then draw with a position's key.

A row's noise at an absolute position depends on its seed and that position alone. So a token is the same whether it
is decoded one at a time or found inside a tree, and it does not depend on the other rows (see the rule `target-draw`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxspec.base import Array
from jaxspec.parallel.mesh import AXIS_RULES, splits
from jaxspec.parallel.rows import shard_map_rows

ROUND = 2**32 - 1
"""Folded into keys of `round_noise` where `position_noise` folds a position, which is never as large."""

BLOCK = 128
"""Values that `argmax` reads at a time on CPUs."""


class Sampling(NamedTuple):
    """Settings by which each row draws its tokens."""

    temperature_B: Array
    """0 decodes greedily."""
    top_k_B: Array
    """Keeps the `k` likeliest tokens, and those that tie with the last; 0 keeps all."""
    top_p_B: Array
    """Keeps the likeliest tokens up to the one at which their mass reaches `top_p`, and its ties; 1 keeps all."""
    seed_B: Array


def argmax(x: Array) -> Array:
    """Returns the index of the first greatest value of the last axis, int32: `[..., V] -> [...]`."""
    # `jnp.argmax` makes one pass over pairs, which CPU compilers do not vectorize: it is ten times slower there.
    return lax.platform_dependent(x, cpu=_argmax_by_blocks, default=_argmax_whole)


def _argmax_whole(x: Array) -> Array:
    """Finds the greatest value, then its first index."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    last = x.shape[-1] - 1
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, last), axis=-1)


def _argmax_by_blocks(x: Array) -> Array:
    """Finds the first block that holds the greatest value, then the index there: one pass, small temporaries."""
    vocab = x.shape[-1]
    blocks = vocab // BLOCK
    whole = blocks * BLOCK
    # A block's greatest value needs no index, so this pass vectorizes.
    best = jnp.max(x[..., :whole].reshape(*x.shape[:-1], blocks, BLOCK), axis=-1)
    if whole < vocab:
        best = jnp.concatenate([best, jnp.max(x[..., whole:], axis=-1, keepdims=True)], axis=-1)
    index = _argmax_whole(best)[..., None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    index = jnp.minimum(index, vocab - 1)  # behind a shorter last block, the last token repeats
    place = _argmax_whole(jnp.take_along_axis(x, index, axis=-1))[..., None]
    return jnp.take_along_axis(index, place, axis=-1)[..., 0]


def sharded_top_k(x_XV: Array, count: int) -> tuple[Array, Array]:
    """Returns indices (int32) and values of the `count` greatest of the last axis, best first; ties to the lower index.

    `[..., V] -> [..., count]`. Raises ValueError where `count` exceeds `V`. Where the mesh in context splits the
    vocabulary, every device finds the best of its own part, and only those are gathered.
    """
    vocab = x_XV.shape[-1]
    if count > vocab:
        raise ValueError(f"the {count} best of a vocabulary of {vocab} tokens are asked for: ask for {vocab} or fewer")
    parts = splits("vocab")
    if count == 1:
        # A maximum is an ordinary reduction, which XLA partitions well.
        return argmax(x_XV)[..., None], jnp.max(x_XV, axis=-1, keepdims=True)
    if parts == 1 or vocab % parts or count > vocab // parts:
        best, index = top_k(x_XV, count)
        return index, best
    # XLA's own partition of a top-k gathers all logits and sorts them on every device.
    axes = (*_leading(x_XV), None)
    best_of_parts = functools.partial(_top_k_of_parts, count=count)
    return shard_map_rows(best_of_parts, ((*axes[:-1], "vocab"),), (axes, axes), x_XV)


def _top_k_of_parts(part_XV: Array, count: int) -> tuple[Array, Array]:
    """Returns `sharded_top_k` in a `shard_map`: `part_XV` is this device's part of the vocabulary."""
    over = AXIS_RULES["vocab"]
    best, index = _top_k(part_XV, count)
    index = index + lax.axis_index(over) * part_XV.shape[-1]
    best, index = (lax.all_gather(x, over, axis=x.ndim - 1, tiled=True) for x in (best, index))
    # Parts stand in the order of their ids, so position breaks ties between them as the id would.
    best, chosen = _top_k(best, count)
    return jnp.take_along_axis(index, chosen, axis=-1), best


def top_k(x_BX: Array, count: int) -> tuple[Array, Array]:
    """Returns the `count` greatest of the last axis and their indices (int32), best first; ties to the lower index."""
    # Each device takes its own rows; XLA's own partition (except on TPUs) gathers all rows on every device.
    axes = (*_leading(x_BX), None)
    return shard_map_rows(functools.partial(_top_k, count=count), (axes,), (axes, axes), x_BX)


def _leading(x_BX: Array) -> tuple[str | None, ...]:
    """Returns the logical axes of all axes but the last: the first is the batch."""
    return ("batch", *(None,) * (x_BX.ndim - 2)) if x_BX.ndim > 1 else ()


def _top_k(x: Array, count: int) -> tuple[Array, Array]:
    """Returns `top_k` of an array that lies on one device."""
    # XLA has a partial top-k for two axes; arrays of more axes fall back to a full sort.
    best, index = lax.top_k(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), count)
    shape = (*x.shape[:-1], count)
    return best.reshape(shape), index.astype(jnp.int32).reshape(shape)


def _ordered_bits(x: Array) -> Array:
    """Returns int32 keys that compare as the fp32 values do."""
    x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)  # -0 and 0 are one value
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # As integers, negative floats compare in reverse: flipping all bits but the sign mends that.
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _greatest_key(keys: Array, holds: object) -> Array:
    """Returns the greatest int32 `t` for which `holds(t)`, by bisection; `holds` is true up to some `t`."""
    shape = (*keys.shape[:-1], 1)
    low = jnp.full(shape, jnp.iinfo(jnp.int32).min, jnp.int32)

    def step(i: Array, low: Array) -> Array:
        # The first step crosses from the negative keys to zero; the others set one bit each.
        trial = jnp.where(i == 0, 0, low + lax.shift_left(jnp.int32(1), 31 - i))
        return jnp.where(holds(trial), trial, low)  # type: ignore[operator]

    return lax.fori_loop(jnp.int32(0), jnp.int32(32), step, low)


def keep_top_k(logits_BNV: Array, top_k_B: Array) -> Array:
    """Returns the logits, -inf outside each row's `k` greatest (ties with the `k`-th are kept); 0 keeps all."""
    # Bisection over the bits finds the k-th value exactly, in a fixed number of passes and without a sort.
    keys = _ordered_bits(logits_BNV)
    k = top_k_B[:, None, None]
    threshold = _greatest_key(keys, lambda t: jnp.sum(keys >= t, axis=-1, keepdims=True) >= k)
    return jnp.where((keys >= threshold) | (k <= 0), logits_BNV, -jnp.inf)


def keep_top_p(logits_BNV: Array, top_p_B: Array) -> Array:
    """Returns the logits, -inf outside each row's nucleus (Holtzman 2020).

    The nucleus has the tokens with less than `top_p` probability strictly above them, always the likeliest. It is
    found without a sort, as in `keep_top_k`.
    """
    p = jax.nn.softmax(logits_BNV.astype(jnp.float32), axis=-1)
    top_p = top_p_B[:, None, None]

    def too_low(t: Array) -> Array:
        return jnp.sum(jnp.where(_ordered_bits(p) > t, p, 0.0), axis=-1, keepdims=True) >= top_p

    # Values up to this key have `top_p` mass or more above them, and are left out.
    threshold = _greatest_key(p, too_low) + 1
    # The likeliest token stays whatever rounding does.
    peak = jnp.max(p, axis=-1, keepdims=True)
    return jnp.where((_ordered_bits(p) >= threshold) | (p == peak) | (top_p >= 1), logits_BNV, -jnp.inf)


def warp_logits(logits_BNV: Array, sampling: Sampling) -> Array:
    """Returns log-probabilities, up to a constant, after temperature, then top-k, then top-p: transformers' order.

    Rows at temperature 0 are returned unwarped; their token is the argmax.
    """
    temperature = sampling.temperature_B[:, None, None]
    # The likeliest token is moved to 0, so that a small temperature cannot overflow it.
    x = logits_BNV - jnp.max(logits_BNV, axis=-1, keepdims=True)
    x = x / jnp.where(temperature > 0, temperature, 1.0).astype(logits_BNV.dtype)
    # Conditionals, because most batches set neither and each takes 32 passes over the logits.
    x = lax.cond(jnp.any(sampling.top_k_B > 0), lambda x: keep_top_k(x, sampling.top_k_B), lambda x: x, x)
    x = lax.cond(jnp.any(sampling.top_p_B < 1), lambda x: keep_top_p(x, sampling.top_p_B), lambda x: x, x)
    return jnp.where(temperature > 0, x, logits_BNV)


def position_noise(seed_B: Array, position_BP: Array, vocab: int) -> Array:
    """Returns Gumbel noise `[B, P, V]`, keyed by (seed, absolute position of the token that it draws)."""
    one = functools.partial(_gumbel, vocab=vocab)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed_B, position_BP)


def _gumbel(seed: Array, position: Array, vocab: int) -> Array:
    """Returns the noise `[V]` of one seed at one position."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,), jnp.float32)


def draw(logits_BNV: Array, depth_BN: Array, first_position_B: Array, depths: int, sampling: Sampling) -> Array:
    """Returns the target's token at every node, `[B, N]`: argmax of warped logits plus the position's Gumbel noise.

    A node at depth `d < depths` draws the token at position `first_position + d`. Greedy rows take the argmax of their
    logits; where all rows are greedy, no noise is made.
    """

    def sampled(logits: Array) -> Array:
        position_BP = first_position_B[:, None] + jnp.arange(depths)
        # Nodes of one depth share their noise, so `depths` rows are made, not `N`. They lie on different paths, and
        # along any one path the draws are independent.
        noise = position_noise(sampling.seed_B, position_BP, logits.shape[-1])
        noise = jnp.take_along_axis(noise, depth_BN[:, :, None], axis=1)
        noise = jnp.where(sampling.temperature_B[:, None, None] > 0, noise, 0.0)
        return argmax(warp_logits(logits, sampling) + noise)

    return lax.cond(jnp.any(sampling.temperature_B > 0), sampled, argmax, logits_BNV)


def distribution_of(logits_BNV: Array, sampling: Sampling) -> Array:
    """Returns the distribution that `draw` draws from, `[B, N, V]`; that of a greedy row is one-hot at the argmax."""
    warped_BNV = warp_logits(logits_BNV, sampling)
    best_BNV = jax.nn.one_hot(argmax(logits_BNV), logits_BNV.shape[-1], dtype=logits_BNV.dtype)
    return jnp.where(sampling.temperature_B[:, None, None] > 0, jax.nn.softmax(warped_BNV, axis=-1), best_BNV)


def round_noise(seed_B: Array, length_B: Array, use: int, make: Callable[[Array], Array]) -> Array:
    """Returns `make(key)` for every row, `[B, ...]`, keyed by (seed, tokens before the round's root, use).

    No key is one of `position_noise`, so drafts and coins are independent of the target's draws.
    """

    def one(seed: Array, length: Array) -> Array:
        # No round of a row begins at the length of another, so no key is used twice.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUND), length)
        return make(jax.random.fold_in(key, use))

    return jax.vmap(one)(seed_B, length_B)
