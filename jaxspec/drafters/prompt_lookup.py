"""Prompt lookup (Saxena 2023; "n-gram" in servers): what stood behind the newest tokens the last time they were there.

It has no weights and no pass of a model: a round compares tokens. It drafts alone, or beside a trained drafter, whose
tree gets a branch of looked-up tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxspec.base import Array, Drafter, Frontier, Lookup, Params, SharedTables
from jaxspec.parallel.rows import scatter_rows


class LookupState(NamedTuple):
    """The text of each row, and the state of the drafter beside it."""

    head: Any
    """None where there is none."""
    tokens_BS: Array
    length_B: Array


class LookupScratch(NamedTuple):
    """Working memory of one tree: that of the drafter beside it, and the place that was found in the text."""

    head: Any
    lookup: Lookup


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """A drafter that looks the newest tokens up in the text, prompt included, under the `Drafter` contract.

    Its trees have a `LookupBranch` (`trees.lookup`), which takes the looked-up tokens from the scratch. All else is the
    `head`'s, a drafter beside it; without one it drafts nothing else.
    """

    head: Drafter | None = None
    longest: int = 8
    """Most tokens that are compared; longer matches count as so long."""

    @property
    def looks_up(self) -> bool:
        """Yes: its scratch holds a `Lookup`."""
        return True

    @property
    def deepest(self) -> int | None:
        """No limit: the tree's branches know their own."""
        return None

    @property
    def one_pass(self) -> bool:
        """Returns whether the drafter beside it drafts in one pass; none does too."""
        return self.head is None or self.head.one_pass

    @property
    def taps(self) -> tuple[int, ...]:
        """Those of the drafter beside it."""
        return () if self.head is None else self.head.taps

    @property
    def vocab(self) -> int | None:
        """That of the drafter beside it."""
        return None if self.head is None else self.head.vocab

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> LookupState:
        """Returns texts of one token each."""
        head = None if self.head is None else self.head.init_state(params, shared, first_B, capacity)
        tokens_BS = jnp.zeros((len(first_B), capacity), jnp.int32).at[:, 0].set(first_B)
        return LookupState(head, tokens_BS, jnp.ones_like(first_B))

    def extend(
        self,
        params: Params,
        shared: SharedTables,
        state: LookupState,
        tokens_BL: Array,
        features_BLD: Array,
        count_B: Array,
    ) -> tuple[LookupState, Array]:
        """Appends the tokens; logits are those of the drafter beside it, or zeros."""
        # Tokens behind a row's count are written too, and overwritten by the next ones; those past the end are dropped.
        at_BL = state.length_B[:, None] + jnp.arange(tokens_BL.shape[1])
        tokens_BS = scatter_rows(state.tokens_BS, at_BL, tokens_BL.astype(jnp.int32))
        text = state._replace(tokens_BS=tokens_BS, length_B=state.length_B + count_B)
        if self.head is None:
            return text, jnp.zeros((len(count_B), shared.head_VD.shape[0]))
        head, logits_BV = self.head.extend(params, shared, state.head, tokens_BL, features_BLD, count_B)
        return text._replace(head=head), logits_BV

    def scratch(self, state: LookupState, slots: int) -> LookupScratch:
        """Looks the newest tokens up, once a round."""
        head = None if self.head is None else self.head.scratch(state.head, slots)
        return LookupScratch(head, look_up(state.tokens_BS, state.length_B, self.longest))

    def expand(
        self, params: Params, shared: SharedTables, state: LookupState, scratch: LookupScratch, frontier: Frontier
    ) -> tuple[Array, LookupScratch]:
        """Returns the logits of the drafter beside it. Raises ValueError where there is none."""
        if self.head is None:
            raise ValueError("prompt lookup alone drafts one branch: take a tree such as lookup:7, or add a drafter")
        logits_BWV, head = self.head.expand(params, shared, state.head, scratch.head, frontier)
        return logits_BWV, scratch._replace(head=head)


def look_up(tokens_BS: Array, length_B: Array, longest: int) -> Lookup:
    """Returns the earlier place that shares most of the newest tokens, up to `longest`; of equals the latest."""
    slots = tokens_BS.shape[1]
    at_S = jnp.arange(slots)
    same_BS = (at_S >= 1) & (at_S < length_B[:, None])
    match_BS = jnp.zeros_like(tokens_BS)
    for back in range(1, min(longest, slots - 1) + 1):
        newest_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        # Before the text's beginning stands no token.
        before_BS = jnp.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
        same_BS &= before_BS == newest_B1
        match_BS += same_BS
    best_B = jnp.argmax(match_BS * slots + jnp.where(match_BS > 0, at_S, 0), axis=1)
    match_B = jnp.take_along_axis(match_BS, best_B[:, None], axis=1)[:, 0]
    return Lookup(tokens_BS, length_B, best_B.astype(jnp.int32), match_B)
