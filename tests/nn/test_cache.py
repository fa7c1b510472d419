"""Accepted paths are gathered and written as NumPy does it, inside a compiled loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import KVCache, TokenMajorCache
from jaxspec.nn import cache as kv

pytestmark = pytest.mark.usefixtures("compile_afresh", "compile_fully")

LAYERS, HEADS, CHANNELS, CAPACITY, NODES, PATH = 2, 2, 4, 40, 7, 3


def random_rounds(rng: np.random.Generator, batch: int, rounds: int):
    """Returns the fresh keys and values of every round, the path, and how many of its nodes are kept."""
    fresh_k = rng.standard_normal((rounds, LAYERS, batch, HEADS, CHANNELS, NODES)).astype(np.float32)
    fresh_v = rng.standard_normal((rounds, LAYERS, batch, HEADS, NODES, CHANNELS)).astype(np.float32)
    path = rng.integers(0, NODES, (rounds, batch, PATH)).astype(np.int32)
    return fresh_k, fresh_v, path, rng.integers(0, PATH + 1, (rounds, batch)).astype(np.int32)


def rows_of(layers: int, batch: int, length: int, value: float = 0) -> KVCache:
    """Fresh keys and values that all have one value."""
    return KVCache(
        jnp.full((layers, batch, HEADS, CHANNELS, length), value, jnp.float32),
        jnp.full((layers, batch, HEADS, length, CHANNELS), value, jnp.float32),
    )


@jax.jit
def commit_in_a_loop(cache, start_B, fresh_k, fresh_v, path, count):
    def one(i, carry):
        cache, length_B = carry
        rows = kv.take_rows(KVCache(fresh_k[i], fresh_v[i]), path[i])
        return kv.commit(cache, rows, length_B), length_B + count[i]

    return jax.lax.fori_loop(0, path.shape[0], one, (cache, start_B))


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_commits_in_a_compiled_loop_equal_numpy(batch: int):
    """XLA has miscompiled shifted slices that are written into their own buffer (openxla/xla 49176)."""
    for trial in range(12):
        rng = np.random.default_rng([batch, trial])
        rounds = 6
        fresh_k, fresh_v, path, count = random_rounds(rng, batch, rounds)
        start = rng.integers(0, CAPACITY - rounds * PATH, batch).astype(np.int32)
        k = rng.standard_normal((LAYERS, batch, HEADS, CHANNELS, CAPACITY)).astype(np.float32)
        v = rng.standard_normal((LAYERS, batch, HEADS, CAPACITY, CHANNELS)).astype(np.float32)
        cache, length = commit_in_a_loop(KVCache(jnp.array(k), jnp.array(v)), start, fresh_k, fresh_v, path, count)
        at = start.copy()
        for i in range(rounds):
            for b in range(batch):
                for p in range(PATH):
                    k[:, b, :, :, at[b] + p] = fresh_k[i, :, b, :, :, path[i, b, p]]
                    v[:, b, :, at[b] + p] = fresh_v[i, :, b, :, path[i, b, p]]
            at += count[i]
        np.testing.assert_array_equal(length, at)
        np.testing.assert_array_equal(cache.k_YBKCS, k)
        np.testing.assert_array_equal(cache.v_YBKSC, v)


@pytest.mark.parametrize("batch", [1, 9])
def test_a_token_major_cache_takes_the_same_commits(batch: int):
    rng = np.random.default_rng(batch)
    fresh_k, fresh_v, path, count = random_rounds(rng, batch, 6)
    start = rng.integers(0, CAPACITY - 6 * PATH, batch).astype(np.int32)
    empty = [kv.empty(LAYERS, batch, HEADS, CHANNELS, CAPACITY, jnp.dtype("float32"), major) for major in (False, True)]
    expected, found = (commit_in_a_loop(cache, start, fresh_k, fresh_v, path, count)[0] for cache in empty)
    assert isinstance(found, TokenMajorCache) and found.capacity == CAPACITY
    np.testing.assert_array_equal(found.k_YBKSC, jnp.swapaxes(expected.k_YBKCS, -1, -2))
    np.testing.assert_array_equal(found.v_YBKSC, expected.v_YBKSC)


@pytest.mark.parametrize("batch", [1, 9])
def test_rows_of_the_same_cache_can_be_moved_within_it(batch: int):
    """Gather from the cache, write one slot on: every row reads the old values."""
    rng = np.random.default_rng(batch)
    k = rng.standard_normal((LAYERS, batch, HEADS, CHANNELS, CAPACITY)).astype(np.float32)
    v = rng.standard_normal((LAYERS, batch, HEADS, CAPACITY, CHANNELS)).astype(np.float32)
    path = np.tile(np.arange(PATH + 5), (batch, 1))

    def shift(cache):
        return kv.commit(cache, kv.take_rows(cache, jnp.asarray(path)), jnp.ones(batch, jnp.int32))

    moved = jax.jit(shift, donate_argnums=0)(KVCache(jnp.array(k), jnp.array(v)))
    want_k, want_v = k.copy(), v.copy()
    want_k[..., 1 : PATH + 6], want_v[..., 1 : PATH + 6, :] = k[..., : PATH + 5], v[..., : PATH + 5, :]
    np.testing.assert_array_equal(moved.k_YBKCS, want_k)
    np.testing.assert_array_equal(moved.v_YBKSC, want_v)


def test_an_ordered_write_lands_where_an_unordered_one_does():
    cache = kv.empty(LAYERS, 3, HEADS, CHANNELS, CAPACITY, jnp.dtype("float32"))
    rows = rows_of(LAYERS, 3, PATH, 1)
    start, after = jnp.array([0, 7, CAPACITY - PATH]), jnp.array([0, 5, 2**31 - 1])
    for x, y in zip(kv.commit(cache, rows, start), kv.commit(cache, rows, start, after), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_commit_takes_the_caches_dtype():
    cache = kv.empty(1, 2, HEADS, CHANNELS, 8, jnp.dtype("bfloat16"))
    rows = rows_of(1, 2, 3)
    assert all(x.dtype == jnp.bfloat16 for x in kv.commit(cache, rows, jnp.zeros(2, jnp.int32)))


def test_more_rows_than_slots_are_refused():
    cache = kv.empty(1, 1, HEADS, CHANNELS, 4, jnp.dtype("float32"))
    rows = rows_of(1, 1, 5)
    with pytest.raises(ValueError, match="4 slots"):
        kv.commit(cache, rows, jnp.zeros(1, jnp.int32))
