"""Softmax attention over parts of keys, merged exactly: cached prefix, tree attention, packed rows, per-query keys."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Cache, KVCache, Mask, Packed, Ragged
from jaxspec.nn.kernels import Kernel, Pairs, attend_packed, takes

MASKED = -1e30
"""Score of a key that a query does not see: far below any real score, and finite, so a row without keys is not NaN."""


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of attention: the scale and cap of scores, and for whole training rows the kernel and its pieces."""

    scale: float | None = None
    """Factor of the scores; None: `1 / sqrt(C)`."""
    score_cap: float | None = None
    """Scores become `cap * tanh(score / cap)`; None: they stay as they are."""
    query_block: int | None = None
    """Training rows alone: XLA attends this many queries at a time; None: all at once."""
    row_by_row: bool = False
    """Training rows alone: with `query_block`, one batch row after another."""
    kernel: Kernel = "xla"
    """Training rows alone: the kernel that attends within packed documents."""


USUAL = AttentionOptions()


class _PartialSoftmax(NamedTuple):
    """Softmax attention over some of the keys, not yet normalised. Parts over other keys merge with it exactly."""

    mixed_BKQC: Array
    """Sum of the values, each times its weight `exp(score - top)`."""
    top_BKQ: Array
    """Greatest score."""
    total_BKQ: Array
    """Sum of the weights."""


