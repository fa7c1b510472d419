"""Every loss equals its equation, has its closed-form gradient in float64, and stays finite at the edges."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.losses import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    Scores,
    agreement,
    cross_entropy,
    divides_by_weights,
    expected_acceptance,
    jsd,
    kl,
    lk,
    logit_loss,
    neg_log_acceptance,
    position_weights,
    smooth_l1,
    soft_cross_entropy,
    top_k_cross_entropy,
    tvd,
    tvdpp_exact_pos,
)
from jaxspec.losses.position import POSITION_WEIGHTS
from jaxspec.losses.spec import read_spec
from jaxspec.losses.tvdpp import EPSILON, TAIL, draw, standardised

TOKENS, VOCAB = 5, 7


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def total(x: np.ndarray) -> np.ndarray:
    return x.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Some tokens in float64 numpy: `[N, U]` logits, `[N]` tokens and, over a draft vocabulary, the log of the rest."""

    draft: np.ndarray
    target: np.ndarray
    token: np.ndarray
    rest: np.ndarray | None
    drawn: np.ndarray | None = None
    """What `tvdpp_sampled:3` draws, `[N, S]`."""

    def only(self, kept: np.ndarray) -> "Case":
        """The same without the other tokens."""
        optional = (None if x is None else x[kept] for x in (self.rest, self.drawn))
        return Case(self.draft[kept], self.target[kept], self.token[kept], *optional)

    @functools.cached_property
    def p(self) -> np.ndarray:
        """The target, renormalised on the `U` tokens."""
        return softmax(self.target)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """The target, as it is on the `U` tokens."""
        return self.p if self.rest is None else self.p * (1 - np.exp(self.rest))[:, None]

    @functools.cached_property
    def q(self) -> np.ndarray:
        return softmax(self.draft)

    @functools.cached_property
    def label(self) -> np.ndarray:
        """One-hot, all zeros where the token is -1."""
        return (np.arange(self.draft.shape[-1]) == self.token[:, None]).astype(float)

    @functools.cached_property
    def reward(self) -> np.ndarray:
        return ((self.kept > self.q) & self.live).astype(float)

    @functools.cached_property
    def live(self) -> np.ndarray:
        return np.maximum(self.kept, self.q) >= TAIL

    def scores(self) -> Scores:
        rest = None if self.rest is None else jnp.asarray(self.rest)
        return Scores(
            jnp.asarray(self.draft), jnp.asarray(self.target), jnp.asarray(self.token), jax.random.key(7), rest
        )

    def tv(self, q: np.ndarray) -> np.ndarray:
        outside = 0 if self.rest is None else np.exp(self.rest)[:, None]
        return (total(abs(self.kept - q)) + outside) / 2

    def tv_gradient(self) -> np.ndarray:
        """`-q (1{p > q} - sum_v q_v 1{p_v > q_v})`."""
        up = self.kept > self.q
        return -self.q * (up - total(self.q * up))

    def advantage(self, reward: np.ndarray, mu: np.ndarray | float) -> np.ndarray:
        """`mu` standardises; the variance of 0s and 1s is `mu (1 - mu)`."""
        return (reward - mu) / (np.sqrt(mu * (1 - mu)) + EPSILON)


class Law(NamedTuple):
    """A loss of one token as its equation has it, and its gradient by the draft's logits in closed form."""

    equation: Callable[[Case, np.ndarray], np.ndarray]
    """Of the case, at which whatever has no gradient is held, and the draft's logits: `[N, U] -> [N, 1]`."""
    gradient: Callable[[Case], np.ndarray]


