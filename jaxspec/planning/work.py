"""What a round of decoding costs on paper: FLOPs and bytes of target and drafter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Children, Drafter, Frontier, SharedTables, TreePolicy
from jaxspec.nn.weights import declared
from jaxspec.planning.flops import count_flops
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.trees.children import likeliest


class Work(NamedTuple):
    """Memory traffic and arithmetic that a computation cannot do without."""

    bytes: float
    flops: float

    def __add__(self, other: tuple[Any, ...]) -> Work:
        more = Work(*other)
        return Work(self.bytes + more.bytes, self.flops + more.flops)


def matmul_weights(params: Any) -> tuple[int, int]:
    """Elements and bytes of all weights but the embedding, of which a call reads only some rows."""
    leaves = jax.tree.leaves({name: p for name, p in params.items() if name != "embed"})
    return sum(leaf.size for leaf in leaves), sum(map(_nbytes, leaves))


def _nbytes(array: Any) -> int:
    """Of an array, or of one that is described only."""
    return array.size * array.dtype.itemsize


def target_work(params: Any, config: LlamaConfig, *, batch: int, tokens: int, prefix: float, itemsize: int) -> Work:
    """One call of the target: every weight read once; 2 FLOPs a weight and token; attention over `prefix` and `tokens`.

    A tied head counts as the matmul it is. The cache is read up to `prefix`, not to its capacity. Of experts all are
    read, and a token is multiplied by those chosen for it.
    """
    count, size = matmul_weights(params)
    if config.tied:
        count, size = count + params["embed"].size, size + params["embed"].nbytes
    c, seen = config, prefix + tokens
    if c.options.experts:
        each = 3 * c.width * c.options.expert_mlp
        count -= c.layers * (c.options.experts - c.options.chosen) * each
    cache = 2 * c.layers * batch * c.kv_heads * c.head_dim * prefix * itemsize
    attention = 4 * c.layers * batch * tokens * c.heads * c.head_dim * seen
    return Work(size + cache, 2.0 * count * batch * tokens + attention)


def draft_work(drafter: Drafter, params: Any, shared: SharedTables, tree: TreePolicy, *, batch: int) -> Work:
    """One round of a drafter: `extend` of a path, then the calls of `expand` that a tree takes to grow.

    Its head is its own or the target's, whichever it scores with. Each call reads all weights; a drafter of one pass,
    which has drafted in `extend`, reads the head once more for all other depths, or once a depth where each has a head
    of its own. The attention to the prefix is left out.
    """
    calls = 1 + len(frontier_widths(tree, shared.head_VD.shape[0], batch))
    others, head, one_head = _weight_bytes(drafter, params, shared)
    passes, heads = (1, min(calls, 2) if one_head else calls) if drafter.one_pass else (calls, calls)
    count = count_flops(*_drafting(drafter, params, shared, tree, batch))
    return Work(passes * others + heads * head, count.total)


def _weight_bytes(drafter: Drafter, params: Any, shared: SharedTables) -> tuple[int, int, bool]:
    """Of all weights that multiply but the LM head, of the head a depth is scored with, and whether all share it."""
    _, whole = matmul_weights(params)
    if drafter.vocab is None:
        return whole, _nbytes(shared.head_VD), True
    tables = [n for n in params if "vocab" in declared(n).axes]
    name = next((n for n in tables if n != "embed"), "embed")
    heads = params[name]
    others = whole - (0 if name == "embed" else _nbytes(heads))
    return others, _nbytes(heads) // math.prod(heads.shape[:-2]), heads.ndim == 2


def _drafting(
    drafter: Drafter, params: Any, shared: SharedTables, tree: TreePolicy, batch: int
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """A round's drafting as a program of the weights, the target's tables, and what is behind the root."""
    path = tree.depth + 1
    read = shared.embed_VD.shape[1] * max(1, len(drafter.taps))

    def start(params: Any, shared: SharedTables) -> Any:
        tokens_BP, features_BPD = jnp.zeros((batch, path), jnp.int32), jnp.zeros((batch, path, read))
        state = drafter.init_state(params, shared, tokens_BP[:, 0], path + 1)
        return state, tokens_BP, features_BPD.astype(shared.embed_VD.dtype)

    def round_(params: Any, shared: SharedTables, behind: Any) -> Any:
        state, tokens_BP, features_BPD = behind
        whole_B = jnp.full(batch, path)
        state, root_logits_BV = drafter.extend(params, shared, state, tokens_BP, features_BPD, whole_B)
        draft = functools.partial(drafter.expand, params, shared, state)
        scratch = drafter.scratch(state, tree.slots)
        return state, tree.grow(draft, lambda x, n, _: likeliest(x, n), scratch, root_logits_BV, tokens_BP[:, -1])

    return round_, params, shared, jax.eval_shape(start, params, shared)


def mbsu(tau: float, *, ratio: float, passes: int) -> float:
    """Memory-bound speed-up `tau / (1 + c gamma)`: what drafting would gain if time were the weights read alone.

    `ratio` is c, drafter parameters by target parameters, and `passes` gamma, the drafter's passes a round. Named by
    the direct-alignment paper (arXiv 2403.00858); the form is the standard cost model (Leviathan et al., theorem 3.8,
    with c as the cost of a draft pass) and unconfirmed as that paper's own.
    """
    return tau / (1 + ratio * passes)


def draft_ratio(drafter: Any, target: Any, head: Any | None) -> float:
    """`c` of `mbsu`: the drafter's parameters by the target's.

    The LM `head [V, D]` that a drafter borrows counts as its own, for every pass reads it; None for one that has its
    own.
    """
    own, whole = (sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (drafter, target))
    return (own + (0 if head is None else head.size)) / whole


def drafter_passes(drafter: Drafter, depth: int) -> int:
    """`gamma` of `mbsu`, the drafter's forward passes a round of a tree of `depth`.

    One, or one a level: `extend` drafts the first, each call of `expand` the next.
    """
    return 1 if drafter.one_pass else max(1, depth)


def frontier_widths(tree: TreePolicy, vocab: int, batch: int = 1) -> list[int]:
    """Nodes that each call of `expand` drafts from while the tree grows."""
    widths = []

    def draft(scratch: Any, frontier: Frontier) -> tuple[Any, Any]:
        widths.append(frontier.token_BW.shape[1])
        return jnp.zeros((*frontier.token_BW.shape, vocab)), scratch

    def likely(logits_BWV: Any, count: int, slot: int) -> Children:
        token_BWR = jnp.zeros((*logits_BWV.shape[:2], count), jnp.int32)
        return Children(token_BWR, jnp.zeros(token_BWR.shape), jnp.zeros(token_BWR.shape))

    def grow() -> Any:
        return tree.grow(draft, likely, (), jnp.zeros((batch, vocab)), jnp.zeros(batch, jnp.int32))

    jax.eval_shape(grow)
    return widths
