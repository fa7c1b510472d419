"""Softmax attention over parts of keys that are merged exactly: a cached prefix, a tree, packed rows, a query's own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, KVCache, Mask, Packed
from jaxspec.nn.kernels import Kernel, Pairs, attend_packed, takes

MASKED = -1e30
"""Score of a key that a query does not see: far below any real score, and finite, so a row without keys is not NaN."""


class _Part(NamedTuple):
    """Softmax attention over some of the keys, not yet normalised: parts with other keys can be merged exactly."""

    mixed_BKQC: Array
    top_BKQ: Array
    total_BKQ: Array


def cap(x: Array, limit: float | None) -> Array:
    """`limit * tanh(x / limit)`: between `-limit` and `limit`; `x` where there is none."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def _attend_part(q_BKQC: Array, k_BKCM: Array, v_BKMC: Array, seen: Array, score_cap: float | None = None) -> _Part:
    """One part; `seen` is a mask that broadcasts to the scores `[B, K, Q, M]`."""
    scores = jnp.einsum("BKQC,BKCM->BKQM", q_BKQC, k_BKCM.astype(q_BKQC.dtype), preferred_element_type=jnp.float32)
    scores = cap(scores, score_cap)
    scores = jnp.where(seen, scores, MASKED)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weight = jnp.exp(scores - top[..., None])
    mixed = jnp.einsum(
        "BKQM,BKMC->BKQC", weight.astype(q_BKQC.dtype), v_BKMC.astype(q_BKQC.dtype), preferred_element_type=jnp.float32
    )
    return _Part(mixed, top, jnp.sum(weight, axis=-1))


def _merge(a: _Part, b: _Part) -> _Part:
    top = jnp.maximum(a.top_BKQ, b.top_BKQ)
    x, y = jnp.exp(a.top_BKQ - top), jnp.exp(b.top_BKQ - top)
    mixed = a.mixed_BKQC * x[..., None] + b.mixed_BKQC * y[..., None]
    return _Part(mixed, top, a.total_BKQ * x + b.total_BKQ * y)


def _grouped(q_BLKGC: Array, scale: float | None = None) -> Array:
    """Scaled queries `[B, K, G * L, C]`: one plain batched matmul for all the queries a key serves."""
    batch, length, kv_heads, group, channels = q_BLKGC.shape
    q = q_BLKGC * jnp.asarray(channels**-0.5 if scale is None else scale, q_BLKGC.dtype)
    return jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, group * length, channels)


def _finish(part: _Part, like_BLKGC: Array) -> Array:
    batch, length, kv_heads, group, channels = like_BLKGC.shape
    mixed = part.mixed_BKQC / part.total_BKQ[..., None]
    mixed = mixed.reshape(batch, kv_heads, group, length, channels).astype(like_BLKGC.dtype)
    return jnp.transpose(mixed, (0, 3, 1, 2, 4))


class PerQueryKeys(NamedTuple):
    """What each query sees besides the keys that its row shares: of other draft steps those at its own position."""

    pairs: Pairs = ()
    """Keys `[B, K, C, L]` and values `[B, K, L, C]`, of which query `i` sees the `i`-th."""
    zeros_BL: Array | None = None
    """So many further keys of score 0 that carry no value."""

    def cut(self, begin: int, end: int) -> PerQueryKeys:
        """That of the queries from `begin` to `end`."""
        pairs = tuple((k[..., begin:end], v[:, :, begin:end]) for k, v in self.pairs)
        return PerQueryKeys(pairs, None if self.zeros_BL is None else self.zeros_BL[:, begin:end])


NO_KEYS = PerQueryKeys()


