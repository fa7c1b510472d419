"""EAGLE-2's context-aware dynamic draft tree (arXiv 2406.16858): expand a beam level by level, then rerank."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import DRAFT_MODES, ROOT, Array, Children, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.sampling import top_k
from jaxspec.trees.shape import (
    MOST_CANDIDATES,
    ancestor_mask,
    below_root,
    check_size,
    numbered,
    stack_distributions,
)


class Candidates(NamedTuple):
    """Drafted nodes (axis `Q`), level by level, siblings side by side: EAGLE-2's pool."""

    token_BQ: Array
    score_BQ: Array
    """Cumulative draft log-probability."""
    bound_BQ: Array
    """Value that candidates are ranked by: the parent's score plus `bound_BWR`, which is `score` if none is drawn."""
    parent_BQ: Array
    """Index of the parent among the candidates; `ROOT` at depth 1."""


class Front(NamedTuple):
    """The `beam` nodes (axis `W`) of one level that are expanded next."""

    token_BW: Array
    score_BW: Array
    candidate_BW: Array
    """Index among the candidates."""
    parent_slot_BW: Array
    """Scratch slot of the parent; `ROOT` at depth 1."""
    visible_BWM: Array
    """Scratch slots that each node sees: those of its ancestors and its own."""


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree: the best `beam` of `beam^2` continuations are expanded at each level.

    All drafted nodes enter a pool. Reranking keeps the root and the best `nodes - 1` of the pool by cumulative
    log-probability. Ties go to the shallower node and then to the earlier one, so a node is never kept without its
    parent. `depth` is the paper's: the greatest depth of a node, which is the reference code's `depth` argument + 1.
    Raises ValueError where the pool is smaller than the tree.
    """

    nodes: int = 60
    depth: int = 6
    beam: int = 10

    def __post_init__(self) -> None:
        if min(self.nodes, self.depth, self.beam) < 1:
            raise ValueError(f"a dynamic tree needs nodes, depth and beam of at least 1, not {self}")
        for name in ("nodes", "depth", "beam"):
            check_size(name, getattr(self, name))
        check_size("candidates", self.pool, MOST_CANDIDATES)
        if self.pool < self.nodes - 1:
            raise ValueError(
                f"a beam of {self.beam} over depth {self.depth} drafts {self.pool} nodes, fewer than the "
                f"{self.nodes - 1} wanted: raise beam or depth, or lower nodes"
            )

    @property
    def pool(self) -> int:
        """Number of candidates: `beam + (depth - 1) * beam^2`."""
        return self.beam + (self.depth - 1) * self.beam**2

    @property
    def slots(self) -> int:
        """Expanded nodes: `beam` at every depth but the last."""
        return self.beam * (self.depth - 1)

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """All draft modes: every node has children of its own."""
        return DRAFT_MODES

    @property
    def spec(self) -> str:
        """The tree as `parse_tree` reads it."""
        return f"dynamic:{self.nodes}x{self.depth}x{self.beam}"

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Expands `depth` levels, then reranks all candidates and keeps the best `nodes - 1` (EAGLE-2)."""
        beam = self.beam
        found = choose(root_logits_BV[:, None], beam, ROOT)
        first, front = self.begin(found)
        pool, families, slots = [first], [found], []
        for d in range(1, self.depth):
            slots.append(front.candidate_BW)
            frontier = Frontier(front.token_BW, front.parent_slot_BW, front.visible_BWM, d, beam * (d - 1))
            logits_BWV, scratch = draft(scratch, frontier)
            found = choose(logits_BWV, beam, frontier.slot)
            families.append(found)
            level, front = self.expand(front, found, frontier)
            pool.append(level)
        candidates = Candidates(*(jnp.concatenate(p, axis=1) for p in zip(*pool, strict=True)))
        return self.rerank(candidates, families, slots, root_token_B)

    def begin(self, found: Children) -> tuple[Candidates, Front]:
        """Returns the root's children as candidates, all of which are expanded first."""
        token, score, bound = (x[:, 0] for x in found[:3])
        nowhere = jnp.full_like(token, ROOT)
        itself = jnp.broadcast_to(jnp.eye(self.beam, dtype=bool), (*token.shape, self.beam))
        place = jnp.broadcast_to(jnp.arange(self.beam), token.shape)
        return Candidates(token, score, bound, nowhere), Front(token, score, place, nowhere, itself)

    def expand(self, front: Front, found: Children, frontier: Frontier) -> tuple[Candidates, Front]:
        """EAGLE-2's expansion: returns the `beam^2` children of a level, and the best `beam` as the next level."""
        beam, d = self.beam, frontier.depth
        batch = front.token_BW.shape[0]
        token = found.token_BWR.reshape(batch, beam * beam)
        score, bound = (
            (front.score_BW[..., None] + x).reshape(batch, beam * beam) for x in (found.logp_BWR, found.bound_BWR)
        )
        level = Candidates(token, score, bound, jnp.repeat(front.candidate_BW, beam, axis=1))
        # The beam may follow real scores; the reranking alone must not look at a drawn node's own token.
        front_score, chosen = top_k(score, beam)
        row = chosen // beam
        above = jnp.take_along_axis(front.visible_BWM, row[..., None], axis=1)
        itself = jnp.broadcast_to(jnp.eye(beam, dtype=bool), (batch, beam, beam))
        return level, Front(
            token_BW=jnp.take_along_axis(token, chosen, axis=1),
            score_BW=front_score,
            candidate_BW=beam + (d - 1) * beam**2 + chosen,
            parent_slot_BW=beam * (d - 1) + row,
            visible_BWM=jnp.concatenate([above, itself], axis=2),
        )

    def rerank(self, pool: Candidates, families: list[Children], expanded: list[Array], root_token_B: Array) -> Tree:
        """EAGLE-2's reranking: returns the tree of the best `nodes - 1` candidates, in the order of the pool.

        `expanded` are the candidates in each scratch slot, level by level.
        """
        tree, chosen = best_of_pool(pool, self.depths, self.nodes, root_token_B)
        if not families or families[0].distribution_BWV is None:
            return tree
        distribution_BQ = numbered(jnp.concatenate(expanded, axis=1), self.pool) if expanded else pool.parent_BQ * 0
        row_BN = below_root(jnp.take_along_axis(distribution_BQ, chosen, axis=1), 0)
        return tree._replace(distributions=stack_distributions(families, row_BN))

    @property
    def depths(self) -> np.ndarray:
        """Depth of every candidate, in the order of the pool."""
        rest = np.repeat(np.arange(2, self.depth + 1, dtype=np.int32), self.beam**2)
        return np.concatenate([np.ones(self.beam, np.int32), rest])


