"""The EAGLE head: chunked reading, trees, and the unrolled training pass all are one literal sequential drafting."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import ROOT, Array, Borrowed, Frontier
from jaxspec.drafters.eagle import Eagle, EagleConfig, EagleState

WIDTH, VOCAB, LENGTH, BATCH, STEPS = 16, 13, 9, 2, 4
CAPACITY = 24

HEADS = {
    "multi-head": EagleConfig(WIDTH, 4, 4, 6, 20),
    "grouped": EagleConfig(WIDTH, 4, 2, 6, 20, rope_theta=100.0),
    "one key head": EagleConfig(WIDTH, 3, 1, 4, 20, bias=False),
    "norms": EagleConfig(WIDTH, 4, 2, 4, 20, bias=False, embedding_norm=True, head_norm=True),
}


class Toy:
    """One head with random weights, tables, tokens `x_0 .. x_L+T` and target features `f_0 .. f_L-1`."""

    def __init__(self, config: EagleConfig):
        self.eagle = Eagle(config)
        keys = jax.random.split(jax.random.key(3), 6)
        params = self.eagle.init_params(keys[0])
        noise = {n: jax.random.normal(keys[1], w.shape) for n, w in params.items()}
        self.params = {n: 2 * w if w.ndim > 1 else w + 0.3 * noise[n] for n, w in params.items()}
        self.borrowed = Borrowed(*(jax.random.normal(k, (VOCAB, WIDTH)) for k in keys[2:4]))
        self.tokens = jax.random.randint(keys[4], (BATCH, LENGTH + STEPS + 1), 0, VOCAB)
        self.features = jax.random.normal(keys[5], (BATCH, LENGTH, WIDTH))
        self.empty = self.eagle.init_state(BATCH, CAPACITY)
        self.extend = jax.jit(lambda *a: self.eagle.extend(self.params, self.borrowed, *a))
        self.expand = jax.jit(self._expand, static_argnames=("depth", "slot"))
        self.unroll = jax.jit(lambda *a: self.eagle.unroll(self.params, self.borrowed, *a), static_argnums=4)

    def _expand(self, state, scratch, token, parent, visible, depth, slot):
        frontier = Frontier(token, parent, visible, depth, slot)
        return self.eagle.expand(self.params, self.borrowed, state, scratch, frontier)

    def read(self, state: EagleState, begin: int, end: int) -> tuple[EagleState, Array]:
        """The state after the pairs `begin .. end - 1`; what stands behind them in the call is garbage."""
        tokens = np.full((BATCH, LENGTH), VOCAB - 1)
        features = np.full((BATCH, LENGTH, WIDTH), 7.0, np.float32)
        tokens[:, : end - begin] = self.tokens[:, begin + 1 : end + 1]
        features[:, : end - begin] = self.features[:, begin:end]
        return self.extend(state, tokens, features, np.full(BATCH, end - begin))

    def draft_chain(self, state: EagleState, tokens_BT: Array) -> tuple[Array, Array]:
        """Logits and outputs `[T, B, .]` of a chain of given tokens, one `expand` each."""
        steps = tokens_BT.shape[1]
        scratch, logits = self.eagle.scratch(state, STEPS - 1), []
        for t in range(steps):
            parent = jnp.full((BATCH, 1), t - 1)
            visible = jnp.ones((BATCH, 1, t + 1), bool)
            step, scratch = self.expand(state, scratch, tokens_BT[:, t : t + 1], parent, visible, depth=t + 1, slot=t)
            logits.append(step[:, 0])
        return jnp.stack(logits), jnp.moveaxis(scratch.hidden_BMD[:, :steps], 1, 0)


toy = functools.cache(lambda name: Toy(HEADS[name]))
every_head = pytest.mark.parametrize("name", HEADS)
MASK = np.tril(np.ones((1, LENGTH, LENGTH), bool))


def same(x, y, tolerance=1e-5):
    """Equal to fp32 rounding, measured by the array's greatest entry."""
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))


def unroll(t: Toy, steps: int, positions=None) -> Array:
    nexts = t.tokens[:, 1 : LENGTH + 1]
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)) if positions is None else positions
    return t.unroll(nexts, t.features, positions, MASK, steps)


@every_head
def test_reading_in_chunks_is_reading_at_once(name: str):
    t = toy(name)
    whole, logits = t.read(t.empty, 0, LENGTH)
    state, last = t.empty, None
    for begin, end in [(0, 1), (1, 4), (4, 8), (8, LENGTH)]:
        state, last = t.read(state, begin, end)
    same(last, logits)
    same(state.hidden_BD, whole.hidden_BD)
    np.testing.assert_array_equal(state.length_B, whole.length_B)
    same(state.cache.k_YBKCS[..., :LENGTH], whole.cache.k_YBKCS[..., :LENGTH])
    same(state.cache.v_YBKSC[..., :LENGTH, :], whole.cache.v_YBKSC[..., :LENGTH, :])


