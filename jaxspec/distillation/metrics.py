"""Losses and measures of draft steps: of each position, and summed over all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.distillation.objective import Objective, combiner, steps_of
from jaxspec.losses import FEATURE_LOSSES, divides_by_weights, position_weights


class ChunkMetrics(NamedTuple):
    """Losses and measures of each draft step at each position. After `Layout.join` the axis `C` is `L`."""

    loss_TBCM: dict[str, Array]
    """Each loss's parts, by name."""
    agree_TBC: Array
    """1 where draft and target have the same argmax."""
    accept_TBC: Array
    """Expected acceptance `sum_v min(p, q)`."""
    draft_gold_TBC: Array
    """The draft's probability of the label, the next token of the text."""
    target_gold_TBC: Array
    """The target's."""


class StepMasks(NamedTuple):
    """Masks of the pairs at which each draft step counts."""

    trained_TBL: Array
    """Where it is trained and measured."""
    logits_TBL: Array
    """Where its logits are trained: with a draft vocabulary, fewer."""


class Sums(NamedTuple):
    """Totals over tokens, by draft step; divided by their counts after all batches and devices are added."""

    loss_TM: dict[str, Array]
    """Weighted sums of every loss's parts."""
    weight_T: dict[str, Array]
    """Divisor of each: trained tokens, or the sum of their weights."""
    agree_T: Array
    """Positions whose argmaxes agree, by draft step."""
    accept_T: Array
    """Sum of `sum_v min(p, q)`, by draft step."""
    chain_greedy_T: Array
    """Positions whose first `t` argmaxes all agree."""
    chain_sampled_T: Array
    """Sum of the product of the first `t` acceptances."""
    count_T: Array
    """Tokens at each draft step."""

    def losses(self, name: str) -> list[Array]:
        """Returns one loss's mean at every step."""
        combine = combiner(name)
        return [combine(*both) for both in zip(self.loss_TM[name], self.weight_T[name], strict=True)]

    def mean_loss(self, objective: Objective) -> Array:
        """Returns the objective: the weighted mean losses of each step's tokens, summed over the trained steps."""
        total = jnp.zeros(())
        for name, weight in objective.weights:
            steps = zip(self.losses(name), steps_of(name, objective), strict=False)
            total += weight * sum(c * mean for mean, c in steps)
        return total

    def summary(self, objective: Objective) -> dict[str, float]:
        """Returns means: the loss, then of the first draft step its parts, agreement and acceptance, and simulated tau.

        Simulated tau is `1 + sum_t mean(product of the first t acceptances)`, a chain of `T` drafts whose context is
        the text itself: expected acceptances stand for temperature 1, agreements for greedy decoding.
        """
        count_T = jnp.maximum(self.count_T, 1)
        parts = {name: float(self.losses(name)[0]) for name in self.loss_TM}
        return {
            "loss": float(self.mean_loss(objective)),
            **parts,
            "top1_agreement": float(self.agree_T[0] / count_T[0]),
            "expected_acceptance": float(self.accept_T[0] / count_T[0]),
            "simulated_tau": float(1 + jnp.sum(self.chain_sampled_T / count_T)),
            "simulated_tau_greedy": float(1 + jnp.sum(self.chain_greedy_T / count_T)),
            "tokens": int(self.count_T[0]),
        }


def sum_metrics(metrics: ChunkMetrics, masks: StepMasks, objective: Objective) -> Sums:
    """Returns the sums over all trained positions of this device's rows; `metrics` by pair, as the masks."""
    mask_TBL, logit_mask_TBL = masks
    golds = (metrics.draft_gold_TBC, metrics.target_gold_TBC, logit_mask_TBL)
    # Steps that are measured alone, behind all that count, are no part of a trained chain.
    count = max((j for j, weight in enumerate(objective.per_step, 1) if weight), default=0)
    alone = len(logit_mask_TBL) - count
    if alone:
        golds = tuple(x[:count] for x in golds)
    weight_TBL = position_weights(objective.position_weights, *golds) * golds[-1]
    if alone:
        weight_TBL = jnp.pad(weight_TBL, ((0, alone), (0, 0), (0, 0)))
    by_weights = divides_by_weights(objective.position_weights)
    counted_TBL = weight_TBL if by_weights else logit_mask_TBL.astype(jnp.float32)
    losses = {}
    for name, value in metrics.loss_TBCM.items():
        by = mask_TBL if name in FEATURE_LOSSES else weight_TBL
        # Not a product alone: rows that run past their document may hold infinities, and 0 * inf is no 0.
        losses[name] = jnp.sum(jnp.where((by > 0)[..., None], value * by[..., None], 0.0), axis=(1, 2))
    weight_T = {name: mask_TBL if name in FEATURE_LOSSES else counted_TBL for name in losses}
    chain_TBL = jnp.cumprod(mask_TBL, axis=0)
    return Sums(
        losses,
        {name: _total(w.astype(jnp.float32)) for name, w in weight_T.items()},
        _total(metrics.agree_TBC * mask_TBL),
        _total(metrics.accept_TBC * mask_TBL),
        _total(jnp.cumprod(metrics.agree_TBC, axis=0) * chain_TBL),
        _total(jnp.cumprod(metrics.accept_TBC, axis=0) * chain_TBL),
        _total(mask_TBL.astype(jnp.int32)),
    )


def _total(x_TBL: Array) -> Array:
    return jnp.sum(x_TBL, axis=(1, 2))


def sum_devices(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns sums over the devices of `axes` in a `shard_map` or `pmap`; without axes, `tree` itself."""
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree) if axes else tree
