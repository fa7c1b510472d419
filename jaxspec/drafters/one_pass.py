"""Drafting all depths in one pass: a node's children depend on its depth alone."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxspec.base import Array, Cache, Frontier, Params, SharedTables
from jaxspec.drafters.module import DrafterModule


class ParallelState(NamedTuple):
    """The outputs that a row's next tokens are predicted by, of all depths."""

    cache: Cache | None
    """Keys and values of the committed pairs; None for heads without attention."""
    length_B: Array
    """Committed pairs."""
    hidden_BTD: Array
    """The output for every depth: `[:, d]` is scored for the children of nodes at depth `d`."""


class ParallelScratch(NamedTuple):
    """The outputs that one tree's nodes below the root are drafted by."""

    hidden_BTD: Array
    """The outputs for depths 1, 2 ..."""
    logits_BTV: Array | None = None
    """Their logits, from the first level on."""


class OnePass(DrafterModule):
    """A drafter that predicts all depths when it reads: a node's children depend on its depth alone. Abstract.

    Its config says in `tokens` how many depths there are. A round reads the LM head twice, once for the root's children
    and once for those of all other depths; heads of the depths' own are read once each.
    """

    @property
    def deepest(self) -> int | None:
        """Greatest depth of a node: the tokens of a pass."""
        return self.config.tokens

    @property
    def one_pass(self) -> bool:
        """Yes."""
        return True

    def scratch(self, state: ParallelState, slots: int) -> ParallelScratch:
        """The outputs for all depths that `slots` expanded nodes can have."""
        return ParallelScratch(state.hidden_BTD[:, 1 : slots + 1])

    def expand(
        self, params: Params, shared: SharedTables, state: ParallelState, scratch: ParallelScratch, frontier: Frontier
    ) -> tuple[Array, ParallelScratch]:
        """Logits `[B, W, V]` of the children of one level's nodes: the same for all of them."""
        logits_BTV = scratch.logits_BTV
        if logits_BTV is None:
            logits_BTV = self.score_below(params, shared, scratch.hidden_BTD)
        logits_B1V = logits_BTV[:, frontier.depth - 1 : frontier.depth]
        logits_BWV = jnp.broadcast_to(logits_B1V, (*frontier.token_BW.shape, logits_BTV.shape[-1]))
        return logits_BWV, scratch._replace(logits_BTV=logits_BTV)

    def score_below(self, params: Params, shared: SharedTables, hidden_BTD: Array) -> Array:
        """Logits `[B, T, V]` of the outputs for depths 1, 2 ..., which share one LM head."""
        return self.logits(params, shared, hidden_BTD)
