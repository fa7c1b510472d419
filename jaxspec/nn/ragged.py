"""Tokens of several rows in one axis: from `[B, N]`, of which some are there, to `[1, A]`, and back."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import Array, Ragged


def ragged_of(there_BN: Array, size: int, mask_BNN: Array) -> Ragged:
    """Returns how the tokens that are there lie, row by row, in an axis of `size` places, which holds them all."""
    there = there_BN.reshape(-1)
    (from_A,) = jnp.nonzero(there, size=size, fill_value=0)
    place = jnp.maximum(jnp.cumsum(there) - 1, 0).reshape(there_BN.shape)
    return Ragged(mask_BNN, from_A, jnp.minimum(place, size - 1))


def pack(ragged: Ragged, x_BN: Array) -> Array:
    """Returns the tokens' entries of `[B, N, ...]` as `[1, A, ...]`."""
    return x_BN.reshape(-1, *x_BN.shape[2:])[ragged.from_A][None]


def unpack(ragged: Ragged, x_A: Array, axis: int = 0) -> Array:
    """Returns the entries of an array without rows, whose axis number `axis` is `A`, as `[B, ..., N, ...]`."""
    return jnp.moveaxis(jnp.take(x_A, ragged.place_BN, axis), axis, 0)
