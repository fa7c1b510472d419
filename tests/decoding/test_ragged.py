"""Ragged verification: nodes of all rows in one axis give what the same nodes give row by row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rounds import batches, pair

from jaxspec.decoding.generation import NO_LIMIT, run_rounds, start
from jaxspec.nn.options import Options
from jaxspec.nn.ragged import pack, ragged_of, unpack
from jaxspec.targets.decoder import Decoder, DecoderConfig
from jaxspec.verify import RULES

CONFIG = DecoderConfig(
    24, 16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=24, family="toy", options=Options(windows=(4, None))
)


def test_what_is_packed_is_unpacked():
    there_BN = jnp.asarray([[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    x_BN = jnp.arange(12).reshape(3, 4)
    ragged = ragged_of(there_BN, 9, jnp.zeros((3, 4, 4), bool))
    packed_1A = pack(ragged, x_BN)
    assert packed_1A[0, :7].tolist() == [0, 2, 4, 5, 6, 7, 8]
    back = np.asarray(unpack(ragged, packed_1A[0]))
    np.testing.assert_array_equal(back[np.asarray(there_BN)], np.asarray(x_BN)[np.asarray(there_BN)])


@pytest.mark.parametrize("stacked", [True, False])
def test_ragged_rows_give_the_features_keys_and_values_of_whole_rows(stacked: bool):
    """One layer with a window and one without; scanned and one by one."""
    target = Decoder(CONFIG, stacked=stacked)
    params = target.init_params(jax.random.key(0))
    rng = np.random.default_rng(1)
    prompt_BL, length_B = jnp.asarray(rng.integers(0, 24, (3, 8))), jnp.asarray([8, 3, 6])
    read = target.forward(
        params, prompt_BL, jnp.broadcast_to(jnp.arange(8), (3, 8)), jnp.tril(jnp.ones((1, 8, 8), bool)), keep_kv=True
    )
    cache = read.fresh
    assert cache is not None
    token_BN = jnp.asarray(rng.integers(0, 24, (3, 5)))
    there_BN = jnp.asarray([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    depth_BN = jnp.asarray([[0, 1, 1, 2, 2]] * 3)
    above = np.eye(5, dtype=bool) | np.asarray([[1, 0, 0, 0, 0]] * 5, bool)
    above[3, 1] = above[4, 2] = True
    mask_BNN = jnp.broadcast_to(jnp.asarray(above), (3, 5, 5))
    at_BN = length_B[:, None] + depth_BN
    whole = target.forward(params, token_BN, at_BN, mask_BNN, (cache, length_B), keep_kv=True)
    ragged = ragged_of(there_BN, 12, mask_BNN)
    some = target.forward(params, pack(ragged, token_BN), pack(ragged, at_BN), ragged, (cache, length_B), keep_kv=True)
    there = np.asarray(there_BN)
    assert some.fresh is not None and whole.fresh is not None and some.features_BLD.shape == (1, 12, 16)
    np.testing.assert_allclose(
        np.asarray(unpack(ragged, some.features_BLD[0]))[there], np.asarray(whole.features_BLD)[there], atol=1e-5
    )
    for a, b, nodes in ((some.fresh.k_YBKCS, whole.fresh.k_YBKCS, 4), (some.fresh.v_YBKSC, whole.fresh.v_YBKSC, 3)):
        ours, theirs = (np.moveaxis(np.asarray(x), (1, nodes), (0, 1))[there] for x in (a, b))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rounds_verify_ragged_budgets():
    """Otherwise the tests of the text show nothing: rows that accept differently share budgets below the largest."""
    engine, weights = pair("eagle", "ragged")
    requests = batches()["sampled"]
    state = run_rounds(engine, weights, start(engine, weights, requests), NO_LIMIT)
    assert state.policy is not None
    used_BX = np.asarray(state.policy.budgets_BX)
    assert used_BX[:, :2].sum() > 0.5 * used_BX.sum() and np.asarray(state.accepted_BP)[:, 1:].sum() > 0


def test_rules_that_need_the_logits_of_whole_rows_are_refused():
    engine, _ = pair("eagle", "ragged")
    with pytest.raises(ValueError, match="ragged adaptive tree is for the rule target-draw"):
        dataclasses.replace(engine, rule=RULES["recursive-rejection"])
