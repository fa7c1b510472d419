"""Losses between a drafted feature and the target's."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.loss import wide


def smooth_l1(draft: Array, target: Array) -> Array:
    """Returns `mean_d h(draft - target)`, `h(x) = x^2 / 2` where `|x| < 1`, else `|x| - 1/2` (EAGLE).

    `[..., D], [..., D] -> [...]`, fp32.
    """
    gap = jnp.abs(wide(draft) - wide(target))
    return jnp.mean(jnp.where(gap < 1.0, 0.5 * gap * gap, gap - 0.5), axis=-1)
