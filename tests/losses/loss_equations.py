"""Every loss of distributions as its equation, and its gradient in closed form, in float64 numpy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.losses import Scores, logit_loss
from jaxspec.losses.loss import LogitLoss
from jaxspec.losses.tvdpp import EPSILON, TAIL, draw

TOKENS, VOCAB = 5, 7


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def total(x: np.ndarray) -> np.ndarray:
    return x.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class TokenCase:
    """Some tokens: `[N, U]` logits, `[N]` tokens and, for a draft vocabulary, the log of the target's other mass."""

    draft: np.ndarray
    target: np.ndarray
    token: np.ndarray
    rest: np.ndarray | None
    drawn: np.ndarray | None = None
    """The draws of `tvdpp_sampled:3`, `[N, S]`."""

    def only(self, kept: np.ndarray) -> "TokenCase":
        """Returns the case with only these tokens."""
        optional = (None if x is None else x[kept] for x in (self.rest, self.drawn))
        return TokenCase(self.draft[kept], self.target[kept], self.token[kept], *optional)

    @functools.cached_property
    def p(self) -> np.ndarray:
        """The target's probabilities, renormalised on the `U` tokens."""
        return softmax(self.target)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """The target's probabilities of the `U` tokens, not renormalised."""
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
        """Returns the rewards standardised by their mean `mu`; the variance of zeros and ones is `mu (1 - mu)`."""
        return (reward - mu) / (np.sqrt(mu * (1 - mu)) + EPSILON)


class LossEquation(NamedTuple):
    """A loss of one token by its equation, and its gradient by the draft's logits in closed form."""

    equation: Callable[[TokenCase, np.ndarray], np.ndarray]
    """The loss `[N, 1]` of the draft's logits `[N, U]`; terms without gradient are computed from the case."""
    gradient: Callable[[TokenCase], np.ndarray]