@every_head
def test_reading_in_chunks_whose_tails_are_garbage_is_reading_at_once(name: str):
    """Each row takes its own count; what stands behind it is overwritten by the next read."""
    t = toy(name)
    whole, logits = t.read(t.empty, 0, LENGTH)
    plan, width = [[1, 4, 0, 3, 1], [3, 0, 2, 0, 4]], LENGTH
    state, at, last = t.empty, np.zeros(BATCH, int), jnp.zeros(())
    for counts in np.array(plan).T:
        tokens = np.full((BATCH, width), VOCAB - 1)
        features = np.full((BATCH, width, WIDTH), 7.0, np.float32)
        for b, n in enumerate(counts):
            tokens[b, :n] = t.tokens[b, at[b] + 1 : at[b] + 1 + n]
            features[b, :n] = t.features[b, at[b] : at[b] + n]
        state, last = t.extend(state, tokens, features, counts)
        at += counts
    assert (at == LENGTH).all()
    same(last, logits)
    same(state.hidden_BD, whole.hidden_BD)
    same(state.cache.k_YBKCS[..., :LENGTH], whole.cache.k_YBKCS[..., :LENGTH])


def test_a_row_that_reads_nothing_keeps_its_state():
    t = toy("grouped")
    before, logits = t.read(t.empty, 0, 5)
    garbage = np.zeros((BATCH, LENGTH), int), np.full((BATCH, LENGTH, WIDTH), 9.0, np.float32)
    after, again = t.extend(before, *garbage, np.array([0, 2]))
    assert after.length_B.tolist() == [5, 7]
    np.testing.assert_array_equal(after.hidden_BD[0], before.hidden_BD[0])
    np.testing.assert_array_equal(after.cache.k_YBKCS[:, 0, ..., :5], before.cache.k_YBKCS[:, 0, ..., :5])
    same(again[0], logits[0])
    resumed, _ = t.read(after._replace(length_B=jnp.array([5, 5])), 5, LENGTH)
    same(resumed.hidden_BD, t.read(t.empty, 0, LENGTH)[0].hidden_BD)


@every_head
def test_unrolled_rows_are_sequential_drafting_from_every_anchor(name: str):
    t = toy(name)
    outputs = unroll(t, STEPS)
    scores = t.eagle.logits(t.params, t.borrowed, outputs.reshape(-1, LENGTH, WIDTH)).reshape(STEPS, BATCH, LENGTH, -1)
    for i in range(LENGTH):
        state, logits = t.read(t.empty, 0, i + 1)
        same(outputs[0, :, i], state.hidden_BD)
        same(scores[0, :, i], logits)
        # Row i reads x_{i+j+1} at step j; the pass knows tokens up to x_L.
        steps = min(STEPS, LENGTH - i)
        if steps > 1:
            logits, hidden = t.draft_chain(state, t.tokens[:, i + 2 : i + 1 + steps])
            same(outputs[1:steps, :, i], hidden)
            same(scores[1:steps, :, i], logits)


@every_head
def test_a_trees_nodes_are_the_chains_of_their_paths(name: str):
    t = toy(name)
    state, _ = t.read(t.empty, 0, 6)
    rng = np.random.default_rng(0)
    token = rng.integers(0, VOCAB, (BATCH, 8))
    parent = np.array([ROOT, ROOT, 0, 0, 1, 2, 4, 4])
    levels, seen = [(0, 2), (2, 5), (5, 8)], np.eye(8, dtype=bool)
    for n in range(8):
        seen[n] |= seen[parent[n]] if parent[n] != ROOT else False
    scratch, logits = t.eagle.scratch(state, 8), []
    for d, (begin, end) in enumerate(levels, start=1):
        visible = np.broadcast_to(seen[begin:end, :end], (BATCH, end - begin, end))
        above = np.broadcast_to(parent[begin:end], (BATCH, end - begin))
        out, scratch = t.expand(state, scratch, token[:, begin:end], above, visible, depth=d, slot=begin)
        logits.append(out)
    logits = jnp.concatenate(logits, axis=1)
    for n in range(8):
        path = np.flatnonzero(seen[n])
        chain_logits, hidden = t.draft_chain(state, jnp.asarray(token[:, path]))
        same(logits[:, n], chain_logits[-1])
        same(scratch.hidden_BMD[:, n], hidden[-1])


def test_expansion_leaves_the_committed_state_alone():
    t = toy("grouped")
    state, _ = t.read(t.empty, 0, 6)
    t.draft_chain(state, t.tokens[:, :3])
    whole, _ = t.read(state, 6, LENGTH)
    same(whole.hidden_BD, t.read(t.empty, 0, LENGTH)[0].hidden_BD)


def test_the_first_tokens_embedding_is_never_read():
    """The pair of feature `f_t` carries token `x_{t+1}`, so nothing carries `x_0`."""
    t = toy("grouped")
    tokens = jnp.where(t.tokens == 0, 1, t.tokens).at[:, 0].set(0)
    poisoned = Borrowed(t.borrowed.embed_VD.at[0].set(jnp.nan), t.borrowed.head_VD)
    read = jax.jit(lambda *a: t.eagle.extend(t.params, poisoned, t.empty, *a))
    state, logits = read(tokens[:, 1 : LENGTH + 1], t.features, jnp.full(BATCH, LENGTH))
    assert jnp.isfinite(logits).all() and jnp.isfinite(state.hidden_BD).all()