def best_of_pool(
    pool: Candidates, depth_Q: np.ndarray, nodes: int, root_token_B: Array, drafted_B: Array | None = None
) -> tuple[Tree, Array]:
    """Returns the tree of the root and the best `nodes - 1` candidates, in the order of the pool, and their places.

    Parents stand before their children in the pool, and none has a smaller bound than its child. With `drafted_B` a row
    keeps the best so many of them alone; the places of the others hold padding.
    """
    # A drawn candidate is kept by the bound known before its draw, not by its own probability: kept for turning
    # out likely, it would no longer have the distribution it was drawn from. The bound falls from sibling to
    # sibling and from parent to child, so parents and elder siblings stay.
    # Pool order is by depth, and top_k takes the lower index among equals: ties go to the shallower node.
    _, chosen = top_k(pool.bound_BQ, nodes - 1)
    kept_BN = jnp.ones((len(chosen), nodes), bool)
    if drafted_B is not None:
        # Padding goes behind the pool's end, and is sorted behind the others.
        chosen = jnp.where(jnp.arange(nodes - 1) < drafted_B[:, None], chosen, len(depth_Q))
        kept_BN = jnp.arange(nodes) <= drafted_B[:, None]
    # Sorted, parents stand before their children and siblings in the order of their draws.
    chosen = jnp.sort(chosen, axis=1)
    node_of = numbered(chosen, len(depth_Q))
    chosen = jnp.minimum(chosen, len(depth_Q) - 1)
    parent = jnp.take_along_axis(pool.parent_BQ, chosen, axis=1)
    parent = jnp.where(parent == ROOT, 0, jnp.take_along_axis(node_of, jnp.maximum(parent, 0), axis=1))
    parent_BN = below_root(parent, ROOT)
    token_BN = jnp.concatenate([root_token_B[:, None], jnp.take_along_axis(pool.token_BQ, chosen, axis=1)], axis=1)
    tree = Tree(
        token_BN.astype(jnp.int32),
        parent_BN,
        below_root(jnp.asarray(depth_Q, jnp.int32)[chosen], 0),
        below_root(jnp.take_along_axis(pool.score_BQ, chosen, axis=1), 0.0),
        kept_BN & (below_root(jnp.take_along_axis(pool.bound_BQ, chosen, axis=1), 0.0) > -jnp.inf),
        ancestor_mask(parent_BN, int(depth_Q.max(initial=1))),
    )
    return tree, chosen
