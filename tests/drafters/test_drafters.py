"""Every drafter under one contract: reading in pieces, trees, and unrolled training are one sequential drafting."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import BATCH, KINDS, LENGTH, STEPS, VOCAB, Toy, causal, same

from jaxspec.base import ROOT, UnrollInputs
from jaxspec.checkpoints.models import load_drafter, save_drafter
from jaxspec.drafters import DRAFTERS

toy = functools.cache(Toy)
every = pytest.mark.parametrize("kind", KINDS)
one_of_each = pytest.mark.parametrize(
    "kind", ("eagle norms", "fspad", "eagle3", "medusa", "parallelspec", "peagle", "draft_lm")
)
"""For claims that no option of a kind bears on."""


def test_the_table_names_no_drafter_that_is_not_tested():
    assert {type(d) for d in KINDS.values()} == {kind.module for kind in DRAFTERS.values()}
    assert {type(KINDS[kind]) for kind in one_of_each.args[1]} == {kind.module for kind in DRAFTERS.values()}


@every
def test_reading_in_chunks_whose_tails_are_garbage_is_reading_at_once(kind: str):
    """Each row takes its own count; what stands behind it is overwritten by the next read."""
    t = toy(kind)
    whole, logits = t.read(t.empty, 0, LENGTH)
    plan = [[1, 4, 0, 3, 1], [3, 0, 2, 0, 4]]
    state, at, last = t.empty, np.zeros(BATCH, int), jnp.zeros(())
    for counts in np.array(plan).T:
        tokens = np.full((BATCH, LENGTH), VOCAB - 1)
        features = np.full((BATCH, LENGTH, t.read_width), 7.0, np.float32)
        for b, n in enumerate(counts):
            tokens[b, :n] = t.tokens[b, at[b] + 1 : at[b] + 1 + n]
            features[b, :n] = t.features[b, at[b] : at[b] + n]
        state, last = t.extend(state, tokens, features, counts)
        at += counts
    assert (at == LENGTH).all()
    same(last, logits)
    ahead = t.tokens[:, LENGTH + 1 : LENGTH + STEPS]
    same(t.draft_chain(state, ahead), t.draft_chain(whole, ahead))


@one_of_each
def test_a_row_that_reads_nothing_keeps_its_state_and_its_logits(kind: str):
    t = toy(kind)
    before, logits = t.read(t.empty, 0, 5)
    garbage = np.zeros((BATCH, LENGTH), int), np.full((BATCH, LENGTH, t.read_width), 9.0, np.float32)
    after, again = t.extend(before, *garbage, np.array([0, 2]))
    same(again[0], logits[0])
    chain = t.tokens[:, 6:9]
    same(t.draft_chain(after, chain)[:, 0], t.draft_chain(before, chain)[:, 0])


@every
def test_unrolled_rows_are_sequential_drafting_from_every_anchor(kind: str):
    t = toy(kind)
    scores = t.unrolled_logits()
    for i in range(LENGTH):
        state, logits = t.read(t.empty, 0, i + 1)
        same(scores[0, :, i], logits)
        # Row i reads x_{i+j+1} at step j; the pass knows tokens up to x_L.
        steps = min(STEPS, LENGTH - i)
        if steps > 1:
            same(scores[1:steps, :, i], t.draft_chain(state, t.tokens[:, i + 2 : i + 1 + steps]))


@every
def test_a_trees_nodes_are_the_chains_of_their_paths(kind: str):
    t = toy(kind)
    state, _ = t.read(t.empty, 0, 6)
    token = np.random.default_rng(0).integers(0, VOCAB, (BATCH, 8))
    parent = np.array([ROOT, ROOT, 0, 0, 1, 2, 4, 4])
    levels, seen = [(0, 2), (2, 5), (5, 8)], np.eye(8, dtype=bool)
    for n in range(8):
        seen[n] |= seen[parent[n]] if parent[n] != ROOT else False
    scratch, logits = t.drafter.scratch(state, 8), []
    for d, (begin, end) in enumerate(levels, start=1):
        visible = np.broadcast_to(seen[begin:end, :end], (BATCH, end - begin, end))
        above = np.broadcast_to(parent[begin:end], (BATCH, end - begin))
        out, scratch = t.expand(state, scratch, token[:, begin:end], above, visible, depth=d, slot=begin)
        logits.append(out)
    logits = jnp.concatenate(logits, axis=1)
    for n in range(8):
        same(logits[:, n], t.draft_chain(state, jnp.asarray(token[:, np.flatnonzero(seen[n])]))[-1])


@one_of_each
def test_drafting_leaves_the_committed_state_alone(kind: str):
    t = toy(kind)
    state, _ = t.read(t.empty, 0, 6)
    t.draft_chain(state, t.tokens[:, :3])
    same(t.read(state, 6, LENGTH)[1], t.read(t.empty, 0, LENGTH)[1])


@one_of_each
def test_packed_documents_do_not_see_each_other(kind: str):
    t = toy(kind)
    rows = LENGTH + 1
    segments = np.array([[1] * 5 + [2] * (rows - 5)] * BATCH)
    mask = causal(rows) & (segments[:, :, None] == segments[:, None, :])
    positions = np.array([[*range(5), *range(rows - 5)]] * BATCH)
    packed = t.unrolled_logits(3, positions_BL=positions, mask_BLM=mask)
    second = UnrollInputs(
        t.tokens[:, 5:rows], t.features[:, 5:], *map(jnp.asarray, (positions[:, 5:], mask[:, 5:, 5:]))
    )
    alone = t.score(t.unroll(second, 3).hidden_TBLD)
    # The last rows of a document run into what stands behind it, which the loss mask drops.
    same(packed[:, :, 5 : rows - 3], alone[:, :, : rows - 8])


@one_of_each
def test_blocks_of_queries_change_nothing(kind: str):
    t = toy(kind)
    for by_row in (False, True):
        blocked = dataclasses.replace(t.drafter, query_block=4, row_by_row=by_row)
        run = jax.jit(lambda rows, head=blocked: head.unroll(t.params, t.shared_tables, rows, STEPS))
        same(t.score(run(t.rows).hidden_TBLD), t.unrolled_logits())


@every
def test_every_weight_learns(kind: str):
    t = toy(kind)

    def loss(params):
        out = t.drafter.unroll(params, t.shared_tables, t.rows, STEPS)
        logits = [t.drafter.logits(params, t.shared_tables, h, j) for j, h in enumerate(out.hidden_TBLD)]
        total = sum(jnp.sum(x[:, : LENGTH - STEPS] ** 2) for x in logits)
        return total if out.features_TBLD is None else total + jnp.sum(out.features_TBLD**2)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(t.params)):
        assert jnp.abs(gradient).max() > 1e-6, path


@pytest.mark.parametrize("kind", [k for k, d in KINDS.items() if getattr(d.config, "embedding_norm", False)])
def test_the_scale_of_normed_embeddings_is_nothing_to_the_head(kind: str):
    unroll = jax.jit(toy(kind).drafter.unroll, static_argnums=3)

    def hidden(scale: float) -> jax.Array:
        shared = toy(kind).shared_tables._replace(embed_VD=scale * toy(kind).shared_tables.embed_VD)
        return unroll(toy(kind).params, shared, toy(kind).rows, 1).hidden_TBLD

    same(hidden(50.0), hidden(1.0), 1e-4)


def test_an_own_embedding_begins_as_a_copy_of_the_targets():
    t = toy("peagle")
    for init in (t.drafter.init_params, jax.jit(t.drafter.init_params)):
        embed = init(jax.random.key(0), t.shared_tables)["embed"]
        np.testing.assert_array_equal(embed, t.shared_tables.embed_VD)
        # Training donates it, and goes on reading the target's.
        assert embed.unsafe_buffer_pointer() != t.shared_tables.embed_VD.unsafe_buffer_pointer()


@every
def test_a_checkpoint_brings_back_the_same_drafter(kind: str, tmp_path):
    t = toy(kind)
    name = next(name for name, found in DRAFTERS.items() if found.module is type(t.drafter))
    save_drafter(tmp_path / "drafter", name, t.drafter, t.params)
    found = load_drafter(tmp_path / "drafter")
    assert (found.name, found.module) == (name, t.drafter)
    jax.tree.map(np.testing.assert_array_equal, found.params, t.params)


@one_of_each
def test_bf16_drafts_finite_logits(kind: str):
    t = toy(kind)
    drafter = t.drafter.clone(dtype=jnp.bfloat16)
    params, tables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (t.params, t.shared_tables))

    @jax.jit
    def read(tokens, features):
        state = drafter.init_state(params, tables, tokens[:, 0], LENGTH + STEPS)
        return drafter.extend(params, tables, state, tokens[:, 1:], features, jnp.full(BATCH, LENGTH))[1]

    logits = read(t.tokens[:, : LENGTH + 1], t.features[:, :LENGTH].astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    same(logits, t.read(t.empty, 0, LENGTH)[1], 0.2)
