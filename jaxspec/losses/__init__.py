"""Distillation losses: each is a short function with its equation, per token; the training step sums them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from jaxspec.base import Array
from jaxspec.losses.acceptance import agreement, expected_acceptance, l1_ce, lk, neg_log_acceptance, tvd
from jaxspec.losses.divergence import cross_entropy, jsd, kl, reverse_kl, soft_cross_entropy, top_k_cross_entropy
from jaxspec.losses.feature import smooth_l1
from jaxspec.losses.loss import LogitLoss, Scores
from jaxspec.losses.position import divides_by_weights, position_weights
from jaxspec.losses.spec import LossParameter, read_spec
from jaxspec.losses.tvdpp import standardised, tvdpp_exact, tvdpp_exact_pos, tvdpp_sampled, tvdpp_uniform_vocab

FEATURE_LOSSES: dict[str, Callable[[Array, Array], Array]] = {"smooth_l1": smooth_l1}
"""Name -> loss of (draft feature, target feature), `[..., D], [..., D] -> [...]`."""


class NamedLoss(NamedTuple):
    """A loss between distributions, as `LOGIT_LOSSES` lists it."""

    loss: Callable[..., Array]
    """`(Scores, number if it takes one) -> loss [...]`, or parts `[..., M]` where `combine` makes the loss of them."""
    parameter: LossParameter | None = None
    combine: Callable[[Array, Array], Array] | None = None
    """As in `LogitLoss`."""


_BETA = LossParameter("beta", "a number between 0 and 1", lambda x: 0 < x < 1, 0.5)
_ETA = LossParameter("eta", "a number of at least 0", lambda x: 0 <= x < float("inf"), 3.0)
_K = LossParameter("K", "a whole number of at least 1", lambda x: x >= 1, 10, int)
_DRAWS = LossParameter("S", "a whole number of at least 1", lambda x: x >= 1, 4, int)

LOGIT_LOSSES: dict[str, NamedLoss] = {
    "soft_cross_entropy": NamedLoss(lambda s: soft_cross_entropy(s.draft, s.target)),
    "cross_entropy": NamedLoss(lambda s: cross_entropy(s.draft, s.token)),
    "kl": NamedLoss(lambda s: kl(s.draft, s.target)),
    "reverse_kl": NamedLoss(lambda s: reverse_kl(s.draft, s.target)),
    "jsd": NamedLoss(lambda s, beta: jsd(s.draft, s.target, beta), _BETA),
    "top_k": NamedLoss(lambda s, k: top_k_cross_entropy(s.draft, s.target, k, s.lumped is not None), _K),
    "tvd": NamedLoss(lambda s: tvd(s.draft, s.target, s.rest)),
    "neg_log_acceptance": NamedLoss(lambda s: neg_log_acceptance(s.draft, s.target, s.rest)),
    "lk": NamedLoss(lambda s, eta: lk(s.draft, s.target, eta, s.rest), _ETA),
    "l1_ce": NamedLoss(lambda s: l1_ce(s.draft, s.target, s.token, s.rest)),
    "tvdpp_exact": NamedLoss(lambda s: tvdpp_exact(s.draft, s.target, s.rest), None, standardised),
    "tvdpp_exact_pos": NamedLoss(lambda s: tvdpp_exact_pos(s.draft, s.target, s.rest)),
    "tvdpp_sampled": NamedLoss(lambda s, n: tvdpp_sampled(s.draft, s.target, s.key, n, s.rest), _DRAWS, standardised),
    "tvdpp_uniform_vocab": NamedLoss(lambda s: tvdpp_uniform_vocab(s.draft, s.target, s.rest), None, standardised),
}
"""Table of losses: name -> loss of the draft's distribution; `logit_loss` reads a name with its number."""

LUMPED = ("soft_cross_entropy", "kl", "top_k")
"""Losses that can be computed from the target's likeliest tokens and the mass of all others, taken as one token.

`soft_cross_entropy` and `kl` then miss the difference between the others, `p_rest KL(p | rest, q | rest)` for `kl`.
`top_k` is the same."""


def refuse_lumped(spec: str, tokens: int) -> None:
    """Raises ValueError where the loss called `spec` needs more of the target than its `tokens` likeliest tokens."""
    name, number = read_spec("loss", spec, {name: entry.parameter for name, entry in LOGIT_LOSSES.items()})
    if name not in LUMPED:
        raise ValueError(f"loss {spec!r} needs all of the target's probabilities; choose from {', '.join(LUMPED)}")
    if name == "top_k" and number[0] > tokens:
        raise ValueError(f"loss {spec!r} needs more of the target's tokens than {tokens}")


@functools.cache  # one object a spec, so that programs that hold it are traced once
def logit_loss(spec: str) -> LogitLoss:
    """Returns the loss called `name` or `name:number` (`kl`, `jsd:0.3`, `top_k:10`); raises ValueError for others."""
    name, number = read_spec("loss", spec, {name: entry.parameter for name, entry in LOGIT_LOSSES.items()})
    entry = LOGIT_LOSSES[name]
    if entry.combine is None:
        return LogitLoss(spec, lambda scores: entry.loss(scores, *number)[..., None])
    return LogitLoss(spec, lambda scores: entry.loss(scores, *number), entry.combine)


__all__ = [
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "LUMPED",
    "LogitLoss",
    "Scores",
    "agreement",
    "cross_entropy",
    "divides_by_weights",
    "expected_acceptance",
    "jsd",
    "kl",
    "l1_ce",
    "lk",
    "logit_loss",
    "neg_log_acceptance",
    "position_weights",
    "refuse_lumped",
    "reverse_kl",
    "smooth_l1",
    "soft_cross_entropy",
    "top_k_cross_entropy",
    "tvd",
    "tvdpp_exact",
    "tvdpp_exact_pos",
    "tvdpp_sampled",
    "tvdpp_uniform_vocab",
]
