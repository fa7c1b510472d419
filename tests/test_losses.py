"""Every loss equals its equation, has its closed-form gradient in float64, and stays finite at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.losses import FEATURE_LOSSES, LOGIT_LOSSES, agreement, expected_acceptance, smooth_l1, soft_cross_entropy


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 7)) * 2, rng.normal(size=(5, 7)) * 2


def test_smooth_l1_is_quadratic_below_one_and_linear_above():
    draft = jnp.asarray([[0.5, -3.0, 0.0, 1.0]])
    assert float(smooth_l1(draft, jnp.zeros((1, 4)))[0]) == pytest.approx((0.125 + 2.5 + 0.0 + 0.5) / 4)


def test_soft_cross_entropy_is_kl_plus_the_targets_entropy(logits):
    q, p = logits
    wanted = -(softmax(p) * np.log(softmax(q))).sum(-1)
    np.testing.assert_allclose(soft_cross_entropy(jnp.asarray(q), jnp.asarray(p)), wanted, rtol=1e-5)


def test_soft_cross_entropy_has_gradient_q_minus_p(logits):
    q, p = logits
    gradient = jax.grad(lambda x: jnp.sum(soft_cross_entropy(x, jnp.asarray(p))))(jnp.asarray(q))
    np.testing.assert_allclose(gradient, softmax(q) - softmax(p), atol=1e-6)


def test_smooth_l1_has_the_clipped_difference_as_gradient():
    rng = np.random.default_rng(1)
    draft, target = rng.normal(size=(4, 6)) * 2, rng.normal(size=(4, 6))
    gradient = jax.grad(lambda x: jnp.sum(smooth_l1(x, jnp.asarray(target))))(jnp.asarray(draft))
    np.testing.assert_allclose(gradient, np.clip(draft - target, -1, 1) / 6, atol=1e-6)


def test_expected_acceptance_is_one_minus_total_variation(logits):
    q, p = logits
    wanted = 1 - np.abs(softmax(p) - softmax(q)).sum(-1) / 2
    np.testing.assert_allclose(expected_acceptance(jnp.asarray(q), jnp.asarray(p)), wanted, rtol=1e-5)


def test_agreement_compares_argmaxes():
    assert agreement(jnp.asarray([[1.0, 2.0], [3.0, 1.0]]), jnp.asarray([[0.0, 9.0], [0.0, 1.0]])).tolist() == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
@pytest.mark.parametrize("case", ["p zero", "q zero", "equal"])
def test_logit_losses_and_gradients_are_finite_where_a_probability_is_zero(name: str, case: str):
    sharp, flat = jnp.asarray([[0.0, -1e4, -1e4]]), jnp.asarray([[0.0, 1.0, 2.0]])
    q, p = {"p zero": (flat, sharp), "q zero": (sharp, flat), "equal": (sharp, sharp)}[case]
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(LOGIT_LOSSES[name](x, p)))(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted({**FEATURE_LOSSES, **LOGIT_LOSSES}))
def test_losses_are_fp32_for_bf16_inputs(name: str):
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    loss = {**FEATURE_LOSSES, **LOGIT_LOSSES}[name](x, x)
    assert loss.dtype == jnp.float32 and loss.shape == (2, 3)
