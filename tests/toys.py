"""Language models small enough to write down: next-token tables over every path, and a drafter that reads a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import (
    ROOT,
    Array,
    Cache,
    Children,
    ChooseChildren,
    Frontier,
    KVCache,
    Mask,
    Params,
    Ragged,
    SharedTables,
    TargetOutput,
    Tree,
)
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Request, Requests, Settings, make_requests
from jaxspec.nn import cache as kv
from jaxspec.trees.children import likeliest

Tables = list[np.ndarray]
"""`tables[d][b, code]` are the next-token logits behind the path of `d` tokens whose digits in base V make `code`."""


def path_tables(seed: int, vocab: int, depth: int, batch: int = 1, scale: float = 1.5) -> Tables:
    """Random logits for every path of up to `depth` tokens."""
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((batch, vocab**d, vocab)).astype(np.float32) for d in range(depth + 1)]


def code_of(path: tuple[int, ...], vocab: int) -> int:
    """The row of a path in its table."""
    code = 0
    for token in path:
        code = code * vocab + token
    return code


def draft_from(tables: Tables) -> Any:
    """A `DraftLogits` whose scratch holds the path code of every expanded node."""
    vocab = tables[0].shape[-1]

    def draft(scratch_BM: Array, frontier: Frontier) -> tuple[Array, Array]:
        parent = jnp.take_along_axis(scratch_BM, jnp.maximum(frontier.parent_BW, 0), axis=1)
        code_BW = jnp.where(frontier.parent_BW == ROOT, 0, parent) * vocab + frontier.token_BW
        width = code_BW.shape[1]
        assert frontier.visible_BWM.shape == (*code_BW.shape, frontier.slot + width)
        scratch_BM = scratch_BM.at[:, frontier.slot : frontier.slot + width].set(code_BW)
        return jnp.take_along_axis(jnp.asarray(tables[frontier.depth]), code_BW[..., None], axis=1), scratch_BM

    return draft


def likely(logits_BWV: Array, count: int, slot: int) -> Children:
    """Children are the likeliest tokens."""
    return likeliest(logits_BWV, count)


def grow(policy: Any, tables: Tables, root: int = 0, choose: ChooseChildren = likely) -> Any:
    """The policy's tree for table drafts."""
    batch = tables[0].shape[0]
    scratch = jnp.full((batch, policy.slots), -1, jnp.int32)
    root_B = jnp.full(batch, root, jnp.int32)
    return policy.grow(draft_from(tables), choose, scratch, jnp.asarray(tables[0])[:, 0], root_B)


