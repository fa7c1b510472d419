"""What every tree policy shares: ancestor masks from parents, and the distributions of its draws in one array."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import Array, Children, DraftDistributions
from jaxspec.parallel.rows import scatter_rows


def ancestor_mask(parent_BN: Array, depth: int) -> Array:
    """`[B, N, N]`: node `m` is `n` or above it. `depth` rounds of doubling reach from parents to all ancestors."""
    nodes = parent_BN.shape[1]
    above = (jnp.arange(nodes) == parent_BN[:, :, None]) | jnp.eye(nodes, dtype=bool)
    reach = 1
    while reach < depth:
        above = jnp.einsum("bnm,bmk->bnk", above.astype(jnp.float32), above.astype(jnp.float32)) > 0
        reach *= 2
    return above


def below_root(x_BK: Array, root: float) -> Array:
    """The root's entry, and behind it those of the other nodes: `[B, N]`."""
    return jnp.concatenate([jnp.full((x_BK.shape[0], 1), root, x_BK.dtype), x_BK], axis=1)


def numbered(at_BK: Array, size: int) -> Array:
    """`[B, size]`: 1, 2, .. at each row's `at`, 0 elsewhere."""
    return scatter_rows(
        jnp.zeros((len(at_BK), size), jnp.int32),
        at_BK,
        jnp.broadcast_to(jnp.arange(1, at_BK.shape[1] + 1, dtype=jnp.int32), at_BK.shape),
    )


def stack_distributions(families: list[Children], row_BN: Array) -> DraftDistributions | None:
    """The distributions that the children of the root, then of each level, were drawn from; None where nothing was
    drawn."""
    distributions = [family.distribution_BWV for family in families if family.distribution_BWV is not None]
    if not distributions:
        return None
    assert families[0].random_B is not None
    return DraftDistributions(jnp.concatenate(distributions, axis=1), row_BN, families[0].random_B)
