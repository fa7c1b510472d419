"""Isotonic regression, calibration error, and the curves that a profile keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxspec.lab.calibration import calibrate, calibration_error, curves, isotonic, mean_error, pairs_of
from jaxspec.lab.profile import Profile, load_profile
from jaxspec.lab.reading import summarize
from jaxspec.lab.simulate import simulate

RATES = np.array([[0.6, 0.2, 0.05], [0.5, 0.2, 0.1]])


def best_monotone(hit_X: np.ndarray) -> float:
    """Least squared distance of a rising sequence, over all ways to cut it into blocks of one mean."""
    places, best = range(1, len(hit_X)), np.inf
    for count in range(len(hit_X)):
        for cuts in itertools.combinations(places, count):
            blocks = np.split(hit_X, cuts)
            means = [block.mean() for block in blocks]
            if all(a <= b for a, b in itertools.pairwise(means)):
                best = min(best, sum(((block - mean) ** 2).sum() for block, mean in zip(blocks, means, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_curve_is_the_nearest_that_does_not_fall(seed: int):
    rng = np.random.default_rng(seed)
    q_X, hit_X = np.sort(rng.random(9)), (rng.random(9) < 0.5).astype(float)
    curve = isotonic(q_X, hit_X)
    fitted = curve(q_X)
    assert (np.diff(fitted) >= -1e-12).all() and (np.diff(curve.q_X) > 0).all()
    assert ((fitted - hit_X) ** 2).sum() == pytest.approx(best_monotone(hit_X))


def test_equal_probabilities_share_one_value_and_the_ends_are_level():
    curve = isotonic(np.array([0.5, 0.1, 0.5, 0.1]), np.array([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(curve(np.array([0.0, 0.1, 0.5, 0.9])), [0, 0, 0.5, 0.5])
    with pytest.raises(ValueError, match="no pair"):
        isotonic(np.zeros(0), np.zeros(0))


def test_calibration_error_by_hand():
    """Two bins: mean .2 where a half hits, mean .8 where all hit."""
    q_X, hit_X = np.array([0.1, 0.3, 0.7, 0.9]), np.array([1.0, 0.0, 1.0, 1.0])
    assert calibration_error(q_X, hit_X, bins=2) == pytest.approx((0.3 + 0.2) / 2)
    assert calibration_error(hit_X, hit_X) == 0
    assert np.isnan(calibration_error(q_X[:0], hit_X[:0]))


def overconfident(profile: Profile) -> Profile:
    """The same draft, saying that its children are likelier than they are."""
    q_TDK = np.exp(profile.top_TDK.astype(np.float64)) ** 0.3
    top_TDK = np.log(q_TDK / q_TDK.sum(-1, keepdims=True)).astype(np.float16)
    return Profile(
        profile.prompt_T, profile.rank_TD, profile.logp_TD, top_TDK, profile.entropy_TD, profile.sources, profile.facts
    )


def test_a_calibrated_draft_has_a_small_error_and_an_overconfident_one_gets_one():
    profile = simulate(RATES, prompts=60, tokens=120)
    wrong = overconfident(profile)
    right, mended = calibrate(profile), calibrate(wrong)
    assert [row["depth"] for row in mended] == [1, 2]
    assert mean_error(right, "ece_before") < 0.02
    assert mean_error(mended, "ece_before") > 0.1 > 0.02 > mean_error(mended, "ece_after")
    for depth, curve in enumerate(curves({"calibration": mended}), 1):
        q_X, hit_X = pairs_of(wrong, depth)
        assert calibration_error(curve(q_X), hit_X) < 0.01
    assert mended[0]["entropy"]["mean"] == pytest.approx(float(profile.entropy_TD[0, 0]), rel=1e-3)


def test_one_prompt_has_no_held_out_half():
    row = calibrate(simulate(RATES, prompts=1, tokens=50))[0]
    assert np.isnan(row["ece_after"]) and row["pairs"] == 49 * 3


def test_the_summary_goes_to_a_file_and_back(tmp_path):
    profile = summarize(simulate(RATES, prompts=5, tokens=30))
    profile.save(tmp_path / "p.npz")
    again = load_profile(tmp_path / "p.npz")
    assert again.facts["calibration"] == profile.facts["calibration"]
    assert curves(again.facts)[0].q_X.tolist() == profile.facts["calibration"][0]["q"]