def cap(x: Array, limit: float | None) -> Array:
    """Returns `limit * tanh(x / limit)`, which lies between `-limit` and `limit`; `x` where there is no limit."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def _attend_part(
    q_BKQC: Array, k_BKCM: Array, v_BKMC: Array, seen: Array, score_cap: float | None = None
) -> _PartialSoftmax:
    """Attends over the keys of one part; `seen` is a mask that broadcasts to the scores `[B, K, Q, M]`."""
    scores = jnp.einsum("BKQC,BKCM->BKQM", q_BKQC, k_BKCM.astype(q_BKQC.dtype), preferred_element_type=jnp.float32)
    scores = cap(scores, score_cap)
    scores = jnp.where(seen, scores, MASKED)
    # The result does not depend on `top`, so its gradient is exactly 0 and need not be computed.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weight = jnp.exp(scores - top[..., None])
    mixed = jnp.einsum(
        "BKQM,BKMC->BKQC", weight.astype(q_BKQC.dtype), v_BKMC.astype(q_BKQC.dtype), preferred_element_type=jnp.float32
    )
    return _PartialSoftmax(mixed, top, jnp.sum(weight, axis=-1))


def _merge(a: _PartialSoftmax, b: _PartialSoftmax) -> _PartialSoftmax:
    """Returns the softmax over the keys of both parts: each is rescaled to the greater `top`, then they are added."""
    top = jnp.maximum(a.top_BKQ, b.top_BKQ)
    x, y = jnp.exp(a.top_BKQ - top), jnp.exp(b.top_BKQ - top)
    mixed = a.mixed_BKQC * x[..., None] + b.mixed_BKQC * y[..., None]
    return _PartialSoftmax(mixed, top, a.total_BKQ * x + b.total_BKQ * y)


def _grouped(q_BLKGC: Array, scale: float | None = None) -> Array:
    """Returns scaled queries `[B, K, G * L, C]`, so that one batched matmul serves all queries of a key-value head."""
    batch, length, kv_heads, group, channels = q_BLKGC.shape
    q = q_BLKGC * jnp.asarray(channels**-0.5 if scale is None else scale, q_BLKGC.dtype)
    return jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, group * length, channels)


def _finish(part: _PartialSoftmax, like_BLKGC: Array) -> Array:
    """Normalises, and returns the layout and dtype of the queries `like_BLKGC`."""
    batch, length, kv_heads, group, channels = like_BLKGC.shape
    mixed = part.mixed_BKQC / part.total_BKQ[..., None]
    mixed = mixed.reshape(batch, kv_heads, group, length, channels).astype(like_BLKGC.dtype)
    return jnp.transpose(mixed, (0, 3, 1, 2, 4))


class PerQueryKeys(NamedTuple):
    """Keys that one query of the row sees alone: those of earlier draft steps at its own position."""

    pairs: Pairs = ()
    """Keys `[B, K, C, L]` and values `[B, K, L, C]` of each earlier step. Query `i` sees the `i`-th of each."""
    zeros_BL: Array | None = None
    """Number of further keys of each query whose score is 0 and whose value is 0."""

    def cut(self, begin: int, end: int) -> PerQueryKeys:
        """Returns the keys of the queries from `begin` to `end`."""
        pairs = tuple((k[..., begin:end], v[:, :, begin:end]) for k, v in self.pairs)
        return PerQueryKeys(pairs, None if self.zeros_BL is None else self.zeros_BL[:, begin:end])


NO_KEYS = PerQueryKeys()


def _attend_per_query(
    part: _PartialSoftmax, q_BKQC: Array, per_query: PerQueryKeys, score_cap: float | None
) -> _PartialSoftmax:
    """Merges the per-query keys into `part`."""
    batch, kv_heads, queries, channels = q_BKQC.shape
    if per_query.pairs:
        q_BKGLC = q_BKQC.reshape(batch, kv_heads, -1, per_query.pairs[0][0].shape[-1], channels)
        # A query sees one key of each step, so its scores are dot products `[L]`, never a matrix `[L, L]`.
        scores_JBKGL = cap(
            jnp.stack(
                [
                    jnp.einsum("BKGLC,BKCL->BKGL", q_BKGLC, k, preferred_element_type=jnp.float32)
                    for k, _ in per_query.pairs
                ]
            ),
            score_cap,
        )
        top_BKGL = jax.lax.stop_gradient(jnp.max(scores_JBKGL, axis=0))
        weight_JBKGL = jnp.exp(scores_JBKGL - top_BKGL)
        mixed = sum(
            jnp.einsum("BKGL,BKLC->BKGLC", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
            for w, (_, v) in zip(weight_JBKGL, per_query.pairs, strict=True)
        )
        flat = (batch, kv_heads, queries)
        seen = _PartialSoftmax(
            jnp.reshape(mixed, (*flat, channels)), top_BKGL.reshape(flat), jnp.sum(weight_JBKGL, axis=0).reshape(flat)
        )
        part = _merge(part, seen)
    if per_query.zeros_BL is not None:
        group = queries // per_query.zeros_BL.shape[1]
        count_BKQ = jnp.broadcast_to(jnp.tile(per_query.zeros_BL[:, None], (1, 1, group)), part.top_BKQ.shape)
        # A key of score 0 has weight exp(0) = 1, so `count` of them add `count` to the total and nothing to the values.
        top_BKQ = jnp.where(count_BKQ > 0, 0.0, MASKED)
        part = _merge(part, _PartialSoftmax(jnp.zeros_like(part.mixed_BKQC), top_BKQ, count_BKQ.astype(jnp.float32)))
    return part


class Prefix(NamedTuple):
    """The committed tokens as one layer sees them."""

    cache: Cache
    layer: Array | int
    length_B: Array
    """Each row's queries see its first `length` slots."""
    first_BL: Array | None = None
    """First of these slots that each query sees; None: slot 0."""


PREFIX_BLOCK = 64
"""Slots of the prefix that XLA:CPU attends at once, doubled from the second time on: it copies what a matmul reads."""
PREFIX_BYTES = 8 * 2**20
"""Bytes of keys and values that accelerators attend first: reading this much costs them less than one branch."""


