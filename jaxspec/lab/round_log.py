"""Acceptance by depth and rank out of rounds that were decoded, for rules that toss coins or children that are drawn.

There the text depends on what is drafted, so that no rank table stands for it. A decoding with a generous static tree
counts which children are tried and kept: given that their parent was kept, in this tree, under this rule.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Tree
from jaxspec.decoding import rounds
from jaxspec.decoding.generation import collect, start
from jaxspec.decoding.requests import Request, fill_up, make_requests
from jaxspec.decoding.rounds import RUNNING, DecodeState, Engine, Weights
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import Queue
from jaxspec.trees import StaticTree, chain
from jaxspec.trees.static import build_shape

EXTRA_NODES = 64
"""Nodes of a generous tree besides the families of its likeliest chain."""


class NodeCounts(NamedTuple):
    """Rounds of a row in which each node of a static tree was kept, and in which its children were tried."""

    kept_BN: Array
    tried_BN: Array


class LoggedPrompt(NamedTuple):
    """The rounds of one answer."""

    key: Any
    """Of its request."""
    hits_DK: np.ndarray
    """Rounds that kept the child of each depth and rank."""
    turns_DK: np.ndarray
    """Rounds in which it was such a child's turn, see `profile.RoundCounts`."""
    tokens: int
    """New tokens, the one that prefill gives not counted."""
    calls: int


def generous_tree(depth: int, ranks: int, extra: int = EXTRA_NODES) -> StaticTree:
    """Returns a tree in which every node of the likeliest chain has all `ranks` children, and others have some.

    The `extra` nodes are those whose path is likeliest where each rank is half as likely as the one before.
    """
    if ranks == 1:
        return chain(depth)
    nodes: set[tuple[int, ...]] = {(0,) * d + (r,) for d in range(depth) for r in range(ranks)}
    # A path's cost is the sum of its ranks plus its length; each is pushed by its parent or its elder sibling alone.
    heap: list[tuple[int, tuple[int, ...]]] = [(1, (0,))]
    goal = len(nodes) + extra
    while heap and len(nodes) < goal:
        cost, path = heapq.heappop(heap)
        nodes.add(path)
        if path[-1] + 1 < ranks:
            heapq.heappush(heap, (cost + 1, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (cost + 1, (*path, 0)))
    return StaticTree(tuple(sorted(nodes, key=lambda path: (len(path), path))))


def log_rounds(
    models: Models, requests: Iterable[Request], *, batch: int, longest: int, stopped: Callable[[], None] = lambda: None
) -> Iterator[LoggedPrompt]:
    """Decodes requests with the static tree of `models` and yields the counts of each as its batch is done.

    `longest` is the largest budget of any; `stopped` is called after every batch.
    """
    tree = models.engine.tree
    assert isinstance(tree, StaticTree)
    queue = Queue(requests, batch=batch)
    while queue:
        taken = queue.take()
        arrays = make_requests(fill_up(taken, batch))
        state = start(models.engine, models.weights, arrays, max_new_tokens=longest)
        nodes = arrays.tokens_BL.shape[0], tree.nodes
        nothing = NodeCounts(jnp.zeros(nodes, jnp.int32), jnp.zeros(nodes, jnp.int32))
        state, counts = _run(models.engine, models.weights, state, nothing)
        kept_BN, tried_BN = map(np.asarray, counts)
        for row, (request, answer) in enumerate(zip(taken, collect(state), strict=False)):  # the padding's left out
            hits, turns = by_rank(tree, kept_BN[row], tried_BN[row])
            yield LoggedPrompt(request.key, hits, turns, len(answer.tokens) - 1, answer.calls)
        stopped()


@functools.partial(jax.jit, static_argnames="engine", donate_argnames=("state", "counts"))
def _run(engine: Engine, weights: Weights, state: DecodeState, counts: NodeCounts) -> tuple[DecodeState, NodeCounts]:
    """Runs rounds until all rows have ended, as `rounds.decode_rounds` does, and counts their nodes."""

    def going(carry: tuple[DecodeState, NodeCounts]) -> Array:
        return jnp.any(carry[0].finish_B == RUNNING)

    def round_(carry: tuple[DecodeState, NodeCounts]) -> tuple[DecodeState, NodeCounts]:
        return _logged_round(engine, weights, *carry)

    return jax.lax.while_loop(going, round_, (state, counts))


def _logged_round(
    engine: Engine, weights: Weights, state: DecodeState, counts: NodeCounts
) -> tuple[DecodeState, NodeCounts]:
    """Runs one round, phase by phase as `rounds.decode_step`, and adds the nodes that it kept."""
    tree = rounds.grow(engine, weights, state)
    scored = rounds.score(engine, weights, state, tree)
    accepted = rounds.accept(engine, state, tree, scored.logits_BNV)
    draft, root_logits_BV = rounds.extend(engine, weights, state, scored.read_BND, accepted)
    after = rounds.commit(state._replace(draft=draft, root_logits_BV=root_logits_BV), scored.fresh, accepted)
    return after, _count(counts, tree, accepted.path_BP, after.produced_B - state.produced_B)


def _count(counts: NodeCounts, tree: Tree, path_BP: Array, added_B: Array) -> NodeCounts:
    """Adds the nodes of the kept path as far as the answer goes; it took `added` tokens, the bonus token included."""
    nodes = tree.token_BN.shape[1]
    on_path_BN = jnp.any(path_BP[:, :, None] == jnp.arange(nodes), axis=1)
    kept_BN = on_path_BN & (tree.depth_BN > 0) & (tree.depth_BN <= added_B[:, None])
    # Children of a node were tried where the answer has a token behind it.
    tried_BN = on_path_BN & (tree.depth_BN < added_B[:, None])
    return NodeCounts(counts.kept_BN + kept_BN, counts.tried_BN + tried_BN)


def by_rank(tree: StaticTree, kept_N: np.ndarray, tried_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns hits and turns `[D, K]` by the depth and rank of children, from the counts of a tree's nodes.

    Parents have different numbers of children, so that shares of kept parents would have another denominator at each
    rank, and could sum to more than 1. Turns do not depend on the siblings that a parent lacks.
    """
    shape = build_shape(tree.paths, tree.nodes)
    hits_DK = np.zeros((tree.depth, int(shape.rank.max()) + 1), np.int64)
    turns_DK, left_N = np.zeros_like(hits_DK), np.array(tried_N, np.int64)
    drafted = np.arange(1, len(tree.paths) + 1)
    for node in drafted[np.argsort(shape.rank[drafted], kind="stable")]:  # elder siblings first
        at = (shape.depth[node] - 1, shape.rank[node])
        hits_DK[at] += kept_N[node]
        turns_DK[at] += left_N[shape.parent[node]]
        left_N[shape.parent[node]] -= kept_N[node]
    return hits_DK, turns_DK
