"""What a loss between distributions reads, and how the sums of its per-token parts become one number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array


class Scores(NamedTuple):
    """What is known of some tokens `[...]` to be drafted: two distributions over `U` tokens, and the text."""

    draft: Array
    """Draft logits `[..., U]`."""
    target: Array
    """Target logits of the same `U` tokens `[..., U]`."""
    token: Array
    """The text's own next token `[...]` as an index among the `U`; -1 where it is not among them."""
    key: Array
    """For losses that sample; the callers of one batch give every chunk its own."""
    rest: Array | None = None
    """Log of the target's mass outside the `U` tokens `[...]`; None where `U` is the whole vocabulary."""
    lumped: Array | None = None
    """Where the last of the `U` stands for all tokens that are not among the others, log of their mass `[...]`."""


def mean(sums: Array, count: Array) -> Array:
    """`sums[0] / count`, and 0 where there is no token."""
    return sums[..., 0] / jnp.where(count > 0, count, 1)


@dataclass(frozen=True)
class LogitLoss:
    """A loss in two halves, so that tokens may come in any number of chunks on any number of devices."""

    name: str
    parts: Callable[[Scores], Array]
    """Per-token parts `[..., M]`, fp32 (float64 for float64 logits)."""
    combine: Callable[[Array, Array], Array] = mean
    """(sums of the parts over all trained tokens `[..., M]`, their count) -> loss `[...]`. Both may be weighted."""


def wide(x: Array) -> Array:
    """`x` in fp32, or in float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_probs(logits: Array) -> Array:
    """Log-softmax over the last axis, in fp32 or float64; finite for logits up to 1e30 in size."""
    return jax.nn.log_softmax(wide(logits), axis=-1)


def of_token(x: Array, token: Array) -> Array:
    """Each row's entry at its token, 0 where that is -1: `[..., U], [...] -> [...]`.

    As a masked sum, which stays where a vocabulary is spread over devices, and needs no scatter on the way back.
    """
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == token[..., None], x, 0), axis=-1)
