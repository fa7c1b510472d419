"""Are two decodings of the same requests the same text? Where they part, by how little."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Params, Target
from jaxspec.decoding.generation import Generation
from jaxspec.decoding.requests import Requests, bucket
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.nn.attention import causal_mask
from jaxspec.sampling import Sampling, position_noise, warp_logits

NEAR_TIE = 1e-3
"""Margin, in logits over temperature, below which rounding in fp32 decides between two tokens."""


class Divergence(NamedTuple):
    """Where two decodings of one row first differ."""

    row: int
    index: int
    """New tokens they share."""
    margin: float
    """How far the two tokens' scores (warped logits plus the position's noise) lie apart at that place."""

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it; matmuls of different widths round differently."""
        return self.margin < NEAR_TIE


@functools.partial(jax.jit, static_argnames="target")
def next_scores(
    target: Target, params: Params, tokens_BL: Array, length_B: Array, position_B: Array, sampling: Sampling
) -> Array:
    """What `sampling.draw` takes the argmax of for the token behind `length` tokens: `[B, V]`."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    features_BLD = target.forward(params, tokens_BL, positions_BL, causal_mask(tokens_BL.shape[1])).features_BLD
    last_BLD = jnp.take_along_axis(features_BLD, length_B[:, None, None] - 1, axis=1)
    logits_BLV = target.logits(params, last_BLD)
    noise_BLV = position_noise(sampling.seed_B, position_B[:, None], logits_BLV.shape[-1])
    noise_BLV = jnp.where(sampling.temperature_B[:, None, None] > 0, noise_BLV, 0.0)
    return (warp_logits(logits_BLV, sampling) + noise_BLV)[:, 0]


def divergences(engine: Engine, weights: Weights, requests: Requests, a: Generation, b: Generation) -> list[Divergence]:
    """One entry for each row whose tokens differ between two decodings of `requests` by the same target."""
    found = []
    lengths = np.asarray(requests.length_B)
    for row, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        if np.array_equal(x, y):
            continue
        shared = min(len(x), len(y))
        index = int(np.argmin(np.append(x[:shared] == y[:shared], False)))
        if index == shared:
            raise ValueError(
                f"row {row} ends at {len(x)} tokens in one decoding and {len(y)} in the other: not one request"
            )
        context = np.concatenate([np.asarray(requests.tokens_BL)[row, : lengths[row]], x[:index]])
        tokens = np.zeros((1, bucket(len(context))), np.int32)
        tokens[0, : len(context)] = context
        size = jnp.asarray([len(context)], jnp.int32)
        sampling = jax.tree.map(lambda s, row=row: s[row : row + 1], requests.sampling)
        scores = next_scores(engine.target, weights.target, jnp.asarray(tokens), size, size, sampling)
        margin = abs(float(scores[0, int(x[index])]) - float(scores[0, int(y[index])]))
        found.append(Divergence(row, index, margin))
    return found
