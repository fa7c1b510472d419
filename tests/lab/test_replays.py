"""Tests of replaying static trees on profiles, against a loop that walks token by token, and of simulated profiles."""

import dataclasses

import numpy as np
import pytest
from brute_shapes import random_rates, random_shape, slow_replay

from jaxspec.evaluation.statistics import tau_interval
from jaxspec.lab.forest import make_forest, shape_of
from jaxspec.lab.profile import BEYOND, MISSED, Profile, load_profile
from jaxspec.lab.replay import node_shares, replay, replay_calls, rounds_of, tokens_of
from jaxspec.lab.simulate import join, simulate

CHAIN_4 = shape_of((0,) * d for d in range(1, 5))


def ragged() -> Profile:
    """Returns prompts of several lengths, two of them without any start."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (5, 2), (1, 1), (2, 3), (1, 9), (3, 30)]
    return join([simulate(random_rates(rng, 4, 3), prompts=p, tokens=n, seed=i) for i, (p, n) in enumerate(lengths)])


def test_a_replay_is_the_walk_token_by_token_for_random_trees():
    profile, rng = ragged(), np.random.default_rng(1)
    shapes = [(), *(shape_of(random_shape(rng, int(rng.integers(2, 20)), 4, 3)) for _ in range(40))]
    calls_SP = replay_calls(profile, make_forest(shapes))
    for shape, calls_P in zip(shapes, calls_SP, strict=True):
        slow = slow_replay(profile, shape)
        counts = replay(profile, shape)
        assert calls_P.tolist() == [len(rounds) for _, rounds in slow]
        assert np.array_equal(counts.calls_P, calls_P)
        assert counts.tokens_P.tolist() == [tokens for tokens, _ in slow]
        for row_A, (_, rounds) in zip(counts.accepted_PA, slow, strict=True):
            assert row_A.tolist() == np.bincount(rounds, minlength=len(row_A)).tolist()


def test_plain_decoding_makes_a_call_a_token():
    profile = ragged()
    counts = replay(profile, ())
    assert np.array_equal(counts.calls_P, counts.tokens_P)
    assert np.array_equal(counts.tokens_P, np.bincount(profile.prompt_T, minlength=len(profile.sources)))


def test_a_round_accepts_nothing_behind_the_end_of_the_text():
    profile = simulate(np.ones((4, 1)), prompts=1, tokens=8)
    # 7 tokens by rounds of 5 and of what is left.
    assert replay(profile, CHAIN_4).calls_P.tolist() == [2]
    assert replay(profile, CHAIN_4).accepted_PA.tolist() == [[0, 0, 1, 0, 1]]
    assert replay(simulate(np.ones((4, 1)), prompts=1, tokens=2), CHAIN_4).accepted_PA.tolist() == [[0, 1, 0, 0, 0]]


def test_an_answer_of_one_token_takes_no_round():
    counts = replay(simulate(np.ones((4, 1)), prompts=3, tokens=1), CHAIN_4)
    assert counts.tokens_P.tolist() == counts.calls_P.tolist() == [0, 0, 0]


def test_tau_over_easy_and_hard_text_is_the_harmonic_mean_and_not_that_over_positions():
    easy, hard = (simulate(np.full((4, 1), a), prompts=150, tokens=401, seed=i) for i, a in enumerate((0.9, 0.5)))
    tau = tau_interval(replay(join([easy, hard]), CHAIN_4))
    assert tau.value == pytest.approx(2.63, abs=0.03)
    assert tau.low < 2.63 < tau.high


def test_tau_never_falls_with_more_nodes_of_one_order():
    profile = simulate(np.tile([0.5, 0.2, 0.1], (4, 1)), prompts=20, tokens=60)
    order = shape_of([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0)])
    calls_SP = replay_calls(profile, make_forest([shape_of(order[:n]) for n in range(len(order) + 1)]))
    # Calls of a text may rise with a node, as where rounds begin moves; over many texts they fall.
    assert np.all(np.diff(calls_SP.sum(1)) < 0)


def test_the_shares_of_nodes_sum_to_the_tokens_of_a_round():
    profile = simulate(np.tile([0.5, 0.2], (3, 1)), prompts=10, tokens=50)
    shape = shape_of([(0,), (1,), (0, 0), (0, 1)])
    shares = node_shares(profile, shape)
    at, accepted = rounds_of(profile, shape)
    assert shares[()] == 1 and sum(shares.values()) == pytest.approx(1 + accepted.mean())
    assert len(at) == replay(profile, shape).calls_P.sum()


def test_a_tree_beyond_the_profile_is_refused():
    profile = simulate(np.full((2, 2), 0.3))
    with pytest.raises(ValueError, match=r"3 deep .* 2 depths"):
        replay(profile, ((0,), (0, 0), (0, 0, 0)))
    with pytest.raises(ValueError, match=r"rank 2 .* ranks 0 to 1"):
        replay(profile, ((0,), (2,)))


def test_a_profile_of_a_rule_that_makes_the_text_depend_on_drafts_is_refused():
    profile = simulate(np.full((2, 2), 0.3), facts={"rule": "recursive-rejection"})
    replay(profile, ((0,),))  # drawn from rates of that rule
    profile = dataclasses.replace(profile, facts={**profile.facts, "kind": "ranks"})
    with pytest.raises(ValueError, match="recursive-rejection"):
        replay(profile, ((0,),))


def test_drawn_children_are_replayed_in_their_turn_alone():
    profile = simulate(np.full((2, 2), 0.3), facts={"mode": "swor"})
    replay(profile, ((0,), (1,)))
    with pytest.raises(ValueError, match="swor"):
        replay(profile, ((1,),))


def test_a_simulated_profile_has_the_rates_it_was_drawn_from(tmp_path):
    rate_DK = np.array([[0.6, 0.2, 0.0], [0.5, 0.1, 0.3]])
    profile = simulate(rate_DK, prompts=50, tokens=401)
    known_TD = profile.rank_TD != BEYOND
    for depth in range(2):
        ranks = profile.rank_TD[known_TD[:, depth], depth]
        shares = [np.mean(ranks == rank) for rank in (0, 1, 2, MISSED)]
        assert shares == pytest.approx([*rate_DK[depth], 1 - rate_DK[depth].sum()], abs=0.01)
    assert np.array_equal(np.isnan(profile.logp_TD), ~known_TD)
    assert np.array_equal(np.isnan(profile.entropy_TD), ~known_TD)
    assert np.array_equal(np.isnan(profile.top_TDK[..., 0]), ~known_TD)
    first = profile.rank_TD[:, 0] == 1
    assert np.exp(profile.logp_TD[first, 0]) == pytest.approx(0.2)
    profile.save(tmp_path / "a.npz")
    again = load_profile(tmp_path / "a.npz")
    assert np.array_equal(again.rank_TD, profile.rank_TD) and again.ranks == 3
    assert np.array_equal(tokens_of(again), np.full(50, 400))


@pytest.mark.parametrize("rates", [[[0.7, 0.4]], [[-0.1]], [[np.nan]], np.zeros((0, 2))])
def test_rates_that_are_no_probabilities_are_refused(rates):
    with pytest.raises(ValueError, match="rates"):
        simulate(rates)


def test_profiles_of_different_depths_are_not_joined():
    with pytest.raises(ValueError, match="alike"):
        join([simulate([[0.5]]), simulate([[0.5], [0.5]])])
    both = join([simulate([[0.5]], prompts=2, source="a"), simulate([[0.5]], prompts=1, source="b")])
    assert both.sources == ("a", "a", "b")
    assert dataclasses.replace(both).prompt_T.max() == 2
