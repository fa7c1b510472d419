"""The parts of a target's output that are stored, for training without its layers: how to shrink and restore them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params, Target, TargetOutput
from jaxspec.sampling import argmax, sharded_top_k

Kind = Literal["fp32", "bf16", "int8"]
KINDS: dict[Kind, str] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
"""How features are stored -> the dtype of the numbers; int8 has one scale a row besides."""
LEAST = -1e30
"""A finite stand-in for the log of no mass at all."""


ARRAYS = (
    *("features", "features_scale", "taps", "taps_scale"),
    *("top_tokens", "top_logp", "rest"),
    *("best_token", "log_total"),
)
"""The arrays of a `Stored` by the names they have in files and host batches; `[B, L, width]` each."""


class Likely(NamedTuple):
    """The target's likeliest next tokens, the likeliest first."""

    token_BLR: Array
    logp_BLR: Array
    rest_BL1: Array
    """Log of the mass of all other tokens."""


class Whole(NamedTuple):
    """The facts of a target's whole distribution that a drafter with a draft vocabulary learns by.

    With them no logits but those of the draft vocabulary are computed in training.
    """

    token_BL1: Array
    """The likeliest next token."""
    total_BL1: Array
    """Log of the sum of the exponentials of all logits, of the features as they are stored."""


class Stored(NamedTuple):
    """The stored part of a `TargetOutput`; see `store`. Scales are fp32, and None unless the numbers are int8."""

    features_BLD: Array
    features_scale_BL1: Array | None = None
    taps_BLD: Array | None = None
    taps_scale_BLY: Array | None = None
    """One scale a layer of auxiliary hidden states, since the sizes of their numbers differ."""
    likely: Likely | None = None
    whole: Whole | None = None


def to_arrays(stored: Stored) -> dict[str, Array]:
    """Returns the arrays that are not None, by their names in `ARRAYS`."""
    likely = (None,) * 3 if stored.likely is None else stored.likely
    whole = (None,) * 2 if stored.whole is None else stored.whole
    return {n: x for n, x in zip(ARRAYS, (*stored[:4], *likely, *whole), strict=True) if x is not None}


def from_arrays(arrays: Mapping[str, Array]) -> Stored | None:
    """Returns the inverse of `to_arrays`; None if there are no features."""
    if "features" not in arrays:
        return None
    found: list[Any] = [arrays.get(name) for name in ARRAYS]
    features, features_scale, taps, taps_scale, top, logp, rest, best, total = found
    likely = None if top is None else Likely(top, logp, rest)
    return Stored(
        features, features_scale, taps, taps_scale, likely, None if best is None else Whole(best, total)
    )  # fmt: skip


def shrink(x_BLD: Array, kind: Kind, parts: int = 1) -> tuple[Array, Array | None]:
    """Returns `x` as `kind` stores it, and its scales.

    int8 is `round(x / s)` with `s = max |x| / 127` of a row, or of each of its equal `parts`. So `grow` returns `x` to
    within `s / 2`.
    """
    if kind != "int8":
        return x_BLD.astype(KINDS[kind]), None
    x_BLYD = x_BLD.astype(jnp.float32).reshape(*x_BLD.shape[:-1], parts, -1)
    scale_BLY = jnp.max(jnp.abs(x_BLYD), axis=-1) / 127
    steps = jnp.round(x_BLYD / jnp.where(scale_BLY > 0, scale_BLY, 1)[..., None])
    return steps.astype(jnp.int8).reshape(x_BLD.shape), scale_BLY


def grow(x_BLD: Array, scale_BLY: Array | None, dtype: jnp.dtype) -> Array:
    """Returns the inverse of `shrink`, in `dtype`."""
    if scale_BLY is None:
        return x_BLD.astype(dtype)
    x_BLYD = x_BLD.astype(jnp.float32).reshape(*scale_BLY.shape, -1)
    return (x_BLYD * scale_BLY[..., None]).reshape(x_BLD.shape).astype(dtype)


