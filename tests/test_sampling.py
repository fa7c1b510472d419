"""The path from logits to a token: the tokens that warps keep, the order of warps, and what a draw depends on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxspec import sampling
from jaxspec.sampling import Sampling, _argmax_whole, argmax, position_noise, warp_logits

ALPHA = 1e-6

draw = jax.jit(sampling.draw, static_argnums=3)
warp = jax.jit(warp_logits)
keep_top_k = jax.jit(sampling.keep_top_k)
keep_top_p = jax.jit(sampling.keep_top_p)


def settings(batch: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, seed: Any = 0) -> Sampling:
    row = lambda value, dtype: jnp.asarray(np.broadcast_to(np.asarray(value), (batch,)).astype(dtype))  # noqa: E731
    return Sampling(row(temperature, np.float32), row(top_k, np.int32), row(top_p, np.float32), row(seed, np.uint32))


def logits_of_every_kind(seed: int, vocab: int) -> np.ndarray:
    """Returns rows `[1, 8, V]`: smooth, tied, negative, positive, zeros of both signs, with -inf, wide, constant."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, vocab)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = -np.abs(x[2]) - 5
    x[3] = np.abs(x[3]) * 20
    x[4] = np.where(x[4] > 0, 0.0, -0.0)
    x[5, rng.random(vocab) < 0.5] = -np.inf
    x[5, 0] = 0.0
    x[6] *= 1e30
    x[7] = -3.25
    return x[None]


def sorted_top_k(x: np.ndarray, k: int) -> np.ndarray:
    if k <= 0 or k >= len(x):
        return np.ones(len(x), bool)
    return x >= np.sort(x)[::-1][k - 1]


def sorted_top_p(x: np.ndarray, p: float) -> np.ndarray:
    """Returns the tokens with less than `p` above them, in fp64; `p` must not lie where fp32 rounding could decide."""
    e = np.exp(x.astype(np.float64) - x.max())
    prob = e / e.sum()
    above = np.array([prob[prob > q].sum() for q in prob])
    unclear = (np.abs(above - p) < 1e-5) & (above > 0)
    assert not np.any(unclear & (prob > 1e-30)), "choose a top_p away from a cumulative sum"
    return (above < p) | (prob == prob.max())


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("k", [-3, 0, 1, 2, 5, 64, 2000])
def test_top_k_keeps_what_sorting_keeps_and_ties(vocab: int, k: int):
    x = logits_of_every_kind(vocab, vocab)
    out = np.asarray(keep_top_k(jnp.asarray(x), jnp.array([k])))
    for row, kept in zip(x[0], out[0], strict=True):
        np.testing.assert_array_equal(kept, np.where(sorted_top_k(row, k), row, -np.inf))


@pytest.mark.parametrize("vocab", [2, 7, 64, 1000])
@pytest.mark.parametrize("p", [1e-9, 0.0137, 0.31415, 0.6321, 0.91237])
def test_top_p_keeps_what_sorting_keeps_and_ties(vocab: int, p: float):
    x = logits_of_every_kind(vocab, vocab)
    out = np.asarray(keep_top_p(jnp.asarray(x), jnp.array([p], jnp.float32)))
    for row, kept in zip(x[0], out[0], strict=True):
        np.testing.assert_array_equal(kept, np.where(sorted_top_p(row, p), row, -np.inf))


def test_top_p_of_one_keeps_every_token():
    x = logits_of_every_kind(0, 64)
    np.testing.assert_array_equal(keep_top_p(jnp.asarray(x), jnp.ones(1)), x)


def test_a_tiny_top_p_keeps_exactly_the_argmax():
    x = jax.random.normal(jax.random.key(0), (1, 20, 50))
    kept = keep_top_p(x, jnp.array([1e-9])) > -jnp.inf
    np.testing.assert_array_equal(jnp.sum(kept, -1), 1)
    np.testing.assert_array_equal(jnp.argmax(kept, -1), jnp.argmax(x, -1))


def test_rows_of_a_batch_keep_by_their_own_settings():
    x = jax.random.normal(jax.random.key(1), (6, 3, 40))
    mixed = settings(6, [0.0, 0.5, 1.0, 2.0, 1.0, 0.7], [0, 3, 0, 5, 0, 1], [1.0, 1.0, 0.5, 0.7, 1.0, 0.2])
    together = warp(x, mixed)
    for b in range(6):
        alone = warp(x[b : b + 1], jax.tree.map(lambda a, b=b: a[b : b + 1], mixed))
        np.testing.assert_array_equal(together[b], alone[0])


def test_warping_is_temperature_then_top_k_then_top_p():
    rng = np.random.default_rng(3)
    differs = 0
    for t, k, p in [(0.4, 5, 0.83), (1.7, 6, 0.71), (1.0, 4, 0.55), (2.5, 3, 0.47)]:
        x = rng.standard_normal(12).astype(np.float32) * 2
        warped = x / np.float32(t)
        kept = np.where(sorted_top_k(warped, k), warped, -np.inf)
        want = np.where(sorted_top_p(kept, p), kept, -np.inf)
        got = np.asarray(warp(jnp.asarray(x)[None, None], settings(1, t, k, p)))[0, 0]
        np.testing.assert_array_equal(got > -np.inf, want > -np.inf)
        np.testing.assert_allclose(got - got.max(), want - want.max(), atol=1e-6)
        other = np.where(sorted_top_p(warped, p) & sorted_top_k(warped, k), warped, -np.inf)
        early = np.where(sorted_top_p(x, p) & sorted_top_k(x, k), warped, -np.inf)
        differs += (not np.array_equal(other, want)) + (not np.array_equal(early, want))
    assert differs, "the settings cannot tell the orders apart"


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 300, 4096])
def test_argmax_is_the_first_of_the_greatest(vocab):
    x = np.random.default_rng(vocab).integers(-3, 3, (2, 4, vocab)).astype(np.float32)  # full of ties
    x[0, 0], x[0, 1, :-1] = -np.inf, -np.inf
    for program in (argmax, jax.jit(argmax), _argmax_whole):
        np.testing.assert_array_equal(program(jnp.asarray(x)), np.argmax(x, -1))