def test_a_pair_has_the_position_of_its_feature_and_drafts_follow_on():
    """Positions are relative: shifting all of them changes nothing, shifting the drafts alone does."""
    t = toy("multi-head")
    moved = unroll(t, STEPS, jnp.broadcast_to(jnp.arange(LENGTH) + 11, (BATCH, LENGTH)))
    same(moved, unroll(t, STEPS), 3e-5)
    state, _ = t.read(t.empty, 0, 4)
    key = state.cache.k_YBKCS[0, :, :, :, 3]
    fused = t.eagle.apply(
        {"params": t.params}, t.borrowed.embed_VD[t.tokens[:, 4:5]], t.features[:, 3:4], method="fuse"
    )
    for position, equal in ((3, True), (4, False)):
        at = jnp.full((BATCH, 1), position)
        k: Any = t.eagle.apply({"params": t.params}, fused, at, method="project")[1]
        assert bool(jnp.allclose(k[..., 0], key, atol=1e-5)) == equal


def test_packed_documents_do_not_see_each_other():
    t = toy("grouped")
    segments = np.array([[1] * 5 + [2] * 4] * BATCH)
    mask = jnp.asarray(MASK & (segments[:, :, None] == segments[:, None, :]))
    positions = jnp.asarray(np.array([[*range(5), *range(4)]] * BATCH))
    nexts = t.tokens[:, 1 : LENGTH + 1]
    packed = t.unroll(nexts, t.features, positions, np.asarray(mask), 3)
    alone = t.unroll(nexts[:, 5:], t.features[:, 5:], positions[:, 5:], MASK[:, :4, :4], 3)
    same(packed[:, :, 5:], alone)


def test_blocks_of_queries_change_nothing():
    t = toy("grouped")
    for by_row in (False, True):
        blocked = dataclasses.replace(t.eagle, query_block=4, row_by_row=by_row)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
        run = jax.jit(lambda *a, head=blocked: head.unroll(t.params, t.borrowed, *a, STEPS))
        same(run(t.tokens[:, 1 : LENGTH + 1], t.features, positions, MASK), unroll(t, STEPS))


def test_features_handed_from_step_to_step_carry_no_gradient():
    """Steps are given the previous outputs as constants: the whole gradient is the one at fixed inputs."""
    t = toy("grouped")
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    nexts, mask = t.tokens[:, 1 : LENGTH + 1], jnp.asarray(MASK)

    def last_step(features: Array, steps: int) -> Array:
        return jnp.sum(t.eagle.unroll(t.params, t.borrowed, nexts, features, positions, mask, steps)[-1] ** 2)

    one = jax.jit(jax.grad(last_step), static_argnums=1)
    assert jnp.abs(one(t.features, 1)).max() > 0
    # At step 1 the target's features act through the causal keys and values of step 0 only. The last row's own
    # diagonal key of step 0 is among them, the feature it was handed is not.
    direct = one(t.features, 2)
    assert jnp.abs(direct).max() > 0

    def by_hand(features: Array, handed: Array) -> Array:
        """Step 1 with the handed features as an argument."""
        w = {"params": t.params}
        apply = functools.partial(t.eagle.apply, w)
        project = lambda x, p: apply(x, p, method="project")  # noqa: E731
        fused0 = apply(t.borrowed.embed_VD[nexts], features, method="fuse")
        _, k0, v0 = project(fused0, positions)  # type: ignore[misc]
        token = jnp.pad(nexts[:, 1:], ((0, 0), (0, 1)))
        fused = apply(t.borrowed.embed_VD[token], handed, method="fuse")
        q, k, v = project(fused, positions + 1)  # type: ignore[misc]
        mixed = apply(q, k, v, mask, [k0], [v0], method="_attend_row")
        return jnp.sum(apply(fused, mixed, method="finish") ** 2)  # type: ignore[operator]

    handed = unroll(t, 1)[0]
    value, (want, through) = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)))(t.features, handed)
    same(value, jax.jit(last_step, static_argnums=1)(t.features, 2), 1e-4)
    same(direct, want, 1e-4)
    assert jnp.abs(through).max() > 0


def test_every_weight_learns_at_every_step():
    t = toy("norms")
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    probe = jax.random.normal(jax.random.key(0), (VOCAB,))

    def loss(params, step: int) -> Array:
        out = t.eagle.unroll(
            params, t.borrowed, t.tokens[:, 1 : LENGTH + 1], t.features, positions, jnp.asarray(MASK), STEPS
        )
        return jnp.sum(t.eagle.logits(params, t.borrowed, out[step])[:, : LENGTH - STEPS] @ probe)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for step in (0, STEPS - 1):
        g = grad(t.params, step)
        assert all(jnp.abs(x).max() > 1e-6 for x in g.values()), step
        parts = np.asarray(jnp.abs(g["qkv"]).max(axis=(0, 1, 3)))
        assert (parts > 1e-6).all(), "queries, keys and values all learn"


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="kv_heads=3"):
        EagleConfig(16, 4, 3, 4, 20)