def store(target: Target, params: Params, out: TargetOutput, *, kind: Kind, taps: int, top_k: int) -> Stored:
    """Returns the parts of `out` that cannot be computed from others.

    These are the features and the inputs of `taps` layers, as `kind` stores them, the `top_k` likeliest next tokens
    (0: none), and what a draft vocabulary needs of the whole distribution.
    """
    features = shrink(out.features_BLD, kind)
    tapped = (None, None) if out.taps_BLD is None else shrink(out.taps_BLD, kind, taps)
    likely = likeliest(target, params, out.features_BLD, top_k) if top_k else None
    # Of the features as training will see them: its logits and this total are then of one distribution.
    whole = whole_of(target, params, grow(*features, out.features_BLD.dtype))
    return Stored(*features, *tapped, likely, whole)


def restore(stored: Stored, dtype: jnp.dtype) -> TargetOutput:
    """Returns the target's output: features and auxiliary hidden states in `dtype`, the dtype of its activations."""
    taps = None if stored.taps_BLD is None else grow(stored.taps_BLD, stored.taps_scale_BLY, dtype)
    return TargetOutput(grow(stored.features_BLD, stored.features_scale_BL1, dtype), None, taps)


def likeliest(target: Target, params: Params, features_BLD: Array, count: int, *, chunk: int = 128) -> Likely:
    """Returns the `count` likeliest next tokens of every feature, from fp32 logits of `chunk` positions at a time."""
    return _by_chunks(functools.partial(_likeliest_of_chunk, target, params, count), features_BLD, chunk)


def whole_of(target: Target, params: Params, features_BLD: Array, *, chunk: int = 128) -> Whole:
    """Returns the likeliest token and the total of every feature, from fp32 logits of `chunk` positions at a time."""

    def find(features_BCD: Array) -> Whole:
        logits_BCV = target.logits(params, features_BCD)
        return Whole(argmax(logits_BCV)[..., None], jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True))

    return _by_chunks(find, features_BLD, chunk)


def _by_chunks(function: Callable[[Array], Any], features_BLD: Array, chunk: int) -> Any:
    """Returns what a function of `[B, C, D]` finds at every position, `chunk` positions of each row at a time."""
    length = features_BLD.shape[1]
    size = min(chunk, length)
    padded = jnp.pad(features_BLD, [(0, 0), (0, -length % size), (0, 0)])
    pieces = jnp.moveaxis(padded.reshape(len(padded), -1, size, padded.shape[-1]), 1, 0)
    found = jax.lax.map(function, pieces)
    # [X, B, C, R] -> [B, L, R]: the chunks of a row one after another, without the padding.
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(len(padded), -1, x.shape[-1])[:, :length], found)


def _likeliest_of_chunk(target: Target, params: Params, count: int, features_BCD: Array) -> Likely:
    logits_BCV = target.logits(params, features_BCD)
    whole_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    token_BCR, top_BCR = sharded_top_k(logits_BCV, count)
    rest_BC1 = outside(logits_BCV, token_BCR) - whole_BC1
    return Likely(token_BCR, top_BCR - whole_BC1, jnp.maximum(rest_BC1, LEAST))


def outside(logits: Array, token: Array) -> Array:
    """Returns `[..., V], [..., R] -> [..., 1]`: logsumexp of the logits of all other tokens, about `LEAST` for none."""
    others = jnp.put_along_axis(logits, token, LEAST, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1, keepdims=True)


def lump(logits: Array, token: Array) -> Array:
    """Returns log-probabilities of the tokens and of all others together: `[..., V], [..., R] -> [..., R + 1]`."""
    logits = logits.astype(jnp.float32)
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    named = jnp.take_along_axis(logits, token, axis=-1)
    return jnp.concatenate([named, jnp.maximum(outside(logits, token), LEAST)], axis=-1) - whole
