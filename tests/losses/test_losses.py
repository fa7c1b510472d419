"""Every loss equals its equation, has its closed-form gradient in float64, and stays finite at the edges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_equations import (
    EQUATIONS,
    SPECS,
    TOKENS,
    VOCAB,
    TokenCase,
    case,
    combined,
    global_sigma,
    measured,
    numeric,
    own_sigma,
)

from jaxspec.losses import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    Scores,
    agreement,
    cross_entropy,
    expected_acceptance,
    jsd,
    kl,
    lk,
    logit_loss,
    neg_log_acceptance,
    smooth_l1,
    soft_cross_entropy,
    top_k_cross_entropy,
    tvd,
    tvdpp_exact_pos,
)
from jaxspec.losses.loss import LogitLoss
from jaxspec.losses.tvdpp import EPSILON, standardised


def test_every_loss_of_the_table_is_under_the_contract():
    assert {spec.partition(":")[0] for spec in SPECS} == set(LOGIT_LOSSES)


@pytest.mark.parametrize("restricted", [False, True], ids=["whole", "restricted"])
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradient_are_those_of_the_equation(spec: str, restricted: bool):
    with jax.enable_x64(True):
        c, loss = case(restricted), EQUATIONS[spec]
        value, gradient = measured(spec, c)
    assert gradient.dtype == np.float64
    assert value == pytest.approx(loss.equation(c, c.draft).mean(), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient, loss.gradient(c) / TOKENS, rtol=1e-9, atol=1e-9)
    differences = numeric(lambda x: loss.equation(c, x).mean(), c.draft)
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-7)


KEPT = np.array([True, False, True, True, False])


@pytest.mark.parametrize("spec", SPECS)
def test_masked_tokens_might_as_well_not_be_there(spec: str):
    with jax.enable_x64(True):
        c = case(restricted=True)
        value, gradient = measured(spec, c, KEPT)
    few, loss = c.only(KEPT), EQUATIONS[spec]
    assert value == pytest.approx(loss.equation(few, few.draft).mean(), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient[KEPT], loss.gradient(few) / KEPT.sum(), rtol=1e-9, atol=1e-9)
    assert not gradient[~KEPT].any()


@pytest.mark.parametrize("spec", SPECS)
def test_what_masked_tokens_hold_does_not_matter(spec: str):
    with jax.enable_x64(True):
        a, b = case(restricted=True), case(restricted=True, seed=1)
        draft, target = (np.where(KEPT[:, None], x, y) for x, y in ((a.draft, b.draft), (a.target, b.target)))
        mixed = dataclasses.replace(a, draft=draft, target=target)
        for got, wanted in zip(measured(spec, mixed, KEPT), measured(spec, a, KEPT), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("spec", SPECS)
def test_a_constant_added_to_the_logits_changes_nothing(spec: str):
    with jax.enable_x64(True):
        c = case(restricted=True)
        moved = dataclasses.replace(c, draft=c.draft + 3.0, target=c.target - 11.0)
        for got, wanted in zip(measured(spec, moved), measured(spec, c), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_no_token_is_no_loss(spec: str):
    with jax.enable_x64(True):
        value, gradient = measured(spec, case(restricted=True), np.zeros(TOKENS, bool))
    assert value == 0 and not gradient.any()


ROWS = np.array([[0, 1, 2], [0, -1e30, -1e30], [-1e30, 0, -1e30], [-1e4, 0, 1], [0, 1e30, 0], [-200, 0, -100]])
RESTS = np.array([0.0, -1e-9, -0.5, -1e30])  # all, nearly all, some and nothing of the target is elsewhere


@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradient_are_finite_where_probabilities_are_zero_or_equal(spec: str):
    draft, target, rest, _ = np.broadcast_arrays(
        ROWS[:, None, None], ROWS[:, None], RESTS[:, None], np.zeros((len(ROWS), len(ROWS), len(RESTS), 3))
    )
    draft, target = (x.reshape(-1, 3).astype(np.float32) for x in (draft, target))
    token = np.arange(len(draft)) % 4 - 1
    value, gradient = measured(spec, TokenCase(draft, target, token, rest[..., 0].reshape(-1).astype(np.float32)))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("spec", SPECS)
def test_parts_are_fp32_for_bf16_logits(spec: str):
    x = jax.ShapeDtypeStruct((2, 3, VOCAB), jnp.bfloat16)
    token, key = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    parts = jax.eval_shape(logit_loss(spec).parts, Scores(x, x, token, key))  # pyright: ignore[reportArgumentType]
    assert parts.dtype == jnp.float32 and parts.shape[:-1] == (2, 3)


def arrays(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns draft and target logits, fp32."""
    c = case(seed=seed)
    return jnp.asarray(c.draft, jnp.float32), jnp.asarray(c.target, jnp.float32)


