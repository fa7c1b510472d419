"""The accepted path, and how the target-draw rule finds it.

The target draws its own token at every node. The path that carries those tokens is accepted, and the draw at its end is
the bonus token. Whatever the tree holds, each accepted token *is* a draw from the target's warped distribution. So the
output has exactly that distribution, greedy and sampled alike, for any tree that is chosen without looking at the
draws. EAGLE-2's rejection loop for likeliest children has the same distribution and needs more code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxspec.base import Array, Tree


class Accepted(NamedTuple):
    """The path that a round adds to the text."""

    count_B: Array
    """Accept length: drafted tokens accepted, 0 to T."""
    path_BP: Array
    """Node of each depth, root first; behind the last accepted node its index repeats."""
    token_BP: Array
    """Tokens that the round adds to the text: the accepted ones, then the bonus token, which repeats to the end."""


def follow(tree: Tree, drawn_BN: Array, depth: int) -> Accepted:
    """Follows the target's draws down the tree. `drawn_BN` is the target's token at each node; `depth` is `T`."""
    # Siblings carry different tokens, so at most one child of a node matches and the path is unique.
    parent_BN = jnp.maximum(tree.parent_BN, 0)
    match_BN = tree.valid_BN & (tree.token_BN == jnp.take_along_axis(drawn_BN, parent_BN, axis=1))
    last_B = deepest(tree, reached(tree, match_BN))
    return path_to(tree, last_B, jnp.take_along_axis(drawn_BN, last_B[:, None], axis=1)[:, 0], depth)


def reached(tree: Tree, accepted_BN: Array) -> Array:
    """Returns a mask `[B, N]` of the nodes that are accepted together with all above them; the root always is."""
    accepted_BN = accepted_BN.at[:, 0].set(True)
    return tree.valid_BN & jnp.all(accepted_BN[:, None, :] | ~tree.ancestors_BNN, axis=-1)


def deepest(tree: Tree, reached_BN: Array) -> Array:
    """Returns the deepest of these nodes `[B]`, the first of equals."""
    return jnp.argmax(jnp.where(reached_BN, tree.depth_BN, -1), axis=1)


def path_to(tree: Tree, last_B: Array, bonus_B: Array, depth: int) -> Accepted:
    """Returns the path from the root to node `last`, with the token `bonus` behind it; `depth` is `T`."""
    count_B = jnp.take_along_axis(tree.depth_BN, last_B[:, None], axis=1)[:, 0]
    on_path_BN = jnp.take_along_axis(tree.ancestors_BNN, last_B[:, None, None], axis=1)[:, 0]
    depth_P = jnp.arange(depth + 1)
    wanted_BP = jnp.minimum(depth_P, count_B[:, None])
    is_node_BPN = on_path_BN[:, None, :] & (tree.depth_BN[:, None, :] == wanted_BP[:, :, None])
    path_BP = jnp.argmax(is_node_BPN, axis=-1)
    next_BP = jnp.take_along_axis(tree.token_BN, jnp.pad(path_BP[:, 1:], ((0, 0), (0, 1))), axis=1)
    return Accepted(count_B, path_BP, jnp.where(depth_P < count_B[:, None], next_BP, bonus_B[:, None]))
