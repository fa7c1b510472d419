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


def see(tree: Tree, accepted: Accepted, nodes: int) -> SeenTree:
    """Returns a tree and its accepted path, padded to `nodes` nodes."""
    pad = ((0, 0), (0, nodes - tree.token_BN.shape[1]))
    return SeenTree(
        jnp.pad(tree.token_BN, pad),
        jnp.pad(tree.parent_BN, pad, constant_values=ROOT),
        jnp.pad(tree.valid_BN, pad),
        accepted.path_BP,
    )
