"""EAGLE-2's context-aware draft tree: a beam grown by cumulative confidence, then the best nodes of all levels."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import DRAFT_MODES, ROOT, Array, Children, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.sampling import top_k
from jaxspec.trees.shape import ancestor_mask, below_root, numbered, stack_distributions


class Candidates(NamedTuple):
    """All that was drafted (axis `Q`), level by level, siblings side by side."""

    token_BQ: Array
    score_BQ: Array
    bound_BQ: Array
    """What a candidate is kept by: its parent's score and `left_BWR`; its own score where children are not drawn."""
    parent_BQ: Array
    """Candidate; `ROOT` at depth 1."""


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (section 4): at each level the `beam` best of `beam^2` continuations are expanded; all enter a pool.

    The tree is the root and the `nodes - 1` best of the pool by cumulative log-probability, ties to the shallower node
    and then to the earlier one, so that a node is never kept without its parent. `depth` is the paper's: the deepest a
    node can be (the reference code's `depth` argument + 1).
    Raises ValueError where the pool is smaller than the tree.
    """

    nodes: int = 60
    depth: int = 6
    beam: int = 10

    def __post_init__(self) -> None:
        if min(self.nodes, self.depth, self.beam) < 1:
            raise ValueError(f"a dynamic tree needs nodes, depth and beam of at least 1, not {self}")
        if self.pool < self.nodes - 1:
            raise ValueError(
                f"a beam of {self.beam} over depth {self.depth} drafts {self.pool} nodes, fewer than the "
                f"{self.nodes - 1} wanted: raise beam or depth, or lower nodes"
            )

    @property
    def pool(self) -> int:
        """Candidates drafted: `beam + (depth - 1) * beam^2`."""
        return self.beam + (self.depth - 1) * self.beam**2

    @property
    def slots(self) -> int:
        """Expanded nodes: `beam` at every depth but the last."""
        return self.beam * (self.depth - 1)

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """All: every node's children are its own."""
        return DRAFT_MODES

    @property
    def spec(self) -> str:
        """The tree as `parse_tree` reads it."""
        return f"dynamic:{self.nodes}x{self.depth}x{self.beam}"

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Draft `depth` levels and keep the best `nodes - 1` of all candidates.

        Drawn candidates are not kept by their own probability, for then the children of a node would no longer have the
        distribution they were drawn from: what counts is the bound on it that was known before the draw
        (`Children.left_BWR`). It falls from sibling to sibling and from parent to child, so no candidate's own token
        decides over its place.
        """
        beam, batch = self.beam, root_token_B.shape[0]
        found = choose(root_logits_BV[:, None], beam, ROOT)
        token, score, bound = (x[:, 0] for x in found[:3])
        nowhere = jnp.full((batch, beam), ROOT)
        pool, families, slots = [(token, score, bound, nowhere)], [found], []
        front_token, front_score, front_pool = token, score, jnp.broadcast_to(jnp.arange(beam), (batch, beam))
        parent_slot = nowhere
        visible = jnp.broadcast_to(jnp.eye(beam, dtype=bool), (batch, beam, beam))
        for d in range(1, self.depth):
            slots.append(front_pool)
            frontier = Frontier(front_token, parent_slot, visible, d, beam * (d - 1))
            logits_BWV, scratch = draft(scratch, frontier)
            found = choose(logits_BWV, beam, frontier.slot)
            families.append(found)
            token = found.token_BWR.reshape(batch, beam * beam)
            score, bound = (
                (front_score[..., None] + x).reshape(batch, beam * beam) for x in (found.logp_BWR, found.left_BWR)
            )
            pool.append((token, score, bound, jnp.repeat(front_pool, beam, axis=1)))
            front_score, chosen = top_k(score, beam)
            front_token = jnp.take_along_axis(token, chosen, axis=1)
            front_pool = beam + (d - 1) * beam**2 + chosen
            row = chosen // beam
            parent_slot = beam * (d - 1) + row
            own = jnp.broadcast_to(jnp.eye(beam, dtype=bool), (batch, beam, beam))
            visible = jnp.concatenate([jnp.take_along_axis(visible, row[..., None], axis=1), own], axis=2)
        candidates = Candidates(*(jnp.concatenate(p, axis=1) for p in zip(*pool, strict=True)))
        return self._rerank(candidates, families, slots, root_token_B)

    def _rerank(self, pool: Candidates, families: list[Children], expanded: list[Array], root_token_B: Array) -> Tree:
        """The tree of the best `nodes - 1` candidates, in pool order; `expanded` are the candidates in each slot."""
        beam = self.beam
        # Pool order is by depth, and top_k takes the lower index among equals: ties go to the shallower node.
        _, chosen = top_k(pool.bound_BQ, self.nodes - 1)
        chosen = jnp.sort(chosen, axis=1)
        node_of = numbered(chosen, self.pool)
        parent = jnp.take_along_axis(pool.parent_BQ, chosen, axis=1)
        parent = jnp.where(parent == ROOT, 0, jnp.take_along_axis(node_of, jnp.maximum(parent, 0), axis=1))
        levels = np.concatenate([np.ones(beam, np.int32), np.repeat(np.arange(2, self.depth + 1), beam**2)])
        distribution_BQ = (
            numbered(jnp.concatenate(expanded, axis=1), self.pool) if expanded else jnp.zeros_like(pool.parent_BQ)
        )
        depth_BN = below_root(jnp.asarray(levels, jnp.int32)[chosen], 0)
        parent_BN = below_root(parent, ROOT)
        score_BN = below_root(jnp.take_along_axis(pool.score_BQ, chosen, axis=1), 0.0)
        valid_BN = below_root(jnp.take_along_axis(pool.bound_BQ, chosen, axis=1), 0.0) > -jnp.inf
        token_BN = jnp.concatenate([root_token_B[:, None], jnp.take_along_axis(pool.token_BQ, chosen, axis=1)], axis=1)
        return Tree(
            token_BN.astype(jnp.int32),
            parent_BN,
            depth_BN,
            score_BN,
            valid_BN,
            ancestor_mask(parent_BN, self.depth),
            stack_distributions(families, below_root(jnp.take_along_axis(distribution_BQ, chosen, axis=1), 0)),
        )
