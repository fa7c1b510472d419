"""Static trees: lists of rank paths, chains, and the single node. Their masks are built on the host."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import DRAFT_MODES, ROOT, Array, Children, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.trees.shape import check_size, stack_distributions

EAGLE1_PATHS = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
"""EAGLE-1's tree of 25 drafted nodes (`mc_sim_7b_63` of its code); a digit is a child's rank in its parent's draft."""

MEDUSA_PATHS = """0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 20 21 22 30 31 40 50 60 70 80
90 000 001 002 003 004 005 006 007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200 0000 0001"""
"""Medusa's tree of 63 drafted nodes for Vicuna-7B (`mc_sim_7b_63` of its code), four heads deep."""


class Level(NamedTuple):
    """The nodes of one depth that have children, and those children."""

    expanded: np.ndarray
    """Node indices, ascending; they take consecutive scratch slots."""
    slot: int
    """Scratch slot of the first."""
    parent_slot: np.ndarray
    """Scratch slot of each node's parent; `ROOT` where that is the root."""
    visible: np.ndarray
    """Mask `[W, slot + W]` of the scratch slots that each expanded node sees."""


class StaticShape(NamedTuple):
    """The host-side arrays of a static tree of `N` nodes."""

    parent: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    order: np.ndarray
    """Place among the siblings; equal to the rank, unless the paths leave ranks out."""
    distribution: np.ndarray
    """Row of the draft distribution that each node's children come from; 0 for leaves."""
    valid: np.ndarray
    ancestors: np.ndarray
    levels: tuple[Level, ...]


class Filled(NamedTuple):
    """The arrays of the tree that the draft fills in."""

    token_BN: Array
    score_BN: Array
    valid_BN: Array


def parse_paths(text: str) -> tuple[tuple[int, ...], ...]:
    """Reads rank paths from words of digits (`"0 1 00"`) or of numbers joined by dots (`"0.12.3"`; alone, `"12."`).

    Raises ValueError for anything else.
    """
    words = text.replace(",", " ").split()
    try:
        return tuple(tuple(int(r) for r in (w.removesuffix(".").split(".") if "." in w else w)) for w in words)
    except ValueError:
        raise ValueError(
            f"tree paths {text!r} must be words of digits such as '0 1 00', or numbers joined by dots"
        ) from None


