"""RMS norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array


def rms_norm(x: Array, weight: Array, eps: float, *, centred: bool = False) -> Array:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in fp32, in `x`'s dtype.

    Where `centred`, by `1 + weight` in fp32 (Gemma's).
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if centred:
        return ((1 + weight.astype(jnp.float32)) * wide).astype(x.dtype)
    return weight.astype(x.dtype) * wide.astype(x.dtype)