def test_neg_log_acceptance_and_top_1_are_cross_entropy_for_a_one_hot_target():
    draft, _ = arrays()
    token = jnp.array([0, 6, 2, 2, 5])
    target = jnp.where(jnp.arange(VOCAB) == token[:, None], 0.0, -1e30)
    wanted = cross_entropy(draft, token)
    for loss in (neg_log_acceptance, soft_cross_entropy, functools.partial(top_k_cross_entropy, k=1)):
        np.testing.assert_allclose(loss(draft, target), wanted, rtol=1e-6)


def test_kl_is_soft_cross_entropy_less_the_targets_entropy():
    draft, target = arrays()
    np.testing.assert_allclose(
        kl(draft, target), soft_cross_entropy(draft, target) - soft_cross_entropy(target, target), rtol=1e-5
    )


def test_top_k_of_the_whole_vocabulary_is_soft_cross_entropy():
    draft, target = arrays()
    np.testing.assert_allclose(top_k_cross_entropy(draft, target, 99), soft_cross_entropy(draft, target), rtol=1e-6)


@pytest.mark.parametrize("rest", [None, -0.7])
def test_total_variation_is_one_less_the_acceptance_and_lies_between_0_and_1(rest: float | None):
    draft, target = arrays()
    rest_N = None if rest is None else jnp.full(TOKENS, rest)
    value = tvd(draft, target, rest_N)
    np.testing.assert_allclose(value, 1 - expected_acceptance(draft, target, rest_N), atol=1e-6)
    assert ((value >= 0) & (value <= 1)).all()


def test_a_draft_vocabulary_accepts_what_the_whole_vocabulary_does_with_a_draft_that_is_zero_outside():
    draft, target = arrays()
    kept = 4
    rest = jax.nn.logsumexp(jax.nn.log_softmax(target)[:, kept:], axis=-1)
    whole = jnp.where(jnp.arange(VOCAB) < kept, draft, -1e30)
    for loss in (expected_acceptance, tvd, neg_log_acceptance):
        np.testing.assert_allclose(
            loss(draft[:, :kept], target[:, :kept], rest), loss(whole, target), rtol=1e-5, atol=1e-6
        )


def test_jsd_is_symmetric_at_a_half_and_at_most_log_2():
    draft, target = arrays()
    np.testing.assert_allclose(jsd(draft, target), jsd(target, draft), rtol=1e-5)
    np.testing.assert_allclose(jsd(draft, target, 0.2), jsd(target, draft, 0.8), rtol=1e-5)
    apart = jsd(jnp.array([0.0, -1e30]), jnp.array([-1e30, 0.0]))
    assert float(apart) == pytest.approx(np.log(2)) and (jsd(draft, target) < np.log(2)).all()


def test_lk_goes_from_kl_to_total_variation():
    draft, target = arrays()
    np.testing.assert_allclose(lk(draft, target, 0.0), kl(draft, target), rtol=1e-6)
    np.testing.assert_allclose(lk(draft, target, 1e9), tvd(draft, target), rtol=1e-6)
    between, ends = lk(draft, target), (kl(draft, target), tvd(draft, target))
    assert ((between > jnp.minimum(*ends)) & (between < jnp.maximum(*ends))).all()


@pytest.mark.parametrize("restricted", [False, True], ids=["whole", "restricted"])
def test_exact_tvdpp_has_the_gradient_of_total_variation_over_sigma(restricted: bool):
    with jax.enable_x64(True):
        c = case(restricted)
        for spec, sigma in (("tvdpp_exact", global_sigma(c)), ("tvdpp_exact_pos", own_sigma(c))):
            np.testing.assert_allclose(measured(spec, c)[1], measured("tvd", c)[1] / sigma, rtol=1e-9, atol=1e-12)