class _PrefixQueries(NamedTuple):
    """Queries of one layer over the committed tokens, attended in pieces of fixed sizes."""

    q_BKQC: Array
    prefix: Prefix
    longest: Array
    """Committed tokens of the longest row."""
    score_cap: float | None

    def attend_slots(self, begin: int, end: int) -> _PartialSoftmax:
        """Attends over the slots from `begin` to `end`."""
        cache = self.prefix.cache
        seen_BS = jnp.arange(begin, end) < self.prefix.length_B[:, None]
        # One slice for layer and slots: a conditional would be handed a copy of the whole layer.
        if isinstance(cache, KVCache):
            k_BKCS = cache.k_YBKCS[self.prefix.layer, ..., begin:end]
        else:
            k_BKCS = jnp.swapaxes(cache.k_YBKSC[self.prefix.layer, :, :, begin:end], -1, -2)
        v_BKSC = cache.v_YBKSC[self.prefix.layer, :, :, begin:end]
        seen = seen_BS[:, None, None]
        if self.prefix.first_BL is not None:
            inside_BLS = jnp.arange(begin, end) >= self.prefix.first_BL[..., None]
            group = self.q_BKQC.shape[2] // self.prefix.first_BL.shape[1]
            seen = seen & jnp.tile(inside_BLS[:, None], (1, 1, group, 1))
        return _attend_part(self.q_BKQC, k_BKCS, v_BKSC, seen, self.score_cap)

    def attend_behind(self, begin: int, part: _PartialSoftmax) -> _PartialSoftmax:
        """Merges the slots from `begin` on into `part`, in pieces of double size; pieces past `longest` are skipped."""
        # Pieces have fixed bounds, so a row's sums depend neither on the capacity nor on longer rows.
        if begin >= self.prefix.cache.capacity:
            return part
        end = min(2 * begin, self.prefix.cache.capacity)
        more = functools.partial(self.attend_behind, end)
        return jax.lax.cond(
            self.longest > begin, lambda p: more(_merge(p, self.attend_slots(begin, end))), lambda p: p, part
        )

    def attend(self, first: int) -> _PartialSoftmax:
        """Attends over all committed tokens; the first piece has `first` slots."""
        first = min(first, self.prefix.cache.capacity)
        return self.attend_behind(first, self.attend_slots(0, first))


