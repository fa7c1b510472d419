"""What every tree policy shares: ancestor masks from parents, and padding to a fixed node count."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import Array


def ancestor_mask(parent_BN: Array, depth: int) -> Array:
    """`[B, N, N]`: node `m` is `n` or above it. `depth` rounds of doubling reach from parents to all ancestors."""
    nodes = parent_BN.shape[1]
    above = (jnp.arange(nodes) == parent_BN[:, :, None]) | jnp.eye(nodes, dtype=bool)
    reach = 1
    while reach < depth:
        above = jnp.einsum("bnm,bmk->bnk", above.astype(jnp.float32), above.astype(jnp.float32)) > 0
        reach *= 2
    return above
