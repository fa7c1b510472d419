"""Work of a round of decoding, by formula: FLOPs and bytes of target and drafter."""

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
    """The least memory traffic and arithmetic of a computation."""

    bytes: float
    flops: float

    def __add__(self, other: tuple[Any, ...]) -> Work:
        more = Work(*other)
        return Work(self.bytes + more.bytes, self.flops + more.flops)


def matmul_weights(params: Any) -> tuple[int, int]:
    """Returns elements and bytes of all weights except the embedding, of which a call reads only some rows."""
    leaves = jax.tree.leaves({name: p for name, p in params.items() if name != "embed"})
    return sum(leaf.size for leaf in leaves), sum(map(_nbytes, leaves))


def _nbytes(array: Any) -> int:
    """Returns the bytes of an array or of a `ShapeDtypeStruct`."""
    return array.size * array.dtype.itemsize


def touched_experts(experts: int, chosen: int, tokens: int) -> float:
    """Returns how many of a layer's experts `tokens` tokens reach, `E (1 - (1 - k/E)^n)`, in the mean.

    Each token has `chosen` of them, all equally likely. Real routers prefer some, so that fewer are reached.
    """
    return experts * (1 - (1 - chosen / experts) ** tokens)


def target_work(
    params: Any,
    config: LlamaConfig,
    *,
    batch: int,
    tokens: int,
    prefix: float,
    itemsize: int,
    routed: bool = False,
) -> Work:
    """Returns the work of one call of the target: weights, 2 FLOPs a weight and token, and attention.

    A tied head counts as a matmul. The cache is read up to `prefix`, not to its capacity. All experts are read, or with
    `routed` those that uniform routing reaches; a token is multiplied by those chosen for it.
    """
    count, size = matmul_weights(params)
    if config.tied:
        count, size = count + params["embed"].size, size + _nbytes(params["embed"])
    c, seen = config, prefix + tokens
    if c.options.experts:
        each = 3 * c.width * c.options.expert_mlp
        if routed:
            reached = touched_experts(c.options.experts, c.options.chosen, batch * tokens)
            size = round(size - c.layers * (c.options.experts - reached) * each * (size / count))
        count -= c.layers * (c.options.experts - c.options.chosen) * each
    cache = 2 * c.layers * batch * c.kv_heads * c.head_dim * prefix * itemsize
    attention = 4 * c.layers * batch * tokens * c.heads * c.head_dim * seen
    return Work(size + cache, 2.0 * count * batch * tokens + attention)


def draft_work(drafter: Drafter, params: Any, shared: SharedTables, tree: TreePolicy, *, batch: int) -> Work:
    """Returns the work of one round of a drafter: `extend` of a path, and the calls of `expand` of a tree.

    Its LM head is its own or the target's. Each call reads all weights. A drafter of one pass drafts in `extend` and
    then only reads the head: once more for all other depths, or once a depth if each has its own head. The attention to
    the prefix is left out.
    """
    calls = 1 + len(frontier_widths(tree, shared.head_VD.shape[0], batch))
    others, head, one_head = weight_bytes(drafter, params, shared)
    passes, heads = (1, min(calls, 2) if one_head else calls) if drafter.one_pass else (calls, calls)
    count = count_flops(*_drafting(drafter, params, shared, tree, batch))
    return Work(passes * others + heads * head, count.total)


def weight_bytes(drafter: Drafter, params: Any, shared: SharedTables) -> tuple[int, int, bool]:
    """Returns bytes of a drafter's layers' weights, bytes of one LM head, and whether all depths share that head."""
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
    """Returns the drafting of a round as a program, and its arguments: weights, tables, and the accepted path."""
    path = jax.eval_shape(functools.partial(_start, drafter, tree, batch), params, shared)
    return functools.partial(_draft_round, drafter, tree), params, shared, path


def _start(drafter: Drafter, tree: TreePolicy, batch: int, params: Any, shared: SharedTables) -> Any:
    path, read = tree.depth + 1, shared.embed_VD.shape[1] * max(1, len(drafter.taps))
    tokens_BP, features_BPD = jnp.zeros((batch, path), jnp.int32), jnp.zeros((batch, path, read))
    state = drafter.init_state(params, shared, tokens_BP[:, 0], path + 1)
    return state, tokens_BP, features_BPD.astype(shared.embed_VD.dtype)


def _draft_round(drafter: Drafter, tree: TreePolicy, params: Any, shared: SharedTables, path: Any) -> Any:
    state, tokens_BP, features_BPD = path
    whole_B = jnp.full(len(tokens_BP), tokens_BP.shape[1])
    state, root_logits_BV = drafter.extend(params, shared, state, tokens_BP, features_BPD, whole_B)
    draft = functools.partial(drafter.expand, params, shared, state)
    scratch = drafter.scratch(state, tree.slots)
    return state, tree.grow(draft, lambda x, n, _: likeliest(x, n), scratch, root_logits_BV, tokens_BP[:, -1])


def mbsu(tau: float, *, ratio: float, passes: int) -> float:
    """Returns the memory-bound speed-up `tau / (1 + c gamma)`: the speed-up if reading weights took all the time.

    `ratio` is c, the drafter's parameters by the target's, and `passes` is gamma, the drafter's passes a round. The
    name is from the direct-alignment paper (arXiv 2403.00858). The form is the standard cost model (Leviathan et al.,
    theorem 3.8, with c as the cost of a draft pass); whether that paper uses it is not confirmed.
    """
    return tau / (1 + ratio * passes)


def draft_ratio(drafter: Any, target: Any, head: Any | None) -> float:
    """Returns `c` of `mbsu`: the drafter's parameters divided by the target's.

    `head` `[V, D]` is the target's LM head if the drafter reads it, and counts as the drafter's, because every pass
    reads it. It is None for a drafter with its own head.
    """
    own, whole = (sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (drafter, target))
    return (own + (0 if head is None else head.size)) / whole


def drafter_passes(drafter: Drafter, depth: int) -> int:
    """Returns `gamma` of `mbsu`, the drafter's forward passes in a round of a tree of `depth`.

    That is one, or one a level: `extend` drafts the first level, and each call of `expand` the next.
    """
    return 1 if drafter.one_pass else max(1, depth)


def frontier_widths(tree: TreePolicy, vocab: int, batch: int = 1) -> list[int]:
    """Returns how many nodes each call of `expand` drafts from while the tree grows."""
    widths: list[int] = []
    grow = functools.partial(tree.grow, functools.partial(_note_width, widths, vocab), _no_children, ())
    jax.eval_shape(grow, jnp.zeros((batch, vocab)), jnp.zeros(batch, jnp.int32))
    return widths


def _note_width(widths: list[int], vocab: int, scratch: Any, frontier: Frontier) -> tuple[Any, Any]:
    """Stands for a drafter: appends the width of the frontier and returns logits of zeros."""
    widths.append(frontier.token_BW.shape[1])
    return jnp.zeros((*frontier.token_BW.shape, vocab)), scratch


def _no_children(logits_BWV: Any, count: int, slot: int) -> Children:
    """Stands for the choice of children: their shapes, filled with zeros."""
    token_BWR = jnp.zeros((*logits_BWV.shape[:2], count), jnp.int32)
    return Children(token_BWR, jnp.zeros(token_BWR.shape), jnp.zeros(token_BWR.shape))