def _attend_prefix(q_BKQC: Array, prefix: Prefix, score_cap: float | None = None) -> _PartialSoftmax:
    """Attends over the committed tokens; the pieces have the sizes that suit the platform of the program."""
    values, capacity = prefix.cache.v_YBKSC, prefix.cache.capacity
    queries = _PrefixQueries(q_BKQC, prefix, jnp.max(prefix.length_B), score_cap)
    # The greatest power of two of slots that PREFIX_BYTES hold, and at least 512.
    slot_bytes = 2 * values.size // (values.shape[0] * capacity) * values.dtype.itemsize
    wide = max(512, 2 ** (PREFIX_BYTES // slot_bytes).bit_length() // 2)
    return jax.lax.platform_dependent(
        cpu=functools.partial(queries.attend, PREFIX_BLOCK), default=functools.partial(queries.attend, wide)
    )


def attend(
    q_BLKGC: Array,
    k_BKCM: Array,
    v_BKMC: Array,
    mask_BLM: Array,
    prefix: Prefix | None = None,
    *,
    per_query: PerQueryKeys = NO_KEYS,
    options: AttentionOptions = USUAL,
) -> Array:
    """Returns the attention `[B, L, K, G, C]` of `L` queries over the call's own keys and the committed prefix.

    `mask_BLM` says which of the call's `M` keys each query sees. A tree needs its ancestor mask alone, because every
    query sees the whole prefix of its row. One fp32 softmax spans all parts, the per-query keys included. Of `options`
    only `scale` and `score_cap` count here.
    """
    # The queries of a group lie side by side, so masks and counts of the `L` tokens are tiled over it.
    q = _grouped(q_BLKGC, options.scale)
    group = q_BLKGC.shape[3]
    part = _attend_part(q, k_BKCM, v_BKMC, jnp.tile(mask_BLM[:, None], (1, 1, group, 1)), options.score_cap)
    if prefix is not None:
        part = _merge(part, _attend_prefix(q, prefix, options.score_cap))
    return _finish(_attend_per_query(part, q, per_query, options.score_cap), q_BLKGC)


def attend_causal(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Array,
    *,
    per_query: PerQueryKeys = NO_KEYS,
    options: AttentionOptions,
) -> Array:
    """Returns `attend` under a causal mask, computed in blocks of `options.query_block` queries: `[B, L, K, G, C]`.

    A block scores the keys up to its own end, so `query_block * L` scores a head are alive at once; the backward pass
    computes them again. `row_by_row` takes the batch rows one after another, which keeps the scores in a CPU's cache
    and is several times faster there. It does not suit a batch that is spread over devices.
    """
    length, block = q_BLKGC.shape[1], options.query_block or q_BLKGC.shape[1]
    mask_BLL = jnp.broadcast_to(mask_BLL, (q_BLKGC.shape[0], length, length))
    outputs = []
    mix = functools.partial(_attend_block, options)
    if per_query.zeros_BL is not None:
        # `lax.map` over rows needs the batch axis on every array.
        per_query = per_query._replace(zeros_BL=jnp.broadcast_to(per_query.zeros_BL, q_BLKGC.shape[:2]))
    for begin in range(0, length, block):
        # A Python loop, because each block has another number of keys.
        end = min(begin + block, length)
        args = (q_BLKGC[:, begin:end], k_BKCL[..., :end], v_BKLC[:, :, :end], mask_BLL[:, begin:end, :end])
        args = (*args, per_query.cut(begin, end))
        if options.row_by_row:
            one = jax.checkpoint(lambda row: mix(*jax.tree.map(lambda x: x[None], row))[0])
            outputs.append(jax.lax.map(one, args))
        else:
            outputs.append(jax.checkpoint(mix)(*args))
    return jnp.concatenate(outputs, axis=1)


def _attend_block(
    options: AttentionOptions, q_BLKGC: Array, k_BKCM: Array, v_BKMC: Array, mask_BLM: Array, per_query: PerQueryKeys
) -> Array:
    """Returns `attend` with every array positional, as `jax.checkpoint` and `lax.map` take them."""
    return attend(q_BLKGC, k_BKCM, v_BKMC, mask_BLM, per_query=per_query, options=options)


def attend_text(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Mask,
    *,
    per_query: PerQueryKeys = NO_KEYS,
    options: AttentionOptions = USUAL,
) -> Array:
    """Returns the attention `[B, L, K, G, C]` of whole training rows, whose mask is causal.

    `options.kernel` attends where it takes these rows: the mask is `Packed`, the scores are neither scaled nor capped
    otherwise than usual, and no per-query key has score 0. Everything else is XLA's, in blocks of
    `options.query_block` queries where that is set.
    """
    # The kernels scale by 1 / sqrt(C), cap nothing, and know no keys without a value.
    usual = options.scale is None and options.score_cap is None and per_query.zeros_BL is None
    if (
        usual
        and isinstance(mask_BLL, Packed)
        and options.kernel != "xla"
        and takes(options.kernel, q_BLKGC.shape[1], q_BLKGC.shape[-1], per_query.pairs)
    ):
        return attend_packed(options.kernel, q_BLKGC, k_BKCL, v_BKLC, mask_BLL.segments_BL, per_query.pairs)
    mask_BLL = as_mask(mask_BLL)
    if options.query_block:
        return attend_causal(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, per_query=per_query, options=options)
    return attend(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, per_query=per_query, options=options)


def causal_mask(length: int) -> Array:
    """Returns `[1, L, L]`: a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segment_mask(segments_BL: Array) -> Array:
    """Returns `[B, L, L]`: causal within one packed document. Segment 0 is padding, which sees only itself."""
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    real = (segments_BL > 0)[:, :, None]
    # The diagonal gives padding one key, so that no row of the softmax is empty.
    return (same & real & causal_mask(segments_BL.shape[1])) | jnp.eye(segments_BL.shape[1], dtype=bool)[None]


def as_mask(mask: Mask) -> Array:
    """Returns the array `[B, L, L]` that a mask stands for; `[B, N, N]` of a `Ragged` one."""
    if isinstance(mask, Ragged):
        return mask.mask_BNN
    return segment_mask(mask.segments_BL) if isinstance(mask, Packed) else mask