def _attend_own(part: _Part, q_BKQC: Array, own: PerQueryKeys, score_cap: float | None) -> _Part:
    """`part` and what the queries see besides."""
    batch, kv_heads, queries, channels = q_BKQC.shape
    if own.pairs:
        q_BKGLC = q_BKQC.reshape(batch, kv_heads, -1, own.pairs[0][0].shape[-1], channels)
        scores_JBKGL = cap(
            jnp.stack(
                [jnp.einsum("BKGLC,BKCL->BKGL", q_BKGLC, k, preferred_element_type=jnp.float32) for k, _ in own.pairs]
            ),
            score_cap,
        )
        top_BKGL = jax.lax.stop_gradient(jnp.max(scores_JBKGL, axis=0))
        weight_JBKGL = jnp.exp(scores_JBKGL - top_BKGL)
        mixed = sum(
            jnp.einsum("BKGL,BKLC->BKGLC", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
            for w, (_, v) in zip(weight_JBKGL, own.pairs, strict=True)
        )
        flat = (batch, kv_heads, queries)
        seen = _Part(
            jnp.reshape(mixed, (*flat, channels)), top_BKGL.reshape(flat), jnp.sum(weight_JBKGL, axis=0).reshape(flat)
        )
        part = _merge(part, seen)
    if own.zeros_BL is not None:
        group = queries // own.zeros_BL.shape[1]
        count_BKQ = jnp.broadcast_to(jnp.tile(own.zeros_BL[:, None], (1, 1, group)), part.top_BKQ.shape)
        top_BKQ = jnp.where(count_BKQ > 0, 0.0, MASKED)
        part = _merge(part, _Part(jnp.zeros_like(part.mixed_BKQC), top_BKQ, count_BKQ.astype(jnp.float32)))
    return part


class Prefix(NamedTuple):
    """The committed tokens as one layer sees them."""

    cache: KVCache
    layer: Array | int
    length_B: Array
    """Each row's queries see its first `length` slots."""
    first_BL: Array | None = None
    """Of these each query sees those from this slot on; None: all."""


PREFIX_BLOCK = 64
"""Slots of the prefix that XLA:CPU attends at once, doubled from the second time on: it copies what a matmul reads."""
PREFIX_BYTES = 8 * 2**20
"""Keys and values that accelerators attend at once, likewise: a branch costs them more than to read so much."""


def _attend_prefix(q_BKQC: Array, prefix: Prefix, score_cap: float | None = None) -> _Part:
    """The queries over the committed tokens, in the way that suits the platform the program is lowered for."""
    k_YBKCS, v_YBKSC = prefix.cache
    capacity, longest = prefix.cache.capacity, jnp.max(prefix.length_B)

    def over(begin: int, end: int) -> _Part:
        seen_BS = jnp.arange(begin, end) < prefix.length_B[:, None]
        # One slice for layer and slots: a conditional would be handed a copy of the whole layer.
        k_BKCS, v_BKSC = k_YBKCS[prefix.layer, ..., begin:end], v_YBKSC[prefix.layer, :, :, begin:end]
        seen = seen_BS[:, None, None]
        if prefix.first_BL is not None:
            inside_BLS = jnp.arange(begin, end) >= prefix.first_BL[..., None]
            group = q_BKQC.shape[2] // prefix.first_BL.shape[1]
            seen = seen & jnp.tile(inside_BLS[:, None], (1, 1, group, 1))
        return _attend_part(q_BKQC, k_BKCS, v_BKSC, seen, score_cap)

    def behind(begin: int, part: _Part) -> _Part:
        # What is summed together is fixed, so a row's result depends neither on the capacity nor on longer rows.
        if begin >= capacity:
            return part
        end = min(2 * begin, capacity)
        more = functools.partial(behind, end)
        return jax.lax.cond(longest > begin, lambda p: more(_merge(p, over(begin, end))), lambda p: p, part)

    def used(first: int) -> _Part:
        first = min(first, capacity)
        return behind(first, over(0, first))

    slot_bytes = 2 * k_YBKCS.size // (k_YBKCS.shape[0] * capacity) * k_YBKCS.dtype.itemsize
    wide = max(512, 2 ** (PREFIX_BYTES // slot_bytes).bit_length() // 2)
    return jax.lax.platform_dependent(cpu=functools.partial(used, PREFIX_BLOCK), default=functools.partial(used, wide))


def attend(
    q_BLKGC: Array,
    k_BKCM: Array,
    v_BKMC: Array,
    mask_BLM: Array,
    prefix: Prefix | None = None,
    *,
    own: PerQueryKeys = NO_KEYS,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """Attention of `L` queries over the call's own keys (by mask) and the whole committed prefix: `[B, L, K, G, C]`.

    A tree needs only its own ancestor mask, for every query sees all of its row's prefix. One fp32 softmax spans all
    parts, `own` too. Scale `1 / sqrt(C)`, unless another is given; see `cap` for `score_cap`.
    """
    q = _grouped(q_BLKGC, scale)
    group = q_BLKGC.shape[3]
    part = _attend_part(q, k_BKCM, v_BKMC, jnp.tile(mask_BLM[:, None], (1, 1, group, 1)), score_cap)
    if prefix is not None:
        part = _merge(part, _attend_prefix(q, prefix, score_cap))
    return _finish(_attend_own(part, q, own, score_cap), q_BLKGC)


def attend_causal(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Array,
    *,
    block: int,
    by_row: bool = False,
    own: PerQueryKeys = NO_KEYS,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """`attend` for long sequences whose mask is causal: in blocks of `block` queries, scores recomputed backward.

    A block scores only the keys up to its own end, and `block * L` scores a head are alive at once. `by_row` takes the
    batch rows one after another, which keeps the scores in cache: several times faster on a CPU, and wrong for a
    batch that is spread over devices.
    """
    length = q_BLKGC.shape[1]
    mask_BLL = jnp.broadcast_to(mask_BLL, (q_BLKGC.shape[0], length, length))
    outputs = []

    def mix(q: Array, k: Array, v: Array, mask: Array, own: PerQueryKeys) -> Array:
        return attend(q, k, v, mask, own=own, scale=scale, score_cap=score_cap)

    if own.zeros_BL is not None:
        own = own._replace(zeros_BL=jnp.broadcast_to(own.zeros_BL, q_BLKGC.shape[:2]))
    for begin in range(0, length, block):
        end = min(begin + block, length)
        args = (q_BLKGC[:, begin:end], k_BKCL[..., :end], v_BKLC[:, :, :end], mask_BLL[:, begin:end, :end])
        args = (*args, own.cut(begin, end))
        if by_row:
            one = jax.checkpoint(lambda row: mix(*jax.tree.map(lambda x: x[None], row))[0])
            outputs.append(jax.lax.map(one, args))
        else:
            outputs.append(jax.checkpoint(mix)(*args))
    return jnp.concatenate(outputs, axis=1)


def attend_text(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Mask,
    *,
    kernel: Kernel = "xla",
    block: int | None = None,
    by_row: bool = False,
    own: PerQueryKeys = NO_KEYS,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """`attend` of whole training rows, whose mask is causal: by the kernel where it takes them packed as they are, else
    `attend_causal` in blocks, if any."""
    how: dict[str, Any] = {"own": own, "scale": scale, "score_cap": score_cap}
    usual = scale is None and score_cap is None and own.zeros_BL is None
    if (
        usual
        and isinstance(mask_BLL, Packed)
        and kernel != "xla"
        and takes(kernel, q_BLKGC.shape[1], q_BLKGC.shape[-1], own.pairs)
    ):
        return attend_packed(kernel, q_BLKGC, k_BKCL, v_BKLC, mask_BLL.segments_BL, own.pairs)
    mask_BLL = as_mask(mask_BLL)
    if block:
        return attend_causal(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, block=block, by_row=by_row, **how)
    return attend(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, **how)


def causal_mask(length: int) -> Array:
    """`[1, L, L]`: a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segment_mask(segments_BL: Array) -> Array:
    """`[B, L, L]`: causal, and within one packed document. Segment 0 is padding and sees only itself."""
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    real = (segments_BL > 0)[:, :, None]
    return (same & real & causal_mask(segments_BL.shape[1])) | jnp.eye(segments_BL.shape[1], dtype=bool)[None]


def as_mask(mask: Mask) -> Array:
    """The array that a mask stands for."""
    return segment_mask(mask.segments_BL) if isinstance(mask, Packed) else mask
