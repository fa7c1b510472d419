"""The tree of a round as its readers see it: tokens, parents, and the path that was accepted."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Tree
from jaxspec.verify import Accepted


class SeenTree(NamedTuple):
    """A round's tree of every row, without what only decoding needs."""

    token_BN: Array
    parent_BN: Array
    """Node of the parent; `ROOT` for node 0 and padding."""
    valid_BN: Array
    """Which nodes were verified."""
    path_BP: Array
    """Node of each depth on the accepted path, the root first; behind the last its number repeats."""
    drafted_B2: Array
    """Drafted tokens that were verified, and the depth of the deepest: both 0 where nothing was drafted."""


def see(tree: Tree, accepted: Accepted, nodes: int) -> SeenTree:
    """Returns a tree and its accepted path, padded to `nodes` nodes."""
    token_BN, parent_BN, valid_BN = tree.token_BN, tree.parent_BN, tree.valid_BN
    depth_B = jnp.max(jnp.where(valid_BN, tree.depth_BN, 0), axis=1)
    drafted_B2 = jnp.stack([jnp.sum(valid_BN[:, 1:], axis=1, dtype=jnp.int32), depth_B], axis=1)
    if missing := nodes - token_BN.shape[1]:
        pad = ((0, 0), (0, missing))
        token_BN, valid_BN = jnp.pad(token_BN, pad), jnp.pad(valid_BN, pad)
        parent_BN = jnp.pad(parent_BN, pad, constant_values=ROOT)
    return SeenTree(token_BN, parent_BN, valid_BN, accepted.path_BP, drafted_B2)
