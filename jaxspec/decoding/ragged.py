"""Verification of as many nodes of each row as it was given, in one axis: matmuls read no padding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Cache, KVCache, Params, Target, Tree
from jaxspec.nn.ragged import pack, ragged_of, unpack
from jaxspec.sampling import Sampling, draw
from jaxspec.verify.path import Accepted, follow


class Reading(NamedTuple):
    """The committed text of every row, and how its next tokens are drawn."""

    cache: Cache
    length_B: Array
    sampling: Sampling


def score_ragged(
    target: Target, params: Params, text: Reading, tree: Tree, nodes: int, depth: int
) -> tuple[KVCache, Array, Accepted]:
    """Runs the target once on the valid nodes of all trees, `nodes` a row on average at most; follows its draws.

    Returns the nodes' keys and values, what the drafter reads of them `[B, N, D]`, and the path of each row, up to
    `depth` deep: what `score` gives and the rule target-draw keeps. Of nodes that are not valid the first two are any.
    """
    batch = len(tree.token_BN)
    ragged = ragged_of(tree.valid_BN, nodes * batch, tree.ancestors_BNN)
    at_BN = text.length_B[:, None] + tree.depth_BN
    token_1A, at_1A = pack(ragged, tree.token_BN), pack(ragged, at_BN)
    out = target.forward(params, token_1A, at_1A, ragged, (text.cache, text.length_B), keep_kv=True)
    assert out.fresh is not None
    # Each node is a row of its own to the draw: it takes the noise of its own position, and its row's settings.
    logits_A1V = jnp.swapaxes(target.logits(params, out.features_BLD), 0, 1)
    row_A = ragged.from_A // tree.token_BN.shape[1]
    mine = jax.tree.map(lambda x: x[row_A], text.sampling)
    drawn_A = draw(logits_A1V, jnp.zeros((len(row_A), 1), jnp.int32), at_1A[0] + 1, 1, mine)[:, 0]
    accepted = follow(tree, unpack(ragged, drawn_A), depth)
    return out.fresh, unpack(ragged, out.read_BLD[0]), accepted
