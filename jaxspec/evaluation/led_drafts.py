"""Drafts along an answer, one place after the other: the likeliest tokens by depth, and the ranks of what followed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import ROOT, Array, Frontier
from jaxspec.decoding.generation import run_rounds, start
from jaxspec.decoding.requests import Request, make_requests
from jaxspec.decoding.rounds import DecodeState, Engine, Weights, shared_tables
from jaxspec.serving.loading import Models
from jaxspec.trees.children import likeliest

FREE = -1
"""Stands for a token to follow where the draft follows its own likeliest."""


class LedDraft(NamedTuple):
    """The draft behind one token of an answer; axes: depth `T`, rank `K`."""

    top_TK: np.ndarray
    """The likeliest tokens, best first."""
    logp_TK: np.ndarray
    ranks: list[int]
    """Ranks of the answer's tokens, as deep as the answer goes; -1 for those not among the likeliest."""


def led_drafts(
    models: Models, request: Request, output: Sequence[int], *, depth: int, ranks: int, led: bool = True
) -> Iterator[LedDraft]:
    """Yields the draft behind every token of an answer but the last.

    The models decode a token a round: a drafter beside a chain without nodes. `output` is their answer to the request,
    or its beginning. `led` has the draft follow the answer; else it follows its own likeliest tokens.
    """
    engine, weights = models.engine, models.weights
    state = start(engine, weights, make_requests([request]))
    for at in range(1, len(output)):
        behind = list(output[at : at + depth])
        follow_T = np.full(depth, FREE, np.int32)
        if led:
            follow_T[: len(behind)] = behind
        top_TK, logp_TK = jax.device_get(_draft(engine, ranks, weights, state, follow_T))
        places = (np.flatnonzero(top_K == token) for top_K, token in zip(top_TK, behind, strict=False))
        yield LedDraft(top_TK, logp_TK, [int(place[0]) if len(place) else -1 for place in places])
        state = run_rounds(engine, weights, state, np.int32(1))


@functools.partial(jax.jit, static_argnames=("engine", "ranks"))
def _draft(engine: Engine, ranks: int, weights: Weights, state: DecodeState, follow_T: Array) -> tuple[Array, Array]:
    """Returns tokens and log-probabilities `[T, K]` of the chain that the first row would draft."""
    drafter, root_logits_BV = engine.drafter, state.root_logits_BV
    assert drafter is not None and root_logits_BV is not None
    shared, depth = shared_tables(engine, weights), len(follow_T)
    scratch, logits_BWV, found = drafter.scratch(state.draft, depth - 1), root_logits_BV[:, None], []
    for d in range(depth):
        children = likeliest(logits_BWV, min(ranks, logits_BWV.shape[-1]))
        top_BWK = children.token_BWR if weights.vocab is None else weights.vocab.token_U[children.token_BWR]
        found.append((top_BWK[0, 0], children.logp_BWR[0, 0]))
        if d + 1 < depth:
            token_BW = jnp.where(follow_T[d] == FREE, top_BWK[..., 0], follow_T[d])
            parent_BW, visible_BWM = (
                jnp.full_like(token_BW, d - 1 if d else ROOT),
                jnp.ones((*token_BW.shape, d + 1), bool),
            )
            frontier = Frontier(token_BW, parent_BW, visible_BWM, d + 1, d)
            logits_BWV, scratch = drafter.expand(weights.drafter, shared, state.draft, scratch, frontier)
    tokens, logps = zip(*found, strict=True)
    return jnp.stack(tokens), jnp.stack(logps)