def kl_of(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return total(p * np.log(p / q))


def alpha_of(c: Case, q: np.ndarray) -> np.ndarray:
    return total(np.minimum(c.kept, q))


def nll(c: Case, x: np.ndarray) -> np.ndarray:
    return -total(c.label * np.log(softmax(x)))


def jsd_gradient(c: Case, beta: float) -> np.ndarray:
    m = beta * c.p + (1 - beta) * c.q
    return (1 - beta) * c.q * (np.log(c.q / m) - kl_of(c.q, m))


def jsd_of(c: Case, x: np.ndarray, beta: float) -> np.ndarray:
    q = softmax(x)
    m = beta * c.p + (1 - beta) * q
    return beta * kl_of(c.p, m) + (1 - beta) * kl_of(q, m)


def top(c: Case, k: int) -> np.ndarray:
    """The target's probabilities, 0 outside the `k` greatest."""
    return np.where(c.p >= np.sort(c.p, axis=-1)[:, -k, None], c.p, 0)


def surrogate(c: Case, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return -total(weight * np.log(softmax(x)))


def surrogate_gradient(c: Case, weight: np.ndarray) -> np.ndarray:
    return total(weight) * c.q - weight


def global_mu(c: Case) -> float:
    return c.reward.sum() / c.live.sum()


def sampled_weight(c: Case) -> np.ndarray:
    """Of each entry of the vocabulary: the mean of its advantage over the draws, 0 where it was not drawn."""
    assert c.drawn is not None
    times = (c.drawn[:, :, None] == np.arange(c.q.shape[-1])).mean(axis=1)
    return times * c.advantage(c.reward, np.take_along_axis(c.reward, c.drawn, axis=-1).mean())


def uniform_weight(c: Case) -> np.ndarray:
    return c.live * c.advantage(c.reward, global_mu(c)) / total(c.live)


def own_mu(c: Case) -> np.ndarray:
    return total(c.q * c.reward)


def lk_weight(c: Case, eta: float) -> np.ndarray:
    return np.exp(-eta * alpha_of(c, c.q))


def own_sigma(c: Case) -> np.ndarray:
    return np.sqrt(own_mu(c) * (1 - own_mu(c))) + EPSILON


def global_sigma(c: Case) -> float:
    return np.sqrt(global_mu(c) * (1 - global_mu(c))) + EPSILON


LAWS = {
    "soft_cross_entropy": Law(lambda c, x: -total(c.p * np.log(softmax(x))), lambda c: c.q - c.p),
    "cross_entropy": Law(nll, lambda c: total(c.label) * c.q - c.label),
    "kl": Law(lambda c, x: kl_of(c.p, softmax(x)), lambda c: c.q - c.p),
    "reverse_kl": Law(
        lambda c, x: kl_of(softmax(x), c.p),
        lambda c: c.q * (np.log(c.q / c.p) - kl_of(c.q, c.p)),
    ),
    "jsd:0.3": Law(lambda c, x: jsd_of(c, x, 0.3), lambda c: jsd_gradient(c, 0.3)),
    "top_k:3": Law(lambda c, x: -total(top(c, 3) * np.log(softmax(x))), lambda c: total(top(c, 3)) * c.q - top(c, 3)),
    "tvd": Law(lambda c, x: c.tv(softmax(x)), Case.tv_gradient),
    "neg_log_acceptance": Law(
        lambda c, x: -np.log(alpha_of(c, softmax(x))), lambda c: c.tv_gradient() / alpha_of(c, c.q)
    ),
    "lk:2": Law(
        lambda c, x: lk_weight(c, 2) * kl_of(c.p, softmax(x)) + (1 - lk_weight(c, 2)) * c.tv(softmax(x)),
        lambda c: lk_weight(c, 2) * (c.q - c.p) + (1 - lk_weight(c, 2)) * c.tv_gradient(),
    ),
    "l1_ce": Law(
        lambda c, x: 0.9 * 2 * c.tv(softmax(x)) + 0.1 * nll(c, x),
        lambda c: 1.8 * c.tv_gradient() + 0.1 * (total(c.label) * c.q - c.label),
    ),
    "tvdpp_exact": Law(
        lambda c, x: surrogate(c, x, c.q * c.advantage(c.reward, global_mu(c))),
        lambda c: c.tv_gradient() / global_sigma(c),
    ),
    "tvdpp_exact_pos": Law(
        lambda c, x: surrogate(c, x, c.q * c.advantage(c.reward, own_mu(c))),
        lambda c: c.tv_gradient() / own_sigma(c),
    ),
    "tvdpp_sampled:3": Law(
        lambda c, x: surrogate(c, x, sampled_weight(c)), lambda c: surrogate_gradient(c, sampled_weight(c))
    ),
    "tvdpp_uniform_vocab": Law(
        lambda c, x: surrogate(c, x, uniform_weight(c)), lambda c: surrogate_gradient(c, uniform_weight(c))
    ),
}
SPECS = sorted(LAWS)


@functools.cache
def case(restricted: bool = False, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    draft, target = rng.normal(size=(TOKENS, VOCAB)) * 2, rng.normal(size=(TOKENS, VOCAB)) * 2
    rest = np.log(rng.uniform(0.05, 0.9, TOKENS)) if restricted else None
    with jax.enable_x64(True):
        drawn = np.asarray(draw(jax.random.key(7), jax.nn.log_softmax(jnp.asarray(draft)), 3)).T
    return Case(draft, target, np.array([3, -1, 0, 6, 2]), rest, drawn)


@functools.partial(jax.jit, static_argnums=0)
def measure(spec: str, scores: Scores, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of the kept tokens, and its gradient by the draft's logits."""
    loss = logit_loss(spec)

    def of(draft: jax.Array) -> jax.Array:
        parts = loss.parts(scores._replace(draft=draft))
        return loss.combine(jnp.sum(jnp.where(kept[:, None], parts, 0), axis=0), jnp.sum(kept))

    return jax.value_and_grad(of)(scores.draft)


def measured(spec: str, c: Case, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    value, gradient = measure(spec, c.scores(), jnp.ones(len(c.token), bool) if kept is None else jnp.asarray(kept))
    return np.asarray(value), np.asarray(gradient)


def numeric(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient by central differences."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(function(moved))
        gradient[at] = (ends[0] - ends[1]) / (2 * step)
    return gradient


# ---- the contract of every loss of distributions


def test_every_loss_of_the_table_is_under_the_contract():
    assert {spec.partition(":")[0] for spec in SPECS} == set(LOGIT_LOSSES)


@pytest.mark.parametrize("restricted", [False, True], ids=["whole", "restricted"])
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradient_are_those_of_the_equation(spec: str, restricted: bool):
    with jax.enable_x64(True):
        c, distribution = case(restricted), LAWS[spec]
        value, gradient = measured(spec, c)
    assert gradient.dtype == np.float64
    assert value == pytest.approx(distribution.equation(c, c.draft).mean(), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient, distribution.gradient(c) / TOKENS, rtol=1e-9, atol=1e-9)
    differences = numeric(lambda x: distribution.equation(c, x).mean(), c.draft)
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-7)


KEPT = np.array([True, False, True, True, False])


@pytest.mark.parametrize("spec", SPECS)
def test_masked_tokens_might_as_well_not_be_there(spec: str):
    with jax.enable_x64(True):
        c = case(restricted=True)
        value, gradient = measured(spec, c, KEPT)
    few, distribution = c.only(KEPT), LAWS[spec]
    assert value == pytest.approx(distribution.equation(few, few.draft).mean(), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient[KEPT], distribution.gradient(few) / KEPT.sum(), rtol=1e-9, atol=1e-9)
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
    value, gradient = measured(spec, Case(draft, target, token, rest[..., 0].reshape(-1).astype(np.float32)))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("spec", SPECS)
def test_parts_are_fp32_for_bf16_logits(spec: str):
    x = jax.ShapeDtypeStruct((2, 3, VOCAB), jnp.bfloat16)
    token, key = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    parts = jax.eval_shape(logit_loss(spec).parts, Scores(x, x, token, key))  # pyright: ignore[reportArgumentType]
    assert parts.dtype == jnp.float32 and parts.shape[:-1] == (2, 3)


# ---- what the equations imply


def arrays(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Draft and target logits, fp32."""
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


def test_sampled_tvdpp_averages_to_the_exact_gradient():
    """Times sigma it averages to `1 - 1/n` of the gradient of total variation; a z-test of every entry, alpha 1e-6."""
    repeats, draws = 3000, 3
    c, loss = case(), logit_loss(f"tvdpp_sampled:{draws}")
    scores = c.scores()

    def gradient(key: jax.Array) -> jax.Array:
        def of(draft: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums = jnp.sum(loss.parts(scores._replace(draft=draft, key=key)), axis=0)
            return loss.combine(sums, jnp.asarray(TOKENS)), sums

        slope, sums = jax.grad(of, has_aux=True)(scores.draft)
        mu = sums[2] / sums[3]
        return slope * (jnp.sqrt(mu * (1 - mu)) + EPSILON)

    found = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(1), repeats)), np.float64)
    wanted = c.tv_gradient() / TOKENS * (1 - 1 / (TOKENS * draws))
    z = (found.mean(0) - wanted) / (found.std(0) / np.sqrt(repeats))
    assert np.abs(z).max() < 5.6  # two-sided 1e-6 over the 35 entries


def test_batch_statistics_have_no_gradient_even_where_all_rewards_are_the_same():
    gradient = np.asarray(jax.grad(standardised)(jnp.array([1.0, 2.0, 0.0, 5.0]), jnp.asarray(3)))
    assert np.isfinite(gradient).all() and gradient[:2].any() and not gradient[2:].any()


@pytest.mark.parametrize("spec", ["tvdpp_exact", "tvdpp_uniform_vocab"])
def test_tail_entries_do_not_move_the_batch_statistics(spec: str):
    """Tokens that neither side ever writes, with the target a hair above: as many as one likes change nothing."""
    with jax.enable_x64(True):
        c, tail = case(), np.full((TOKENS, 50), -40.0)
        longer = Case(np.append(c.draft, tail, -1), np.append(c.target, tail + 0.1, -1), c.token, None)
        with_tail, without = measured(spec, longer)[1], measured(spec, c)[1]
    np.testing.assert_allclose(with_tail[:, :VOCAB], without, rtol=1e-9, atol=1e-12)


def test_cross_entropy_ignores_tokens_outside_the_vocabulary():
    draft, _ = arrays()
    token = jnp.array([3, -1, 0, -1, 2])
    assert (np.asarray(cross_entropy(draft, token)) == 0).tolist() == [False, True, False, True, False]


def test_agreement_compares_argmaxes():
    draft, target = jnp.asarray([[1.0, 2.0], [3.0, 1.0]]), jnp.asarray([[0.0, 9.0], [0.0, 1.0]])
    assert agreement(draft, target).tolist() == [1.0, 0.0]


# ---- their names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nll", r"'nll' is unknown: choose from soft_cross_entropy, .*, jsd\[:beta\], top_k\[:K\]"),
        ("kl:2", "'kl:2' has a number to spare: write kl"),
        ("jsd:1", "'jsd:1' does not fit: in jsd.*, beta is a number between 0 and 1"),
        ("jsd:", "'jsd:' does not fit"),
        ("top_k:2.5", "'top_k:2.5' does not fit: .* whole number"),
        ("top_k:0", "'top_k:0' does not fit"),
        ("lk:inf", "'lk:inf' does not fit"),
    ],
)
def test_a_spec_that_names_no_loss_is_told_what_there_is(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        logit_loss(spec)


def test_a_bare_name_has_the_papers_number():
    knobs = {name: entry.parameter for name, entry in LOGIT_LOSSES.items()}
    for name, number in (("jsd", 0.5), ("top_k", 10), ("lk", 3.0), ("tvdpp_sampled", 4)):
        assert read_spec("loss", name, knobs) == read_spec("loss", f"{name}:{number}", knobs) == (name, (number,))


def test_a_spec_is_one_object_so_that_programs_are_reused():
    assert logit_loss("jsd:0.3") is logit_loss("jsd:0.3") and logit_loss("jsd:0.3").name == "jsd:0.3"


# ---- losses of features


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


# ---- weights of draft steps

STEPS = 4
WEIGHTS = ["none", "exp:2", "power:0.8", "cat", "d_pace:0.1"]


Gold = tuple[jax.Array, jax.Array]


@pytest.fixture
def gold() -> Gold:
    """The text's probability under draft and target, `[T, N]`."""
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

        def accepted(log_s: jax.Array) -> jax.Array:
            """`sum_j P(the first j + 1 drafts are kept)`."""
            return jnp.sum(jnp.exp(jnp.cumsum(log_s, axis=0)))

        wanted = jax.grad(accepted)(jnp.log((1 - a) * draft + a))
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
