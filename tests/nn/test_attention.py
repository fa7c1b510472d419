"""Attention over the prefix in pieces is plain attention, whatever the pieces, the capacity and the other rows are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import KVCache
from jaxspec.nn.attention import Prefix, attend

BATCH, OWN, KV_HEADS, GROUP, CHANNELS = 3, 4, 2, 3, 8
LENGTHS = (0, 37, 200)


def call(capacity: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns queries, keys and values of a tree of four, and a cache of two layers with garbage behind each length."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k = normal(BATCH, OWN, KV_HEADS, GROUP, CHANNELS), normal(BATCH, KV_HEADS, CHANNELS, OWN)
    v = normal(BATCH, KV_HEADS, OWN, CHANNELS)
    mask = np.tril(rng.random((BATCH, OWN, OWN)) < 0.5) | np.eye(OWN, dtype=bool)
    keys, values = normal(2, BATCH, KV_HEADS, CHANNELS, 256), normal(2, BATCH, KV_HEADS, 256, CHANNELS)
    keys, values = keys[..., :capacity], values[:, :, :, :capacity]
    more = capacity - keys.shape[-1]
    keys = np.pad(keys, [(0, 0)] * 4 + [(0, more)], constant_values=9)
    values = np.pad(values, [(0, 0)] * 3 + [(0, more), (0, 0)], constant_values=9)
    cache = KVCache(jnp.asarray(keys, dtype), jnp.asarray(values, dtype))
    return {
        "q": jnp.asarray(q, dtype), "k": jnp.asarray(k, dtype), "v": jnp.asarray(v, dtype),
        "mask": jnp.asarray(mask), "cache": cache, "length": jnp.asarray(LENGTHS),
    }  # fmt: skip


@jax.jit
def pieces(c: dict[str, Any]) -> jax.Array:
    """Returns `attend` over the tree and the prefix."""
    return attend(c["q"], c["k"], c["v"], c["mask"], Prefix(c["cache"], 1, c["length"]))


def plainly(c: dict[str, Any]) -> np.ndarray:
    """Returns one softmax over the row's prefix and the keys of its mask, in fp64."""
    q, k, v = (np.asarray(c[n], np.float64) for n in "qkv")
    keys, values = (np.asarray(x, np.float64)[1] for x in c["cache"])
    out = np.zeros(q.shape)
    for b, length in enumerate(np.asarray(c["length"])):
        for i in range(OWN):
            seen = np.asarray(c["mask"])[b, i]
            for h in range(KV_HEADS):
                ks = np.concatenate([keys[b, h, :, :length].T, k[b, h].T[seen]])
                vs = np.concatenate([values[b, h, :length], v[b, h][seen]])
                score = q[b, i, h] @ ks.T / CHANNELS**0.5
                weight = np.exp(score - score.max(-1, keepdims=True))
                out[b, i, h] = weight / weight.sum(-1, keepdims=True) @ vs
    return out


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Sets the first piece's size; programs traced with another size are dropped."""
    monkeypatch.setattr("jaxspec.nn.attention.PREFIX_BLOCK", request.param)
    pieces.clear_cache()  # type: ignore[attr-defined]
    yield request.param
    pieces.clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", [8, 64, 100, 4096], indirect=True)
def test_attention_in_pieces_is_plain_attention(block: int):
    c = call(256)
    np.testing.assert_allclose(pieces(c), plainly(c), atol=2e-6)


@pytest.mark.parametrize("block", [8, 64], indirect=True)
def test_a_row_depends_neither_on_the_capacity_nor_on_longer_rows(block: int):
    """Bit for bit."""
    whole = np.asarray(pieces(call(256)))
    for capacity in (208, 1024):
        np.testing.assert_array_equal(pieces(call(capacity)), whole)
    c = call(256)
    np.testing.assert_array_equal(pieces({**c, "length": jnp.asarray([0, 37, 1])})[:2], whole[:2])


def test_bf16_keys_are_summed_in_fp32():
    c = call(256, dtype=jnp.bfloat16)
    found = np.asarray(pieces(c).astype(jnp.float32))
    assert np.abs(found - plainly(c)).max() < 0.02
