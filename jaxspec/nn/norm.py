"""RMS norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array


def rms_norm(x: Array, weight: Array, eps: float, *, centred: bool = False) -> Array:
    """Returns `weight * x / sqrt(mean(x^2) + eps)` over the last axis, in `x`'s dtype; statistics are fp32.

    With `centred` the factor is `1 + weight`, applied in fp32, as in Gemma.
    """
    # A sum of squares loses digits in 16 bits.
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if centred:
        return ((1 + weight.astype(jnp.float32)) * wide).astype(x.dtype)
    return weight.astype(x.dtype) * wide.astype(x.dtype)
