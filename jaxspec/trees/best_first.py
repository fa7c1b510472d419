"""Best-first tree, for drafters with one distribution per depth: its nodes are the likeliest of all paths."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import ROOT, Array, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.parallel.rows import gather_rows
from jaxspec.sampling import top_k
from jaxspec.trees.shape import ancestor_mask, below_root, check_size, numbered


class Nodes(NamedTuple):
    """Nodes below the root (axis `K`), of one depth or of all depths."""

    token_BK: Array
    score_BK: Array
    """Cumulative draft log-probability."""
    parent_BK: Array
    """Index of the parent among the nodes of all depths; `ROOT` for the root's children."""


@dataclasses.dataclass(frozen=True)
class BestFirstTree:
    """The best tree of `nodes` nodes over the `width` likeliest tokens of each of `depth` depths (JetSpec, DDTree).

    The drafter is called once a depth, and every node of a depth gets the same children. The tree is the root and the
    `nodes - 1` nodes of the greatest cumulative log-probability, best first. Ties go to the shallower node and then to
    the child of the better one. Scores fall along a path, so every node stands below its parent.

    The tree maximizes the expected accept length under the *product of the depths' distributions*. That is a
    surrogate: the target's tokens of neighbouring depths depend on each other. With a drafter whose children depend on
    the node (EAGLE, a draft LM), the distributions are those along its likeliest chain; the output stays lossless, and
    only the tree is worse. Raises ValueError where there are fewer paths than nodes.
    """

    nodes: int = 60
    depth: int = 4
    width: int = 10

    def __post_init__(self) -> None:
        if min(self.nodes, self.depth, self.width) < 1:
            raise ValueError(f"a best-first tree needs nodes, depth and width of at least 1, not {self}")
        for name in ("nodes", "depth", "width"):
            check_size(name, getattr(self, name))
        paths = sum(self.width**d for d in range(1, self.depth + 1))
        if paths < self.nodes - 1:
            raise ValueError(
                f"a best-first tree of width {self.width} and depth {self.depth} has {paths} nodes below its root, "
                f"fewer than the {self.nodes - 1} wanted: raise width or depth, or lower nodes"
            )

    @property
    def slots(self) -> int:
        """Expanded nodes: one at every depth but the last, the root aside."""
        return self.depth - 1

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """`topk` alone."""
        # Drawn children must be each node's own draws; here the nodes of a depth share their children.
        return ("topk",)

    @property
    def spec(self) -> str:
        """The tree as `parse_tree` reads it."""
        return f"best_first:{self.nodes}x{self.depth}x{self.width}"

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Drafts the likeliest tokens of each depth, then takes the best of their paths."""
        token_BTR, logp_BTR = self._draft_depths(draft, choose, scratch, root_logits_BV)
        pool, counts = self._best_of_depths(token_BTR, logp_BTR)
        score_BK, chosen = top_k(pool.score_BK, self.nodes - 1)
        # A token that the draft gives no probability stands for no node.
        real = score_BK > -jnp.inf
        node_of = numbered(chosen, pool.parent_BK.shape[1])
        above = gather_rows(pool.parent_BK, chosen)
        parent_BK = jnp.where(above == ROOT, 0, gather_rows(node_of, jnp.maximum(above, 0)))
        depths = np.repeat(np.arange(1, self.depth + 1), counts)
        parent_BN = below_root(jnp.where(real, parent_BK, ROOT), ROOT)
        score_BN = below_root(score_BK, 0.0)
        return Tree(
            jnp.concatenate([root_token_B[:, None], jnp.where(real, gather_rows(pool.token_BK, chosen), 0)], axis=1),
            parent_BN,
            below_root(jnp.where(real, jnp.asarray(depths)[chosen], 0), 0),
            score_BN,
            score_BN > -jnp.inf,
            ancestor_mask(parent_BN, self.depth),
        )

    def _best_of_depths(self, token_BTR: Array, logp_BTR: Array) -> tuple[Nodes, list[int]]:
        """Returns the best nodes of every depth, depth by depth and best first, and their number in each depth."""
        batch, depth, width = token_BTR.shape
        score_BK, place_BK = jnp.zeros((batch, 1)), jnp.full((batch, 1), ROOT)
        levels: list[Nodes] = []
        counts: list[int] = []
        # A heap pops node by node. Here one `top_k` a depth does: at most `nodes - 1` nodes of a depth are in the tree,
        # and their parents are among the best of the depth above.
        for d in range(depth):
            children = (score_BK[..., None] + logp_BTR[:, d, None]).reshape(batch, -1)
            counts.append(min(self.nodes - 1, children.shape[1]))
            score_BK, chosen = top_k(children, counts[d])
            token_BK = jnp.take_along_axis(token_BTR[:, d], chosen % width, axis=1)
            levels.append(Nodes(token_BK, score_BK, jnp.take_along_axis(place_BK, chosen // width, axis=1)))
            place_BK = jnp.broadcast_to(sum(counts[:d]) + jnp.arange(counts[d]), (batch, counts[d]))
        return Nodes(*(jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True))), counts

    def _draft_depths(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array
    ) -> tuple[Array, Array]:
        """Returns tokens and log-probabilities `[B, T, R]` of the children along the likeliest chain."""
        batch = root_logits_BV.shape[0]
        levels = [choose(root_logits_BV[:, None], self.width, ROOT)]
        for d in range(1, self.depth):
            above_BW = jnp.full((batch, 1), ROOT if d == 1 else d - 2)
            frontier = Frontier(levels[-1].token_BWR[..., 0], above_BW, jnp.ones((batch, 1, d), bool), d, d - 1)
            logits_BWV, scratch = draft(scratch, frontier)
            levels.append(choose(logits_BWV, self.width, frontier.slot))
        return (
            jnp.concatenate([level.token_BWR for level in levels], axis=1),
            jnp.concatenate([level.logp_BWR for level in levels], axis=1),
        )
