"""Profiles of rates alone: rates of rounds that were counted, and the texts that a search replays instead of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lab_toys import ROW, log_toys, rates_alone, ridge_cost

from jaxspec.evaluation.statistics import tau_interval
from jaxspec.lab.candidates import Limits
from jaxspec.lab.logged import with_texts
from jaxspec.lab.profile import load_profile, split_prompts
from jaxspec.lab.rates import measure_rates, rates_in_turn
from jaxspec.lab.reading import logged_tau, summarize, tables_of
from jaxspec.lab.replay import replay, tokens_of
from jaxspec.lab.search import Search
from jaxspec.trees import StaticTree

CHAIN = ((0,), (0, 0), (0, 0, 0))
SHARP = 0.995 * 0.5 ** np.arange(1, 17) / (1 - 0.5**16)
"""Sixteen ranks that leave a two-hundredth."""


@pytest.mark.parametrize("seed", range(20))
def test_rates_of_a_depth_sum_to_one_at_most_whatever_was_drawn(seed: int):
    counts = log_toys(np.tile(SHARP, (20, 8, 1)), rounds=60, seed=seed)
    rate_DK = measure_rates(rates_alone(counts)).rate_DK
    assert np.nansum(rate_DK, axis=1).max() <= 1 + 1e-12
    assert len(with_texts(rates_alone(counts), seed=seed).prompt_T) >= counts.tokens_P.sum()


def test_the_rates_are_those_of_the_rounds():
    truth = np.array([[0.5, 0.3, 0.1], [0.6, 0.1, 0.05], [0.4, 0.3, 0.2]])
    rates = measure_rates(rates_alone(log_toys(np.tile(truth, (100, 1, 1)), rounds=100, extra=9)))
    np.testing.assert_allclose(rates.rate_DK, truth, atol=0.02)
    assert ((rates.low_DK - 0.01 < truth) & (truth < rates.high_DK + 0.01)).all()


def test_rates_out_of_turns_by_hand():
    """Ten rounds; the second rank is missing below four of the five parents that the first one failed at."""
    np.testing.assert_allclose(rates_in_turn(np.array([5, 1, 0]), np.array([10, 2, 0]))[:2], [0.5, 0.25])
    assert np.isnan(rates_in_turn(np.array([5, 1, 0]), np.array([10, 2, 0]))[2])
    # For parents that all have all children it is the share.
    np.testing.assert_allclose(rates_in_turn(np.array([5, 1, 2]), np.array([10, 5, 4])), [0.5, 0.1, 0.2])


def test_texts_have_the_prompts_and_lengths_of_the_answers():
    counts = log_toys(np.tile(ROW[:3], (6, 3, 1)), rounds=30)
    profile = rates_alone(counts, sources=["a", "b"] * 3)
    drawn = with_texts(profile)
    assert drawn.sources == profile.sources and drawn.facts["simulated_texts"]
    share = tokens_of(drawn) / counts.tokens_P
    assert share.min() == share.max() == int(share[0])


def test_a_prompts_texts_are_of_its_own_rounds():
    easy, hard = np.full((3, 1), 0.9), np.full((3, 1), 0.1)
    profile = rates_alone(log_toys(np.array([easy, hard] * 10), rounds=60))
    counts = replay(with_texts(profile), CHAIN)
    tau_P = counts.tokens_P / counts.calls_P
    assert tau_P[::2].min() > 2.5 and tau_P[1::2].max() < 1.5


def test_the_tree_that_was_decoded_is_replayed_to_its_own_tau():
    """Easy and hard prompts stay apart: pooled rates would have another tau."""
    kinds = np.array([np.full((3, 1), 0.9), np.full((3, 1), 0.3)] * 20)
    profile = rates_alone(log_toys(kinds, rounds=60))
    logged, drawn = logged_tau(profile), tau_interval(replay(with_texts(profile), CHAIN))
    assert drawn.value == pytest.approx(logged.value, rel=0.02)
    assert drawn.high - drawn.low == pytest.approx(logged.high - logged.low, rel=0.25)


def test_fewer_prompts_make_wider_intervals():
    """The texts are as many as the prompts: an interval is not over invented ones."""
    rng = np.random.default_rng(1)
    rates = rng.beta(4, 2, (64, 1, 1)) * np.ones((64, 3, 1))
    many, few = (
        tau_interval(replay(with_texts(rates_alone(log_toys(r, rounds=40))), CHAIN)) for r in (rates, rates[:8])
    )
    assert few.high - few.low > 1.8 * (many.high - many.low)


def test_a_tree_that_only_the_choosing_prompts_like_is_reported_for_what_it_is():
    profile = rates_alone(log_toys(np.zeros((8, 3, 1)), rounds=40))
    choosing, reporting = split_prompts(profile, 3)
    rates = np.zeros((8, 3, 1))
    rates[choosing] = 0.95
    search = Search(with_texts(rates_alone(log_toys(rates, rounds=40)), seed=3), [ridge_cost(240, 1)], Limits(), seed=3)
    found = search.choose(ridge_cost(240, 1))
    assert search.candidates.tau_S[found.index] > 2 and found.plain.tau.value == 1
    assert search.rate(StaticTree(CHAIN), ridge_cost(240, 1)).tau.value == 1 and len(search.reporting.sources) == len(
        reporting
    )


def test_counts_are_kept_in_the_file_and_sources_are_told_apart(tmp_path: Path):
    rates = np.array([np.full((2, 2), 0.45), np.full((2, 2), 0.1)] * 3)
    profile = rates_alone(log_toys(rates, rounds=40), sources=["easy", "hard"] * 3, temperature=1.0, logged_tree="t")
    summarize(profile).save(tmp_path / "p.npz")
    again = load_profile(tmp_path / "p.npz")
    assert again.counts is not None and profile.counts is not None
    for ours, theirs in zip(again.counts, profile.counts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    easy, hard = (again.facts["by_source"][name] for name in ("easy", "hard"))
    assert easy["acceptance"][0][0] > 2 * hard["acceptance"][0][0] and easy["tau_logged"][0] > hard["tau_logged"][0]
    assert [table[0] for table in tables_of(again, "p")] == [
        "p: swor, recursive-rejection, temperature 1",
        "tokens a call",
        "by source",
    ]
    np.testing.assert_array_equal(again.of(np.array([3, 0])).counts.calls_P, profile.counts.calls_P[[3, 0]])  # type: ignore[union-attr]


def test_a_profile_without_counts_is_refused_in_a_sentence(tmp_path: Path):
    counts = log_toys(np.full((4, 2, 2), 0.3), rounds=20)
    profile = rates_alone(counts)
    dataclasses.replace(profile, counts=None).save(tmp_path / "old.npz")
    old = load_profile(tmp_path / "old.npz")
    assert np.isfinite(measure_rates(old).rate_DK).all()
    with pytest.raises(ValueError, match=r"without the counts of each prompt.* make it anew"):
        with_texts(old)
    with pytest.raises(ValueError, match="of one prompt"):
        with_texts(profile.of(np.array([1])))
    with pytest.raises(ValueError, match="counts rounds of other prompts"):
        dataclasses.replace(profile, sources=("a",))