def test_exact_pos_pulls_no_harder_than_half_at_any_token():
    draft = jnp.array([[0.0, 0.0], [0.0, -20.0], [0.0, -8.0]])
    target = jnp.array([[1e-3, 0.0], [-20.0, 0.0], [0.0, -7.9]])
    gradient = jax.grad(lambda x: jnp.sum(tvdpp_exact_pos(x, target)))(draft)
    assert (jnp.abs(gradient) <= 0.5 + 1e-6).all()


def gradient_times_sigma(loss: LogitLoss, scores: Scores, key: jax.Array) -> jax.Array:
    """Returns the gradient of sampled TVD++ with the draws of `key`, times their standard deviation."""
    kept = jnp.ones(TOKENS, bool)
    slope, sums = jax.grad(combined, has_aux=True)(scores.draft, loss, scores._replace(key=key), kept)
    mu = sums[2] / sums[3]
    return slope * (jnp.sqrt(mu * (1 - mu)) + EPSILON)


def test_sampled_tvdpp_averages_to_the_exact_gradient():
    """Times sigma it averages to `1 - 1/n` of the gradient of total variation; a z-test of every entry, alpha 1e-6."""
    repeats, draws = 3000, 3
    c, loss = case(), logit_loss(f"tvdpp_sampled:{draws}")
    gradients = jax.jit(jax.vmap(functools.partial(gradient_times_sigma, loss, c.scores())))
    found = np.asarray(gradients(jax.random.split(jax.random.key(1), repeats)), np.float64)
    wanted = c.tv_gradient() / TOKENS * (1 - 1 / (TOKENS * draws))
    z = (found.mean(0) - wanted) / (found.std(0) / np.sqrt(repeats))
    assert np.abs(z).max() < 5.6  # two-sided 1e-6 over the 35 entries


def test_batch_statistics_have_no_gradient_even_where_all_rewards_are_the_same():
    gradient = np.asarray(jax.grad(standardised)(jnp.array([1.0, 2.0, 0.0, 5.0]), jnp.asarray(3)))
    assert np.isfinite(gradient).all() and gradient[:2].any() and not gradient[2:].any()


@pytest.mark.parametrize("spec", ["tvdpp_exact", "tvdpp_uniform_vocab"])
def test_tail_entries_do_not_move_the_batch_statistics(spec: str):
    """Tokens that neither side writes, with the target slightly above, change nothing, however many they are."""
    with jax.enable_x64(True):
        c, tail = case(), np.full((TOKENS, 50), -40.0)
        longer = TokenCase(np.append(c.draft, tail, -1), np.append(c.target, tail + 0.1, -1), c.token, None)
        with_tail, without = measured(spec, longer)[1], measured(spec, c)[1]
    np.testing.assert_allclose(with_tail[:, :VOCAB], without, rtol=1e-9, atol=1e-12)


def test_cross_entropy_ignores_tokens_outside_the_vocabulary():
    draft, _ = arrays()
    token = jnp.array([3, -1, 0, -1, 2])
    assert (np.asarray(cross_entropy(draft, token)) == 0).tolist() == [False, True, False, True, False]


def test_agreement_compares_argmaxes():
    draft, target = jnp.asarray([[1.0, 2.0], [3.0, 1.0]]), jnp.asarray([[0.0, 9.0], [0.0, 1.0]])
    assert agreement(draft, target).tolist() == [1.0, 0.0]


def test_smooth_l1_is_quadratic_below_one_and_linear_above():
    draft = jnp.asarray([[0.5, -3.0, 0.0, 1.0]])
    assert float(smooth_l1(draft, jnp.zeros((1, 4)))[0]) == pytest.approx((0.125 + 2.5 + 0.0 + 0.5) / 4)


def test_smooth_l1_has_the_clipped_difference_as_gradient():
    with jax.enable_x64(True):
        c = case()
        gradient = jax.grad(lambda x: jnp.sum(smooth_l1(x, jnp.asarray(c.target))))(jnp.asarray(c.draft))
        np.testing.assert_allclose(gradient, np.clip(c.draft - c.target, -1, 1) / VOCAB, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_feature_losses_are_fp32_for_bf16_features(name: str):
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    loss = FEATURE_LOSSES[name](x, x)
    assert loss.dtype == jnp.float32 and loss.shape == (2, 3)