def kl_of(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return total(p * np.log(p / q))


def alpha_of(c: TokenCase, q: np.ndarray) -> np.ndarray:
    return total(np.minimum(c.kept, q))


def nll(c: TokenCase, x: np.ndarray) -> np.ndarray:
    return -total(c.label * np.log(softmax(x)))


def jsd_gradient(c: TokenCase, beta: float) -> np.ndarray:
    m = beta * c.p + (1 - beta) * c.q
    return (1 - beta) * c.q * (np.log(c.q / m) - kl_of(c.q, m))


def jsd_of(c: TokenCase, x: np.ndarray, beta: float) -> np.ndarray:
    q = softmax(x)
    m = beta * c.p + (1 - beta) * q
    return beta * kl_of(c.p, m) + (1 - beta) * kl_of(q, m)


def top(c: TokenCase, k: int) -> np.ndarray:
    """Returns the target's probabilities, 0 outside the `k` greatest."""
    return np.where(c.p >= np.sort(c.p, axis=-1)[:, -k, None], c.p, 0)


def surrogate(c: TokenCase, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return -total(weight * np.log(softmax(x)))


def surrogate_gradient(c: TokenCase, weight: np.ndarray) -> np.ndarray:
    return total(weight) * c.q - weight


def global_mu(c: TokenCase) -> float:
    return c.reward.sum() / c.live.sum()


def sampled_weight(c: TokenCase) -> np.ndarray:
    """Returns the mean advantage over the draws of each token of the vocabulary, 0 for tokens not drawn."""
    assert c.drawn is not None
    times = (c.drawn[:, :, None] == np.arange(c.q.shape[-1])).mean(axis=1)
    return times * c.advantage(c.reward, np.take_along_axis(c.reward, c.drawn, axis=-1).mean())


def uniform_weight(c: TokenCase) -> np.ndarray:
    return c.live * c.advantage(c.reward, global_mu(c)) / total(c.live)


def own_mu(c: TokenCase) -> np.ndarray:
    return total(c.q * c.reward)


def lk_weight(c: TokenCase, eta: float) -> np.ndarray:
    return np.exp(-eta * alpha_of(c, c.q))


def own_sigma(c: TokenCase) -> np.ndarray:
    return np.sqrt(own_mu(c) * (1 - own_mu(c))) + EPSILON


def global_sigma(c: TokenCase) -> float:
    return np.sqrt(global_mu(c) * (1 - global_mu(c))) + EPSILON


EQUATIONS = {
    "soft_cross_entropy": LossEquation(lambda c, x: -total(c.p * np.log(softmax(x))), lambda c: c.q - c.p),
    "cross_entropy": LossEquation(nll, lambda c: total(c.label) * c.q - c.label),
    "kl": LossEquation(lambda c, x: kl_of(c.p, softmax(x)), lambda c: c.q - c.p),
    "reverse_kl": LossEquation(
        lambda c, x: kl_of(softmax(x), c.p),
        lambda c: c.q * (np.log(c.q / c.p) - kl_of(c.q, c.p)),
    ),
    "jsd:0.3": LossEquation(lambda c, x: jsd_of(c, x, 0.3), lambda c: jsd_gradient(c, 0.3)),
    "top_k:3": LossEquation(
        lambda c, x: -total(top(c, 3) * np.log(softmax(x))), lambda c: total(top(c, 3)) * c.q - top(c, 3)
    ),
    "tvd": LossEquation(lambda c, x: c.tv(softmax(x)), TokenCase.tv_gradient),
    "neg_log_acceptance": LossEquation(
        lambda c, x: -np.log(alpha_of(c, softmax(x))), lambda c: c.tv_gradient() / alpha_of(c, c.q)
    ),
    "lk:2": LossEquation(
        lambda c, x: lk_weight(c, 2) * kl_of(c.p, softmax(x)) + (1 - lk_weight(c, 2)) * c.tv(softmax(x)),
        lambda c: lk_weight(c, 2) * (c.q - c.p) + (1 - lk_weight(c, 2)) * c.tv_gradient(),
    ),
    "l1_ce": LossEquation(
        lambda c, x: 0.9 * 2 * c.tv(softmax(x)) + 0.1 * nll(c, x),
        lambda c: 1.8 * c.tv_gradient() + 0.1 * (total(c.label) * c.q - c.label),
    ),
    "tvdpp_exact": LossEquation(
        lambda c, x: surrogate(c, x, c.q * c.advantage(c.reward, global_mu(c))),
        lambda c: c.tv_gradient() / global_sigma(c),
    ),
    "tvdpp_exact_pos": LossEquation(
        lambda c, x: surrogate(c, x, c.q * c.advantage(c.reward, own_mu(c))),
        lambda c: c.tv_gradient() / own_sigma(c),
    ),
    "tvdpp_sampled:3": LossEquation(
        lambda c, x: surrogate(c, x, sampled_weight(c)), lambda c: surrogate_gradient(c, sampled_weight(c))
    ),
    "tvdpp_uniform_vocab": LossEquation(
        lambda c, x: surrogate(c, x, uniform_weight(c)), lambda c: surrogate_gradient(c, uniform_weight(c))
    ),
}
SPECS = sorted(EQUATIONS)


@functools.cache
def case(restricted: bool = False, seed: int = 0) -> TokenCase:
    rng = np.random.default_rng(seed)
    draft, target = rng.normal(size=(TOKENS, VOCAB)) * 2, rng.normal(size=(TOKENS, VOCAB)) * 2
    rest = np.log(rng.uniform(0.05, 0.9, TOKENS)) if restricted else None
    with jax.enable_x64(True):
        drawn = np.asarray(draw(jax.random.key(7), jax.nn.log_softmax(jnp.asarray(draft)), 3)).T
    return TokenCase(draft, target, np.array([3, -1, 0, 6, 2]), rest, drawn)


@functools.partial(jax.jit, static_argnums=0)
def measure(spec: str, scores: Scores, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of the kept tokens, and its gradient by the draft's logits."""
    (value, _), gradient = jax.value_and_grad(combined, has_aux=True)(scores.draft, logit_loss(spec), scores, kept)
    return value, gradient


def combined(draft: jax.Array, loss: LogitLoss, scores: Scores, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of the kept tokens with these logits of the draft, and the sums of its parts."""
    parts = loss.parts(scores._replace(draft=draft))
    sums = jnp.sum(jnp.where(kept[:, None], parts, 0), axis=0)
    return loss.combine(sums, jnp.sum(kept)), sums


def measured(spec: str, c: TokenCase, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    value, gradient = measure(spec, c.scores(), jnp.ones(len(c.token), bool) if kept is None else jnp.asarray(kept))
    return np.asarray(value), np.asarray(gradient)


def numeric(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Returns the gradient by central differences."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(function(moved))
        gradient[at] = (ends[0] - ends[1]) / (2 * step)
    return gradient
