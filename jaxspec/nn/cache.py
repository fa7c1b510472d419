"""The key-value cache of committed tokens: `empty` makes it, `commit` writes an accepted path into it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jaxspec.base import Array, Cache, KVCache, TokenMajorCache
from jaxspec.parallel.mesh import STATE_AXES
from jaxspec.parallel.rows import shard_map_rows


def empty(
    layers: int, batch: int, kv_heads: int, channels: int, capacity: int, dtype: jnp.dtype, token_major: bool = False
) -> Cache:
    """Returns a zeroed cache: values `[Y, B, K, S, C]` with `S = capacity`, keys `[Y, B, K, C, S]`.

    With `token_major` the keys lie as the values do.
    """
    values = (layers, batch, kv_heads, capacity, channels)
    if token_major:
        return TokenMajorCache(jnp.zeros(values, dtype), jnp.zeros(values, dtype))
    return KVCache(jnp.zeros((layers, batch, kv_heads, channels, capacity), dtype), jnp.zeros(values, dtype))


def take_rows(fresh: KVCache, path_BP: Array) -> KVCache:
    """Returns the fresh keys and values of the nodes on each row's path, in path order."""
    path = path_BP[None, :, None, None, :]
    return KVCache(
        jnp.take_along_axis(fresh.k_YBKCS, path, axis=4),
        jnp.take_along_axis(fresh.v_YBKSC, jnp.swapaxes(path, 3, 4), axis=3),
    )


def commit(cache: Cache, rows: KVCache, start_B: Array, after_B: Array | None = None) -> Cache:
    """Writes each row's new keys and values behind its `start_B` committed tokens; returns the cache.

    All slots of `rows` are written. Those past a row's accepted count are garbage: the row's length hides them, and
    the next commit overwrites them. The caller leaves room for them, `start + rows.capacity <= cache.capacity`; else
    the write would move back onto committed slots. Raises ValueError where `rows` has more slots than the cache.

    In a loop, XLA writes in place only if every read of the old cache precedes the write by data dependency;
    otherwise it copies the whole cache, each round. Optimization barriers do not help: XLA drops them before it
    decides. Where `rows` and `start_B` do not depend on those reads, `after_B` makes the write depend on them: any
    integers >= 0 that are computed from the reads.
    """
    if rows.capacity > cache.capacity:
        raise ValueError(
            f"{rows.capacity} new tokens do not fit a cache of {cache.capacity} slots: raise the capacity or shorten "
            "the prompt"
        )
    if after_B is not None:
        start_B = start_B + jnp.minimum(after_B, 0)  # adds 0, but XLA cannot tell
    # Each device writes its own rows: XLA would send pieces of every cache for a write at a place of each row's own.
    keys = rows.k_YBKCS if isinstance(cache, KVCache) else jnp.swapaxes(rows.k_YBKCS, -1, -2)
    slot_axes = (4 if isinstance(cache, KVCache) else 3, 3)
    write = functools.partial(_write, slot_axes)
    fields = tuple(STATE_AXES[name] for name in cache._fields)
    axes = (*fields, *fields, ("batch",))
    return cache._make(shard_map_rows(write, axes, fields, *cache, keys, rows.v_YBKSC, start_B))


Arrays = tuple[Array, ...]


def _write(slot_axes: tuple[int, int], k: Array, v: Array, k_rows: Array, v_rows: Array, start_B: Array) -> Arrays:
    """Writes the rows that one device has; `slot_axes` are the axes of the slots in keys and values."""
    new = (k_rows.astype(k.dtype), v_rows.astype(v.dtype))
    each = functools.partial(_write_row, slot_axes, new, start_B)
    loop = functools.partial(lax.fori_loop, 0, start_B.shape[0], each)
    return lax.platform_dependent((k, v), cpu=loop, default=functools.partial(_unroll, each, start_B.shape[0]))


def _unroll(each: Callable[[int, Arrays], Arrays], rows: int, cache: Arrays) -> Arrays:
    """Writes row after row without a loop in the program."""
    # For TPUs XLA fails to compile a loop over the rows ("shape doesn't match when replacing"). On CPUs the unrolled
    # writes of many rows take minutes to compile.
    for row in range(rows):
        cache = each(row, cache)
    return cache


def _write_row(slot_axes: tuple[int, int], new: Arrays, start_B: Array, row: Array | int, cache: Arrays) -> Arrays:
    """Writes one row's new keys and values behind its committed ones."""
    at, zero = jnp.asarray(row, start_B.dtype), jnp.zeros((), start_B.dtype)
    written = []
    for axis, into, values in zip(slot_axes, cache, new, strict=True):
        place = [zero, at, zero, zero, zero]
        place[axis] = start_B[row]
        one = values[:, row : row + 1] if isinstance(row, int) else lax.dynamic_slice_in_dim(values, row, 1, axis=1)
        written.append(lax.dynamic_update_slice(into, one, place))
    return tuple(written)
