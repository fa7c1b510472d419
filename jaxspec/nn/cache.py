"""The key-value cache of committed tokens: made empty, and extended by the rows of an accepted path."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxspec.base import Array, KVCache
from jaxspec.parallel.mesh import STATE_AXES
from jaxspec.parallel.rows import shard_map_rows


def empty(layers: int, batch: int, kv_heads: int, channels: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed cache: `k [Y, B, K, C, S]`, `v [Y, B, K, S, C]`."""
    return KVCache(
        jnp.zeros((layers, batch, kv_heads, channels, capacity), dtype),
        jnp.zeros((layers, batch, kv_heads, capacity, channels), dtype),
    )


def take_rows(fresh: KVCache, path_BP: Array) -> KVCache:
    """The fresh keys and values of the nodes on each row's path, in path order."""
    path = path_BP[None, :, None, None, :]
    return KVCache(
        jnp.take_along_axis(fresh.k_YBKCS, path, axis=4),
        jnp.take_along_axis(fresh.v_YBKSC, jnp.swapaxes(path, 3, 4), axis=3),
    )


def commit(cache: KVCache, rows: KVCache, start_B: Array, after_B: Array | None = None) -> KVCache:
    """Write each row's new keys and values behind its `start_B` committed tokens.

    All rows of `rows` are written; those past a row's accepted count are garbage that its length hides and the next
    commit overwrites. The caller leaves room for them: `start + rows.capacity <= cache.capacity`, or the write
    would be shifted onto committed slots.

    In a loop, XLA writes in place only where every read of the old cache comes first by data dependency (it drops
    optimization barriers before it decides); otherwise it copies the whole cache, each round. Where `rows` and
    `start_B` do not already follow from those reads, `after_B` orders the write: integers >= 0 computed from them.
    """
    if rows.capacity > cache.capacity:
        raise ValueError(
            f"{rows.capacity} new tokens do not fit a cache of {cache.capacity} slots: raise the capacity or shorten "
            "the prompt"
        )
    if after_B is not None:
        start_B = start_B + jnp.minimum(after_B, 0)
    fields = tuple(STATE_AXES[name] for name in KVCache._fields)
    return KVCache(*shard_map_rows(_write, (*fields, *fields, ("batch",)), fields, *cache, *rows, start_B))


def _write(k_YBKCS: Array, v_YBKSC: Array, k_rows: Array, v_rows: Array, start_B: Array) -> tuple[Array, Array]:
    zero = jnp.zeros((), start_B.dtype)
    # Unrolled: XLA fails to compile a loop over the rows for TPUs (RET_CHECK: "shape doesn't match when replacing").
    for b in range(start_B.shape[0]):
        row = jnp.asarray(b, start_B.dtype)
        k, v = k_rows[:, b : b + 1].astype(k_YBKCS.dtype), v_rows[:, b : b + 1].astype(v_YBKSC.dtype)
        k_YBKCS = lax.dynamic_update_slice(k_YBKCS, k, (zero, row, zero, zero, start_B[b]))
        v_YBKSC = lax.dynamic_update_slice(v_YBKSC, v, (zero, row, zero, start_B[b], zero))
    return k_YBKCS, v_YBKSC
