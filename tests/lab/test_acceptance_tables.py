"""Tests of the rates by depth and rank that are estimated from profiles."""

import dataclasses

import numpy as np
import pytest

from jaxspec.lab.acceptance import AcceptanceTable, acceptance_table, pool_violators, product_gap
from jaxspec.lab.profile import MISSED, Profile
from jaxspec.lab.simulate import join, simulate

RATES = np.array([[0.6, 0.2, 0.1], [0.5, 0.2, 0.05]])


def test_the_rates_of_a_long_profile_are_those_it_was_drawn_from():
    table = acceptance_table(simulate(RATES, prompts=100, tokens=301))
    assert table.rate_DK == pytest.approx(RATES, abs=0.01)
    assert table.second_KK is None


def test_without_a_prior_a_rate_is_the_share_of_the_starts_whose_text_is_long_enough():
    profile = simulate(RATES, prompts=7, tokens=9, seed=3)
    table = acceptance_table(profile, strength=0, monotone=False)
    for depth in range(2):
        long_enough = np.tile(np.arange(8, 0, -1), 7) > depth
        for rank in range(3):
            share = np.mean(profile.rank_TD[long_enough, depth] == rank)
            assert table.rate_DK[depth, rank] == pytest.approx(share)


def test_a_depth_that_no_text_reaches_has_the_rates_of_all_depths():
    profile = simulate(np.tile(RATES[0], (3, 1)), prompts=400, tokens=2)
    table = acceptance_table(profile, monotone=False)
    assert table.rate_DK[2] == pytest.approx(acceptance_table(profile, strength=0, monotone=False).rate_DK[0])
    assert np.all(acceptance_table(profile, strength=0).rate_DK[2] == 0)


def test_given_that_the_path_is_kept_survivors_are_easier():
    mixed = join([simulate(np.full((3, 1), a), prompts=100, tokens=200, seed=i) for i, a in enumerate((0.9, 0.5))])
    text = acceptance_table(mixed).rate_DK[:, 0]
    kept = acceptance_table(mixed, given="kept").rate_DK[:, 0]
    assert text == pytest.approx([0.7] * 3, abs=0.02)
    assert kept == pytest.approx([(0.9 ** (i + 1) + 0.5 ** (i + 1)) / (0.9**i + 0.5**i) for i in range(3)], abs=0.02)


def test_starts_that_are_given_are_counted_alone():
    profile = join([simulate([[1.0]], prompts=1, tokens=50), simulate([[0.0]], prompts=1, tokens=50)])
    assert acceptance_table(profile, starts=np.arange(49), strength=0).rate_DK[0, 0] == 1


def test_pooling_makes_rates_fall_keeps_their_sum_and_leaves_falling_ones():
    assert pool_violators(np.array([0.3, 0.05, 0.6])) == pytest.approx([0.95 / 3] * 3)
    assert pool_violators(np.array([0.5, 0.1, 0.2, 0.05])) == pytest.approx([0.5, 0.15, 0.15, 0.05])
    rng = np.random.default_rng(0)
    for _ in range(20):
        rate_K = rng.random(7)
        pooled_K = pool_violators(rate_K)
        assert np.all(np.diff(pooled_K) <= 1e-12)
        assert pooled_K.sum() == pytest.approx(rate_K.sum())
        assert pool_violators(pooled_K) == pytest.approx(pooled_K)


def test_pooling_is_the_nearest_order_in_the_mean_of_squares():
    grid = np.linspace(0, 1, 21)
    rate_K = np.array([0.2, 0.55, 0.4])
    best = min(
        ((a, b, c) for a in grid for b in grid for c in grid if a >= b >= c),
        key=lambda x: float(np.sum((np.array(x) - rate_K) ** 2)),
    )
    assert pool_violators(rate_K) == pytest.approx(best, abs=0.05)


def of_course() -> Profile:
    """Returns a one-pass drafter's profile: two openings, each with a second word of its own."""
    profile = simulate(np.tile([0.5, 0.5], (2, 1)), prompts=200, tokens=101, facts={"one_pass": True})
    rank_TD, rng = profile.rank_TD.copy(), np.random.default_rng(0)
    known = rank_TD[:, 1] >= 0
    rank_TD[known, 1] = np.where(rng.random(known.sum()) < 0.9, rank_TD[known, 0], 1 - rank_TD[known, 0])
    return dataclasses.replace(profile, rank_TD=rank_TD)


def test_a_one_pass_drafters_second_depth_is_fitted_by_the_parents_rank():
    profile = of_course()
    table = acceptance_table(profile, monotone=False)
    assert table.second_KK == pytest.approx(np.array([[0.9, 0.1], [0.1, 0.9]]), abs=0.02)
    assert acceptance_table(profile, by_parent=False).second_KK is None
    # Marginals give each of the four pairs 1/4; two have 0.45 and two 0.05.
    assert product_gap(profile) == pytest.approx(0.4, abs=0.02)
    assert product_gap(simulate(np.tile([0.5, 0.3], (2, 1)), prompts=300)) < 0.03
    assert np.isnan(product_gap(simulate([[0.5]])))


def test_a_missed_token_counts_in_no_cell():
    profile = simulate([[0.0, 0.0]], prompts=3, tokens=5)
    assert np.all(profile.rank_TD == MISSED)
    assert np.all(acceptance_table(profile).rate_DK == 0)


def test_scaled_rates_stay_probabilities():
    table = AcceptanceTable(np.array([[0.9, 0.08], [0.3, 0.1], [0.0, 0.0]]), np.array([[0.5, 0.5], [0.2, 0.1]]))
    more = table.scaled(1.1)
    assert more.rate_DK[0] == pytest.approx(np.array([0.9, 0.08]) / 0.98)
    assert more.rate_DK[1] == pytest.approx([0.33, 0.11])
    assert more.second_KK is not None and more.second_KK[0] == pytest.approx([0.5, 0.5])
    assert table.scaled(0.9).rate_DK[0] == pytest.approx([0.81, 0.072])
    assert table.cut(2, 1).rate_DK.shape == (2, 1) and table.cut(1).second_KK is None
