"""A loss between distributions: its inputs, its per-token parts, and the number that their sums become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array


class Scores(NamedTuple):
    """Inputs of a loss at positions `[...]`: draft and target logits of `U` tokens, and the label."""

    draft: Array
    """Draft logits `[..., U]`."""
    target: Array
    """Target logits of the same `U` tokens `[..., U]`."""
    token: Array
    """The label, the next token of the text, `[...]` as an index among the `U`; -1 where it is not among them."""
    key: Array
    """PRNG key for losses that sample; every chunk of a batch has its own."""
    rest: Array | None = None
    """Log of the target's mass `[...]` outside the `U` tokens; None where `U` is the whole vocabulary."""
    lumped: Array | None = None
    """Log of the mass `[...]` of the last of the `U`, where it stands for all tokens that are not among the others."""


def mean(sums: Array, count: Array) -> Array:
    """Returns `sums[0] / count`, and 0 where there is no token."""
    # The denominator of an empty batch is 1, so that neither value nor gradient is NaN.
    return sums[..., 0] / jnp.where(count > 0, count, 1)


@dataclass(frozen=True)
class LogitLoss:
    """A loss as per-token parts and a function of their sums, so that it works in chunks and on many devices."""

    name: str
    parts: Callable[[Scores], Array]
    """Per-token parts `[..., M]`, fp32 (float64 for float64 logits)."""
    combine: Callable[[Array, Array], Array] = mean
    """(sums of the parts over all trained tokens `[..., M]`, their count) -> loss `[...]`. Both may be weighted."""


def wide(x: Array) -> Array:
    """Returns `x` in fp32, or in float64 where it is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_probs(logits: Array) -> Array:
    """Returns the log-softmax over the last axis, in fp32 or float64; finite for logits up to 1e30 in size."""
    return jax.nn.log_softmax(wide(logits), axis=-1)


def of_token(x: Array, token: Array) -> Array:
    """Returns each row's entry at its token, 0 where that is -1: `[..., U], [...] -> [...]`."""
    # A masked sum stays on its device where the vocabulary is spread, and needs no scatter in the backward pass.
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == token[..., None], x, 0), axis=-1)