def build_shape(paths: tuple[tuple[int, ...], ...], rows: int) -> StaticShape:
    """Returns the masks and levels of the tree with these paths, padded to `rows` nodes."""
    # By depth, so that parents stand before their children and a level's scratch slots are consecutive.
    order = sorted(paths, key=lambda p: (len(p), p))
    index = {(): 0} | {p: i + 1 for i, p in enumerate(order)}
    parent = np.full(rows, ROOT, np.int32)
    depth = np.zeros(rows, np.int32)
    rank, order_of = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    valid = np.arange(rows) <= len(order)
    ancestors = np.eye(rows, dtype=bool)
    for path in order:
        i = index[path]
        order_of[i] = np.sum(parent == index[path[:-1]])
        parent[i], depth[i], rank[i] = index[path[:-1]], len(path), path[-1]
        ancestors[i] |= ancestors[parent[i]]
    inner = sorted({int(parent[index[p]]) for p in order} - {0})
    slot_of = {node: s for s, node in enumerate(inner)}
    levels = []
    for d in range(1, int(depth.max(initial=0)) + 1):
        expanded = np.array([n for n in inner if depth[n] == d], np.int32)
        if not expanded.size:
            break
        slot = slot_of[int(expanded[0])]
        seen = np.array(inner[: slot + expanded.size])
        parents = np.array([slot_of.get(int(parent[n]), ROOT) for n in expanded], np.int32)
        levels.append(Level(expanded, slot, parents, ancestors[expanded][:, seen]))
    distribution = np.array([slot_of.get(n, ROOT) + 1 for n in range(rows)], np.int32)
    return StaticShape(parent, depth, rank, order_of, distribution, valid, ancestors, tuple(levels))


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree given by rank paths: `(0, 2)` is the third-best child of the best child of the root.

    `rows` pads the node count, so that programs of different trees share their matmul shapes.
    Raises ValueError for a path without its parent, twice, or with a negative rank, and for too few `rows`.
    """

    paths: tuple[tuple[int, ...], ...]
    rows: int = 0

    def __post_init__(self) -> None:
        check_size("nodes", 1 + len(self.paths))
        known = {(), *self.paths}
        for path in self.paths:
            if not path or min(path) < 0 or path[:-1] not in known:
                raise ValueError(
                    f"tree path {path} needs non-negative ranks and its parent path {path[:-1]} in the list"
                )
        if len(known) != len(self.paths) + 1:
            raise ValueError("a tree path stands twice in the list: keep one of each")
        if self.rows and self.rows < len(known):
            raise ValueError(f"rows={self.rows} is fewer than the tree's {len(known)} nodes")

    @property
    def nodes(self) -> int:
        """Nodes of the tree, root and padding included."""
        return max(self.rows, len(self.paths) + 1)

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return max((len(p) for p in self.paths), default=0)

    @property
    def slots(self) -> int:
        """Nodes that are expanded: those with children, the root aside."""
        return len({p[:-1] for p in self.paths} - {()})

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """All draft modes: every node has children of its own."""
        return DRAFT_MODES

    @property
    def spec(self) -> str:
        """The tree as `parse_tree` reads it."""
        if self.depth == len(self.paths) and all(set(p) <= {0} for p in self.paths):
            return f"chain:{self.depth}" if self.depth else "none"
        words = ["".join(map(str, p)) if max(p) <= 9 else ".".join(map(str, p)) for p in self.paths]
        return "static:" + ",".join(
            w + "." if len(p) == 1 < len(w) else w for w, p in zip(words, self.paths, strict=True)
        )

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Returns the tree: each token has its rank among its parent's likeliest, or its place among the draws."""
        shape = build_shape(self.paths, self.nodes)
        batch = root_token_B.shape[0]
        token_BN = jnp.zeros((batch, self.nodes), jnp.int32).at[:, 0].set(root_token_B)
        score_BN = jnp.full((batch, self.nodes), -jnp.inf).at[:, 0].set(0.0)
        filled = Filled(token_BN, score_BN, jnp.broadcast_to(jnp.asarray(shape.valid), (batch, self.nodes)))
        families: list[Children] = []
        if self.paths:
            filled, found = _fill(shape, np.array([0]), choose, root_logits_BV[:, None], ROOT, filled)
            families.append(found)
        for d, level in enumerate(shape.levels):
            visible = np.broadcast_to(level.visible, (batch, *level.visible.shape))
            parent = np.broadcast_to(level.parent_slot, (batch, level.parent_slot.size))
            frontier = Frontier(
                filled.token_BN[:, level.expanded], jnp.asarray(parent), jnp.asarray(visible), d + 1, level.slot
            )
            logits_BWV, scratch = draft(scratch, frontier)
            filled, found = _fill(shape, level.expanded, choose, logits_BWV, level.slot, filled)
            families.append(found)
        token_BN, score_BN, valid_BN = filled
        fixed = [jnp.asarray(a)[None] for a in (shape.parent, shape.depth, shape.ancestors, shape.distribution)]
        parent, depth, ancestors, row = (jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in fixed)
        return Tree(token_BN, parent, depth, score_BN, valid_BN, ancestors, stack_distributions(families, row))


def _fill(
    shape: StaticShape,
    expanded: np.ndarray,
    choose: ChooseChildren,
    logits_BWV: Array,
    slot: int,
    filled: Filled,
) -> tuple[Filled, Children]:
    """Chooses the children of the nodes `expanded` and fills them in."""
    children = np.flatnonzero(np.isin(shape.parent, expanded) & shape.valid)
    chosen = choose(logits_BWV, int(shape.rank[children].max()) + 1, slot)
    above = shape.parent[children]
    # A drawn child has no rank: it takes the place of its draw.
    rank = shape.rank if chosen.distribution_BWV is None else shape.order
    place = (slice(None), np.searchsorted(expanded, above), rank[children])
    # A child is valid if there was a token left to draw, and its parent is valid.
    drawn = chosen.bound_BWR[place] > -jnp.inf
    filled = Filled(
        filled.token_BN.at[:, children].set(chosen.token_BWR[place]),
        filled.score_BN.at[:, children].set(filled.score_BN[:, above] + chosen.logp_BWR[place]),
        filled.valid_BN.at[:, children].set(filled.valid_BN[:, above] & drawn),
    )
    return filled, chosen


def chain(depth: int, rows: int = 0) -> StaticTree:
    """Returns the chain of `depth` drafted tokens; depth 0 is the single node, plain decoding."""
    check_size("depth", depth)
    return StaticTree(tuple((0,) * d for d in range(1, depth + 1)), rows)