@dataclasses.dataclass(frozen=True)
class TableDrafter:
    """A bigram drafter under the `Drafter` contract. Its params are logits `[V, V]`, its state the newest token."""

    deepest = None
    one_pass = False
    taps = ()
    vocab = None

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> Array:
        return jnp.zeros_like(first_B)

    def extend(
        self, params: Params, shared: SharedTables, state: Array, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Array, Array]:
        last = jnp.take_along_axis(tokens_BL, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
        state = jnp.where(count_B > 0, last, state)
        return state, params[state]

    def scratch(self, state: Array, slots: int) -> Array:
        return jnp.zeros(0)

    def expand(
        self, params: Params, shared: SharedTables, state: Array, scratch: Array, frontier: Frontier
    ) -> tuple[Array, Array]:
        return params[frontier.token_BW], scratch


class Memory(NamedTuple):
    """Tokens read, in a cache."""

    cache: Cache
    length_B: Array


@dataclasses.dataclass(frozen=True)
class RememberingDrafter(TableDrafter):
    """Drafts one token after all it has read, the first token too, so that it holds one more than the target's cache.

    Its params are logits `[V, V]`, by a sum over what it holds and where.
    """

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> Memory:
        batch = first_B.shape[0]
        empty = Memory(kv.empty(1, batch, 1, 1, capacity, jnp.float32), jnp.zeros(batch, jnp.int32))
        return self._read(empty, first_B[:, None], jnp.ones(batch, jnp.int32))

    def _read(self, state: Memory, tokens_BL: Array, count_B: Array) -> Memory:
        rows_BL = tokens_BL.astype(jnp.float32)
        rows = KVCache(rows_BL[None, :, None, None, :], rows_BL[None, :, None, :, None])
        return Memory(kv.commit(state.cache, rows, state.length_B), state.length_B + count_B)

    def _logits(self, params: Params, state: Memory) -> Array:
        held_BS = state.cache.v_YBKSC[0, :, 0, :, 0].astype(jnp.int32)
        slot_S = jnp.arange(held_BS.shape[1])
        real_BS = slot_S < state.length_B[:, None]
        return params[jnp.sum((held_BS + 1) * (slot_S + 1) * real_BS, axis=1) % params.shape[0]]

    def extend(
        self, params: Params, shared: SharedTables, state: Memory, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Memory, Array]:
        state = self._read(state, tokens_BL, count_B)
        return state, self._logits(params, state)

    def expand(
        self, params: Params, shared: SharedTables, state: Memory, scratch: Array, frontier: Frontier
    ) -> tuple[Array, Array]:
        logits_BV = self._logits(params, state)
        return jnp.broadcast_to(logits_BV[:, None], (*frontier.token_BW.shape, logits_BV.shape[1])), scratch


@dataclasses.dataclass(frozen=True)
class TableTarget:
    """A bigram target under the `Target` contract. Its params are logits `[V, V]`; it keeps nothing in its cache."""

    def forward(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: Any = None,
        *,
        keep_kv=False,
    ) -> TargetOutput:
        nothing = self.empty_cache(*(mask_BLM.place_BN if isinstance(mask_BLM, Ragged) else tokens_BL).shape)
        return TargetOutput(jax.nn.one_hot(tokens_BL, params.shape[0]), nothing if keep_kv else None)

    def logits(self, params: Params, features_BLD: Array) -> Array:
        return params[jnp.argmax(features_BLD, axis=-1)]

    def scoring(self, params: Params) -> Params:
        return params

    def shared_tables(self, params: Params) -> SharedTables:
        return SharedTables(jnp.eye(params.shape[0]), jnp.eye(params.shape[0]))

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(jnp.zeros((1, batch, 1, 1, capacity)), jnp.zeros((1, batch, 1, capacity, 1)))


def tree_of(*arrays: Any) -> Tree:
    """A `Tree` of host arrays."""
    return Tree(*arrays)


def random_tree(rng: np.random.Generator, nodes: int, vocab: int, depth: int, padding: int = 0) -> Tree:
    """A random `Tree` of batch 1 whose siblings carry different tokens, with invalid rows at the end."""
    paths: list[tuple[int, ...]] = [()]
    children = [(p, t) for p in [()] for t in range(vocab)]
    while len(paths) < nodes and children:
        p, t = children.pop(int(rng.integers(len(children))))
        paths.append((*p, t))
        if len(p) + 1 < depth:
            children += [((*p, t), u) for u in range(vocab)]
    paths.sort(key=len)
    rows = len(paths) + padding
    token, parent, level = (np.full(rows, fill, np.int32) for fill in (0, ROOT, 0))
    ancestors = np.eye(rows, dtype=bool)
    for i, path in enumerate(paths[1:], start=1):
        parent[i], token[i], level[i] = paths.index(path[:-1]), path[-1], len(path)
        ancestors[i] |= ancestors[parent[i]]
    valid = np.arange(rows) < len(paths)
    score = np.where(valid, -level.astype(np.float32), -np.inf)
    return tree_of(*(jnp.asarray(a)[None] for a in (token, parent, level, score, valid, ancestors)))


def node_paths(tree: Any, row: int = 0) -> list[tuple[int, ...] | None]:
    """The tokens from below the root to every node, by walking the parents; None for padding."""
    token, parent, valid = (np.asarray(a[row]) for a in (tree.token_BN, tree.parent_BN, tree.valid_BN))
    paths: list[tuple[int, ...] | None] = [()]
    for n in range(1, len(token)):
        above = paths[parent[n]] if valid[n] else None
        paths.append(None if above is None else (*above, int(token[n])))
    return paths


def each_request(prompts: Sequence[Any], **settings: Any) -> list[Request]:
    """Requests from prompts, each setting one value for all or a sequence of one each; `stop_ids` likewise."""
    stops = settings.pop("stop_ids", ())
    settings["stop_ids"] = tuple(stops) if all(isinstance(i, int) for i in stops) else list(map(tuple, stops))
    several = (list, range)
    columns = {n: v if isinstance(v, several) else [v] * len(prompts) for n, v in settings.items()}
    rows = [Settings(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    return [Request(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def batch_of(prompts: Sequence[Any], *, width: int = 0, stop_width: int = 1, **settings: Any) -> Requests:
    """The arrays of `each_request`."""
    return make_requests(each_request(prompts, **settings), width=width, stop_width=stop_width)


def texts_of(answers: Sequence[Answer]) -> list[list[int]]:
    """The tokens of every answer."""
    return [answer.tokens.tolist() for answer in answers]
