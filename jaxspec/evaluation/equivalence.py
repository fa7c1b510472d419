"""Equivalence of two decodings of the same requests: where their texts part, and by how little."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Params, Target
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Requests, bucket
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.nn.attention import causal_mask
from jaxspec.sampling import Sampling, position_noise, warp_logits

NEAR_TIE = 1e-3
"""Margin, in logits over temperature, below which rounding in fp32 decides between two tokens."""
TIES = {"float32": NEAR_TIE, "bfloat16": 0.25}
"""Margins below which another token is a tie, by the dtype that decodes; a logit of 16 has steps of 0.125 in bf16."""


class Divergence(NamedTuple):
    """The place where two decodings of one row first differ."""

    row: int
    index: int
    """Number of new tokens they share."""
    margin: float
    """Difference of the two tokens' scores (warped logits plus the position's noise) at that place."""

    @property
    def near_tie(self) -> bool:
        """Returns whether rounding explains it; matmuls of different widths round differently."""
        return self.margin < NEAR_TIE


@functools.partial(jax.jit, static_argnames="target")
def next_scores(
    target: Target, params: Params, tokens_BL: Array, length_B: Array, position_B: Array, sampling: Sampling
) -> Array:
    """Returns the scores `[B, V]` whose argmax `sampling.draw` takes for the token behind `length` tokens."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    features_BLD = target.forward(params, tokens_BL, positions_BL, causal_mask(tokens_BL.shape[1])).features_BLD
    last_BLD = jnp.take_along_axis(features_BLD, length_B[:, None, None] - 1, axis=1)
    logits_BLV = target.logits(params, last_BLD)
    noise_BLV = position_noise(sampling.seed_B, position_B[:, None], logits_BLV.shape[-1])
    noise_BLV = jnp.where(sampling.temperature_B[:, None, None] > 0, noise_BLV, 0.0)
    return (warp_logits(logits_BLV, sampling) + noise_BLV)[:, 0]


def divergences(
    engine: Engine, weights: Weights, requests: Requests, a: Sequence[Answer], b: Sequence[Answer]
) -> list[Divergence]:
    """Returns an entry for each row whose tokens differ between two decodings of `requests` by the same target.

    Raises ValueError where one answer of a row only begins like the other, which no rounding does.
    """
    found = []
    for row, (one, other) in enumerate(zip(a, b, strict=True)):
        if not np.array_equal(one.tokens, other.tokens):
            index = _parting(row, one.tokens, other.tokens)
            scores = _scores_behind(engine, weights, requests, row, one.tokens[:index])
            margin = abs(float(scores[int(one.tokens[index])]) - float(scores[int(other.tokens[index])]))
            found.append(Divergence(row, index, margin))
    return found


def _parting(row: int, x: np.ndarray, y: np.ndarray) -> int:
    """Returns the first index at which two texts differ. Raises ValueError where one ends before."""
    shared = min(len(x), len(y))
    index = int(np.argmin(np.append(x[:shared] == y[:shared], False)))
    if index == shared:
        raise ValueError(
            f"row {row} ends at {len(x)} tokens in one decoding and {len(y)} in the other: not one request"
        )
    return index


def _scores_behind(engine: Engine, weights: Weights, requests: Requests, row: int, written: np.ndarray) -> Array:
    """Returns the scores `[V]` of the token behind a row's prompt and its first new tokens."""
    prompt = np.asarray(requests.tokens_BL)[row, : int(requests.length_B[row])]
    context = np.concatenate([prompt, written])
    tokens_BL = np.zeros((1, bucket(len(context))), np.int32)
    tokens_BL[0, : len(context)] = context
    size = jnp.asarray([len(context)], jnp.int32)
    sampling = jax.tree.map(lambda s: s[row : row + 1], requests.sampling)
    return next_scores(engine.target, weights.target, jnp.asarray(tokens_BL), size, size, sampling)[0]


def top_margins(target: Target, params: Params, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Returns at every token of an answer the likeliest token's fp32 logit less the next one's."""
    context = [*prompt, *output]
    tokens_BL = np.zeros((1, bucket(len(context))), np.int32)
    tokens_BL[0, : len(context)] = context
    best_L2 = np.asarray(_best_two(target, params, jnp.asarray(tokens_BL)))
    at = np.arange(len(prompt) - 1, len(context) - 1)
    return [float(margin) for margin in best_L2[at, 0] - best_L2[at, 1]]


@functools.partial(jax.jit, static_argnames="target")
def _best_two(target: Target, params: Params, tokens_BL: Array) -> Array:
    """Returns `[L, 2]`: the two greatest logits behind every token of the one row."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    features_BLD = target.forward(params, tokens_BL, positions_BL, causal_mask(tokens_BL.shape[1])).features_BLD
    # A row at a time: all logits of a long answer would take hundreds of megabytes.
    return jax.lax.map(lambda x_D: jax.lax.top_k(target.logits(params, x_D[None, None])[0, 0], 2)[0], features_BLD[0])
