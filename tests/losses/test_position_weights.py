"""Weights of draft steps: their masks, their gradients, and the equations of each weighting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.losses import divides_by_weights, position_weights
from jaxspec.losses.position import POSITION_WEIGHTS

STEPS = 4
WEIGHTS = ["none", "exp:2", "power:0.8", "cat", "d_pace:0.1"]


Gold = tuple[jax.Array, jax.Array]


@pytest.fixture
def gold() -> Gold:
    """The probability of the text's tokens under draft and target, `[T, N]`."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(STEPS, 3))), jnp.asarray(rng.uniform(size=(STEPS, 3)))


def test_every_weighting_of_the_table_is_tested():
    assert {spec.partition(":")[0] for spec in WEIGHTS} == set(POSITION_WEIGHTS)


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_are_fp32_without_gradient_and_zero_outside_the_mask(spec: str, gold: Gold):
    mask = jnp.arange(STEPS)[:, None] < jnp.array([4, 2, 0])
    w = position_weights(spec, *gold, mask)
    assert w.shape == (STEPS, 3) and w.dtype == jnp.float32 and ((np.asarray(w) > 0) == np.asarray(mask)).all()
    slopes = jax.grad(lambda *g: jnp.sum(position_weights(spec, *g)), (0, 1))(*gold)
    assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("spec", WEIGHTS)
def test_a_chain_that_ends_early_has_the_weights_of_the_shorter_chain(spec: str, gold: Gold):
    mask = jnp.broadcast_to(jnp.arange(STEPS)[:, None] < 2, (STEPS, 3))
    short = position_weights(spec, gold[0][:2], gold[1][:2])
    np.testing.assert_allclose(position_weights(spec, *gold, mask)[:2], short, rtol=1e-6)


@pytest.mark.parametrize("spec", ["cat", "d_pace:0.1"])
def test_steps_before_the_mask_stop_no_chain(spec: str, gold: Gold):
    mask = jnp.broadcast_to(jnp.arange(STEPS)[:, None] >= 1, (STEPS, 3))
    late = position_weights(spec, gold[0][1:], gold[1][1:])
    np.testing.assert_allclose(position_weights(spec, *gold, mask)[1:], late, rtol=1e-6)


def test_weights_of_the_step_alone_are_powers(gold: Gold):
    np.testing.assert_array_equal(position_weights("none", *gold), np.ones((STEPS, 3)))
    wanted = np.repeat(0.8 ** np.arange(STEPS)[:, None], 3, axis=1)
    np.testing.assert_allclose(position_weights("power:0.8", *gold), wanted, rtol=1e-6)
    np.testing.assert_allclose(position_weights(f"exp:{-1 / np.log(0.8)}", *gold), wanted, rtol=1e-6)


def test_cat_multiplies_the_targets_probabilities_of_the_text_before_the_slot():
    target = jnp.array([[0.5], [0.4], [0.1]])
    w = position_weights("cat", jnp.zeros((3, 1)), target)
    np.testing.assert_allclose(w[:, 0], [1.0, 0.5, 0.2], rtol=1e-6)


@pytest.mark.parametrize("a", [0.0, 0.3])
def test_d_pace_is_the_gradient_of_the_expected_accepted_length_by_log_probabilities(a: float, gold: Gold):
    with jax.enable_x64(True):
        draft = jnp.asarray(np.asarray(gold[0]), jnp.float64)
        # The expected length is `sum_j P(the first j + 1 drafts are kept)`.
        length = jax.grad(lambda log_s: jnp.sum(jnp.exp(jnp.cumsum(log_s, axis=0))))
        wanted = length(jnp.log((1 - a) * draft + a))
        np.testing.assert_allclose(position_weights(f"d_pace:{a}", draft, draft), wanted, rtol=1e-9)


def test_d_pace_at_one_counts_the_steps_still_to_come(gold: Gold):
    wanted = np.repeat(np.arange(STEPS, 0, -1.0)[:, None], 3, axis=1)
    np.testing.assert_allclose(position_weights("d_pace:1", *gold), wanted)


@pytest.mark.parametrize("spec", WEIGHTS)
def test_only_cat_divides_by_its_weights(spec: str):
    assert divides_by_weights(spec) == (spec == "cat")


@pytest.mark.parametrize("spec", ["linear", "exp", "exp:0", "power:1.1", "d_pace:2", "cat:1", "none:0"])
def test_a_spec_that_names_no_weighting_is_refused(spec: str):
    with pytest.raises(ValueError, match="position weight"):
        divides_by_weights(spec)
