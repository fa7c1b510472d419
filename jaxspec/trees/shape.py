"""Functions that tree policies share: single nodes, ancestor masks, node numbers, draft distributions in one array."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Children, DraftDistributions, Tree
from jaxspec.parallel.rows import scatter_rows

MOST_NODES = 1024
"""Nodes of the largest tree: some ten times those of any that pays."""
MOST_CANDIDATES = 2**16
"""Candidates of the largest drafting, of which the best become nodes."""


def check_size(what: str, size: int, most: int = MOST_NODES) -> None:
    """Raises ValueError for a size of a tree that is above `most`, before anything as large is made."""
    if size > most:
        raise ValueError(f"a tree with {what} {size:,} is too large, the most is {most:,}: take a smaller one")


def ancestor_mask(parent_BN: Array, depth: int) -> Array:
    """Returns `[B, N, N]`: node `m` is `n` or an ancestor of `n`. No node is deeper than `depth`."""
    nodes = parent_BN.shape[1]
    above = (jnp.arange(nodes) == parent_BN[:, :, None]) | jnp.eye(nodes, dtype=bool)
    # Each squaring doubles how far up the mask reaches.
    reach = 1
    while reach < depth:
        above = jnp.einsum("bnm,bmk->bnk", above.astype(jnp.float32), above.astype(jnp.float32)) > 0
        reach *= 2
    return above


def root_alone(root_B: Array, rows: int = 1) -> Tree:
    """Returns the tree of one node, the root; behind it padding up to `rows` nodes that no node sees."""
    token_BN = jnp.zeros((root_B.shape[0], rows), jnp.int32).at[:, 0].set(root_B)
    nothing = jnp.zeros_like(token_BN)
    alone_BNN = jnp.broadcast_to(jnp.eye(rows, dtype=bool), (*token_BN.shape, rows))
    root_BN = jnp.broadcast_to(jnp.arange(rows) == 0, token_BN.shape)
    return Tree(token_BN, nothing + ROOT, nothing, nothing.astype(jnp.float32), root_BN, alone_BNN)


def below_root(x_BK: Array, root: float) -> Array:
    """Returns `[B, N]`: the root's entry `root`, then those of the other nodes."""
    return jnp.concatenate([jnp.full((x_BK.shape[0], 1), root, x_BK.dtype), x_BK], axis=1)


def numbered(at_BK: Array, size: int) -> Array:
    """Returns `[B, size]`: 1, 2, .. at each row's places `at`, 0 elsewhere."""
    return scatter_rows(
        jnp.zeros((len(at_BK), size), jnp.int32),
        at_BK,
        jnp.broadcast_to(jnp.arange(1, at_BK.shape[1] + 1, dtype=jnp.int32), at_BK.shape),
    )


def stack_distributions(families: list[Children], row_BN: Array) -> DraftDistributions | None:
    """Returns the draft distributions of the root's children, then of each level's; None where nothing was drawn."""
    distributions = [family.distribution_BWV for family in families if family.distribution_BWV is not None]
    if not distributions:
        return None
    assert families[0].random_B is not None
    return DraftDistributions(jnp.concatenate(distributions, axis=1), row_BN, families[0].random_B)