def test_a_vanishing_temperature_draws_the_argmax():
    x = 100 + jax.random.normal(jax.random.key(5), (1, 30, 40))
    depth = jnp.zeros((1, 30), jnp.int32)
    for t in (1e-6, 1e-30, 1e-37):
        drawn = draw(x, depth, jnp.zeros(1, jnp.int32), 1, settings(1, t))
        np.testing.assert_array_equal(drawn, jnp.argmax(x, -1))


def test_greedy_rows_ignore_noise_and_sampled_neighbours():
    x = jax.random.normal(jax.random.key(2), (3, 5, 30))
    depth = jnp.broadcast_to(jnp.arange(5), (3, 5))
    first = jnp.array([4, 9, 0])
    drawn = draw(x, depth, first, 5, settings(3, [0.0, 3.0, 0.0], [2, 4, 0], [0.3, 0.9, 1.0]))
    np.testing.assert_array_equal(drawn[jnp.array([0, 2])], jnp.argmax(x, -1)[jnp.array([0, 2])])
    np.testing.assert_array_equal(draw(x, depth, first, 5, settings(3, 0.0)), jnp.argmax(x, -1))


def test_a_draw_depends_on_its_logits_seed_and_absolute_position_only():
    """The same node drawn inside any tree, batch and round is the same token."""
    rng = np.random.default_rng(0)
    batch, nodes, vocab = 3, 6, 20
    x = rng.standard_normal((batch, nodes, vocab)).astype(np.float32)
    depth = rng.integers(0, 4, (batch, nodes))
    first = np.array([5, 0, 17])
    s = settings(batch, [1.0, 0.7, 1.5], [0, 5, 0], [1.0, 1.0, 0.8], [3, 3, 99])
    drawn = np.asarray(draw(jnp.asarray(x), jnp.asarray(depth), jnp.asarray(first), 4, s))
    for b in range(batch):
        for n in range(nodes):
            row = jax.tree.map(lambda a, b=b: a[b : b + 1], s)
            position = jnp.array([first[b] + depth[b, n]])
            alone = draw(jnp.asarray(x[b : b + 1, n : n + 1]), jnp.zeros((1, 1), jnp.int32), position, 1, row)
            assert int(alone[0, 0]) == drawn[b, n]
    rows, order = np.array([2, 0, 1]), rng.permutation(nodes)
    moved = draw(
        jnp.asarray(x[rows][:, order]),
        jnp.asarray(depth[rows][:, order]),
        jnp.asarray(first[rows]),
        4,
        jax.tree.map(lambda a: a[rows], s),
    )
    np.testing.assert_array_equal(moved, drawn[rows][:, order])


def test_noise_differs_between_positions_and_between_seeds():
    noise = position_noise(jnp.arange(8, dtype=jnp.uint32), jnp.broadcast_to(jnp.arange(16), (8, 16)), 4)
    rows = np.asarray(noise).reshape(-1, 4)
    assert len(np.unique(rows, axis=0)) == len(rows)


def g_test(counts: np.ndarray, distribution: np.ndarray) -> float:
    """Returns the p-value that counts come from the distribution; cells expected below 5 are pooled."""
    counts, expected = counts.ravel(), distribution.ravel() * counts.sum()
    # No p-value: one such token refutes the distribution.
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    g = 2 * np.sum(counts * np.log(np.maximum(counts, 1e-300) / expected))
    return float(stats.chi2.sf(g, len(counts) - 1))


@pytest.mark.parametrize(("t", "k", "p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8), (0.5, 6, 0.9)])
def test_draws_follow_the_warped_softmax(t: float, k: int, p: float):
    trials, vocab = 100_000, 16
    x = np.random.default_rng(7).standard_normal(vocab).astype(np.float32) * 1.5
    s = settings(trials, t, k, p, np.arange(trials))

    def tokens(s: Sampling):
        rows = jnp.broadcast_to(jnp.asarray(x), (trials, 2, vocab))
        depth = jnp.broadcast_to(jnp.array([0, 1]), (trials, 2))
        return draw(rows, depth, jnp.full(trials, 11), 2, s)

    drawn = np.asarray(jax.jit(tokens)(s))
    distribution = np.asarray(
        jax.nn.softmax(warp_logits(jnp.asarray(x)[None, None], settings(1, t, k, p))[0, 0]), np.float64
    )
    pairs = np.bincount(drawn[:, 0] * vocab + drawn[:, 1], minlength=vocab**2)
    assert g_test(pairs, np.outer(distribution, distribution) / distribution.sum() ** 2) > ALPHA
    nearly = 0.96 * distribution / distribution.sum() + 0.04 / vocab
    assert g_test(np.bincount(drawn[:, 0], minlength=vocab), nearly) < ALPHA, "the test has no power"
