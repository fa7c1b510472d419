"""Acceptance by depth and rank, its intervals, tau by replay, and acceptance that is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from slow_replay import replay_paths

from jaxspec.evaluation.statistics import tau_interval
from jaxspec.lab.given import given_profile, read_rates
from jaxspec.lab.profile import BEYOND, MISSED, Profile, load_profile
from jaxspec.lab.rates import measure_rates, rates_of
from jaxspec.lab.reading import CHAINS, result_row, summarize, tables_of
from jaxspec.lab.simulate import simulate

RATES = np.array([[0.6, 0.2], [0.5, 0.25], [0.4, 0.3]])


def profile_of(ranks: list[list[list[int]]], sources: tuple[str, ...] | None = None) -> Profile:
    """A profile of prompts whose starts have these ranks."""
    rank_TD = np.array([row for rows in ranks for row in rows], np.int16)
    prompt_T = np.repeat(np.arange(len(ranks), dtype=np.int32), [len(rows) for rows in ranks])
    real = np.where(rank_TD == BEYOND, np.nan, -1.0)
    top_TDK = np.zeros((*rank_TD.shape, 2), np.float16)
    return Profile(prompt_T, rank_TD, real, top_TDK, real, sources or ("",) * len(ranks), {"ranks": 2})


def test_rates_by_hand():
    profile = profile_of([[[0, 1], [1, MISSED], [0, BEYOND]], [[MISSED, BEYOND]]])
    rates = measure_rates(profile)
    np.testing.assert_allclose(rates.rate_DK, [[0.5, 0.25], [0, 0.5]])
    np.testing.assert_array_equal(rates.tries_DK, [[4, 4], [2, 2]])
    assert (rates.low_DK <= rates.rate_DK).all() and (rates.rate_DK <= rates.high_DK).all()
    # The second prompt alone has no place of depth 2, and its resamples none either.
    assert rates.low_DK[0, 0] == 0 and rates.low_DK[1, 1] == rates.high_DK[1, 1] == 0.5


def test_what_was_never_tried_is_not_a_number():
    rates = rates_of(np.zeros((3, 2, 2)), np.array([[[4], [0]]] * 3))
    assert np.isnan(rates.rate_DK[1]).all() and np.isnan(rates.low_DK[1]).all() and (rates.rate_DK[0] == 0).all()


def test_intervals_resample_prompts_and_not_places():
    """Two kinds of prompts: the interval is as wide as few prompts make it, however long they are."""
    short, long = (
        profile_of([[[0, BEYOND]] * n if p % 2 else [[MISSED, BEYOND]] * n for p in range(10)]) for n in (2, 200)
    )
    for one in (short, long):
        rates = measure_rates(one)
        assert rates.low_DK[0, 0] <= 0.2 and rates.high_DK[0, 0] >= 0.8


def test_replay_by_hand():
    """Rounds at 0 (accepts rank 0, then 1), 3 (misses) and 4 (the text ends)."""
    text = [[0, 1, MISSED], [1, MISSED, 0], [0, 0, 0], [MISSED, 0, BEYOND], [0, BEYOND, BEYOND]]
    counts = replay_paths(profile_of([text, []]), [(0,), (0, 1), (0, 0)])
    assert counts.calls_P.tolist() == [3, 0] and counts.tokens_P.tolist() == [5, 0]
    assert counts.accepted_PA.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert replay_paths(profile_of([text]), []).calls_P.tolist() == [5]


def test_replay_of_drawn_ranks_reaches_the_sum_of_path_products():
    """The reach identity: tokens a round are the sum over the nodes of their paths' products."""
    profile = simulate(RATES, prompts=200, tokens=400, seed=3)
    tau = tau_interval(replay_paths(profile, [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1)]))
    assert tau.value == pytest.approx(1 + 0.6 + 0.2 + 0.3 + 0.15 + 0.1 + 0.09, abs=0.02)
    assert tau.low < tau.value < tau.high


def test_rates_are_those_of_the_simulation():
    rates = measure_rates(simulate(RATES, prompts=200, tokens=200))
    np.testing.assert_allclose(rates.rate_DK, RATES, atol=0.02)
    assert ((rates.low_DK - 0.01 < RATES) & (rates.high_DK + 0.01 > RATES)).all()


def test_rates_on_a_command_line(tmp_path: Path):
    given = read_rates("0.7,0.1,0.05;0.6")
    np.testing.assert_allclose(given.rates_DK, [[0.7, 0.1, 0.05], [0.6, 0, 0]])
    profile = summarize(given_profile(given, prompts=9, tokens=20, seed=1))
    row = result_row(tmp_path / "p.npz", profile)
    assert row["starts"] == 9 * 19 and row["prompts"] == 9 and row["kind"] == "simulated"
    assert set(row["tau"]) == {f"chain:{depth}" for depth in CHAINS}
    assert [len(table[2]) for table in tables_of(profile, "p")] == [2, len(CHAINS)]


def test_a_published_profile(tmp_path: Path):
    path = tmp_path / "published.json"
    about = {"name": "eagle-x", "source": "Table 3 of a paper", "temperature": 0, "one_pass": False}
    path.write_text(json.dumps({**about, "rates": [[0.8, 0.1], [0.7]]}))
    given = read_rates(str(path))
    profile = given_profile(given, prompts=3, tokens=9, seed=0)
    assert profile.facts["published"] == "Table 3 of a paper" and profile.facts["name"] == "eagle-x"
    profile.save(tmp_path / "p.npz")
    assert load_profile(tmp_path / "p.npz").facts["kind"] == "simulated"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.7;x", "give rates such as"),
        ("0.7,0.5", "sum to 1 at most"),
        ("0.7;", "give rates such as"),
        ("nowhere.json", "no such file"),
    ],
)
def test_rates_that_are_none_are_refused(text: str, told: str):
    with pytest.raises(ValueError, match=told):
        read_rates(text)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "no JSON object"),
        ({"name": "x", "rates": [[0.5]]}, "no field 'source'"),
        ({"name": "x", "source": "y", "rates": [[0.5]], "tau": 3}, "field 'tau' is not known"),
        ({"name": "x", "source": "y", "rates": [0.5]}, "must be a list, by depth"),
        ({"name": "x", "source": "y", "rates": [[0.5, 0.6]]}, "of depth 1 are"),
        ({"name": 3, "source": "y", "rates": [[0.5]]}, "of another type"),
    ],
)
def test_published_profiles_that_are_none_are_refused(tmp_path: Path, value: object, told: str):
    path = tmp_path / "given.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=told) as refused:
        read_rates(str(path))
    assert str(path) in str(refused.value)


def test_a_damaged_profile_is_refused(tmp_path: Path):
    path = tmp_path / "p.npz"
    simulate(RATES, prompts=3, tokens=9).save(path)
    whole = path.read_bytes()
    for cut in (b"", whole[:100], whole[: len(whole) // 2], whole[:-40], whole[:200] + b"?" * 60 + whole[260:]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="is no acceptance profile"):
            load_profile(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="is no acceptance profile"):
        load_profile(path)


def test_a_source_without_a_round_is_told_by_nulls(tmp_path: Path):
    """Its only answer has one token; the file is JSON that every reader reads."""
    profile = summarize(profile_of([[[0, BEYOND]], []], sources=("a", "b")))
    assert profile.facts["by_source"]["b"]["tau_chain_3"] == [None] * 3
    assert profile.facts["calibration"][0]["ece_after"] is None
    json.dumps(profile.facts, allow_nan=False)
    assert len(tables_of(profile, "p")) == 3 and result_row(tmp_path, profile)["starts"] == 1
