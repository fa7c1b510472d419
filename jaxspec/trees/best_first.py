"""The best tree for drafters whose children do not depend on the node: popped best first from the depths' own laws."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import ROOT, Array, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.sampling import argmax
from jaxspec.trees.shape import ancestor_mask


class Popped(NamedTuple):
    """The nodes so far, and all that can be next: what a heap would hold, one place for every child of every node."""

    open_BNR: Array
    """Scores of the nodes' children; -inf for those taken and for nodes not there."""
    token_BN: Array
    parent_BN: Array
    depth_BN: Array
    score_BN: Array


@dataclasses.dataclass(frozen=True)
class BestFirstTree:
    """The best of all trees of `nodes` nodes over the `width` likeliest tokens of each of `depth` depths.

    The draft is asked once a depth, and every node of a depth gets the same children. From the root, the node with the
    greatest cumulative log-probability is taken `nodes - 1` times, ties to the child of the earlier node and then to
    the likelier one; as scores fall along a path, these are the best of all paths (JetSpec, DDTree). That is the most
    accepted tokens expected under the *product of the depths' laws*, a surrogate: the target's own tokens of
    neighbouring depths do depend on each other. With a drafter whose children depend on the node (EAGLE, a draft LM)
    the laws are those along its likeliest chain; the text is the same, the tree only a worse one.
    Raises ValueError where there are fewer paths than nodes.
    """

    nodes: int = 60
    depth: int = 4
    width: int = 10

    def __post_init__(self) -> None:
        if min(self.nodes, self.depth, self.width) < 1:
            raise ValueError(f"a best-first tree needs nodes, depth and width of at least 1, not {self}")
        paths = sum(self.width**d for d in range(1, self.depth + 1))
        if paths < self.nodes - 1:
            raise ValueError(
                f"a best-first tree of width {self.width} and depth {self.depth} has {paths} nodes below its root, "
                f"fewer than the {self.nodes - 1} wanted: raise width or depth, or lower nodes"
            )

    @property
    def slots(self) -> int:
        """Expanded nodes: one at every depth but the last."""
        return self.depth - 1

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """Likeliest tokens alone: drawn children must be each node's own draws, and here a depth's nodes share them."""
        return ("topk",)

    @property
    def spec(self) -> str:
        """The tree as `parse_tree` reads it."""
        return f"best_first:{self.nodes}x{self.depth}x{self.width}"

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Ask for each depth's likeliest tokens, then take the best node that is left, again and again."""
        token_BTR, logp_BTR = self._ask(draft, choose, scratch, root_logits_BV)
        popped = self._pop(token_BTR, logp_BTR, root_token_B)
        return Tree(
            popped.token_BN,
            popped.parent_BN,
            popped.depth_BN,
            popped.score_BN,
            popped.score_BN > -jnp.inf,
            ancestor_mask(popped.parent_BN, self.depth),
        )

    def _ask(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array
    ) -> tuple[Array, Array]:
        """Tokens and log-probabilities `[B, T, R]` of each depth's children, drafted along the likeliest chain."""
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

    def _pop(self, token_BTR: Array, logp_BTR: Array, root_token_B: Array) -> Popped:
        """The root and the `nodes - 1` best, in the order they are taken."""
        batch = root_token_B.shape[0]
        rows = jnp.arange(batch)
        # Row d is what a node of depth d has below it: the deepest have nothing.
        below_BPR = jnp.pad(logp_BTR, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf)

        def take(i: Array, popped: Popped) -> Popped:
            open_BNR = popped.open_BNR
            best_B = argmax(open_BNR.reshape(batch, -1))
            parent_B, rank_B = best_B // self.width, best_B % self.width
            score_B = open_BNR[rows, parent_B, rank_B]
            real_B = score_B > -jnp.inf
            above_B = popped.depth_BN[rows, parent_B]
            depth_B = jnp.where(real_B, above_B + 1, 0)
            children_BR = score_B[:, None] + below_BPR[rows, depth_B]
            return Popped(
                open_BNR.at[rows, parent_B, rank_B].set(-jnp.inf).at[:, i].set(children_BR),
                popped.token_BN.at[:, i].set(jnp.where(real_B, token_BTR[rows, above_B, rank_B], 0)),
                popped.parent_BN.at[:, i].set(jnp.where(real_B, parent_B, ROOT)),
                popped.depth_BN.at[:, i].set(depth_B),
                popped.score_BN.at[:, i].set(score_B),
            )

        shape = (batch, self.nodes)
        root = Popped(
            jnp.full((*shape, self.width), -jnp.inf).at[:, 0].set(logp_BTR[:, 0]),
            jnp.zeros(shape, jnp.int32).at[:, 0].set(root_token_B),
            jnp.full(shape, ROOT, jnp.int32),
            jnp.zeros(shape, jnp.int32),
            jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),
        )
        return jax.lax.fori_loop(1, self.nodes, take, root)
