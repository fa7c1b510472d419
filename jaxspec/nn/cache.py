"""The key-value cache of committed tokens: `empty` makes it, `commit` writes an accepted path into it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxspec.base import Array, KVCache
from jaxspec.parallel.mesh import STATE_AXES
from jaxspec.parallel.rows import shard_map_rows


def empty(layers: int, batch: int, kv_heads: int, channels: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """Returns a zeroed cache: `k [Y, B, K, C, S]`, `v [Y, B, K, S, C]`, `S = capacity`."""
    return KVCache(
        jnp.zeros((layers, batch, kv_heads, channels, capacity), dtype),
        jnp.zeros((layers, batch, kv_heads, capacity, channels), dtype),
    )


def take_rows(fresh: KVCache, path_BP: Array) -> KVCache:
    """Returns the fresh keys and values of the nodes on each row's path, in path order."""
    path = path_BP[None, :, None, None, :]
    return KVCache(
        jnp.take_along_axis(fresh.k_YBKCS, path, axis=4),
        jnp.take_along_axis(fresh.v_YBKSC, jnp.swapaxes(path, 3, 4), axis=3),
    )


def commit(cache: KVCache, rows: KVCache, start_B: Array, after_B: Array | None = None) -> KVCache:
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
    fields = tuple(STATE_AXES[name] for name in KVCache._fields)
    return KVCache(*shard_map_rows(_write, (*fields, *fields, ("batch",)), fields, *cache, *rows, start_B))


def _write(k_YBKCS: Array, v_YBKSC: Array, k_rows: Array, v_rows: Array, start_B: Array) -> tuple[Array, Array]:
    """Writes the rows that one device has."""
    zero = jnp.zeros((), start_B.dtype)
    # The loop is unrolled: for TPUs XLA fails to compile one over the rows ("shape doesn't match when replacing").
    for b in range(start_B.shape[0]):
        row = jnp.asarray(b, start_B.dtype)
        k, v = k_rows[:, b : b + 1].astype(k_YBKCS.dtype), v_rows[:, b : b + 1].astype(v_YBKSC.dtype)
        k_YBKCS = lax.dynamic_update_slice(k_YBKCS, k, (zero, row, zero, zero, start_B[b]))
        v_YBKSC = lax.dynamic_update_slice(v_YBKSC, v, (zero, row, zero, start_B[b], zero))
    return k_YBKCS, v_YBKSC
