"""The objective of distillation: losses with their weights, by draft step and by position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxspec.base import Array
from jaxspec.losses import FEATURE_LOSSES, divides_by_weights, logit_loss
from jaxspec.losses.loss import mean

STEPS = "steps"
"""Name of the draft steps behind the first in `Objective.late`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The number that is minimised: `sum_step c_step sum_name weight * mean over trained tokens of loss_name`.

    EAGLE: one step, SmoothL1 on features with weight 1, soft cross-entropy on tokens with weight 0.1.
    HASS adds steps and the top-k loss.
    """

    steps: int = 1
    """Draft steps `T` unrolled from every position; more than one is HASS's context alignment."""
    weights: tuple[tuple[str, float], ...] = (("smooth_l1", 1.0), ("soft_cross_entropy", 0.1))
    """Losses by name (`losses.FEATURE_LOSSES` and `losses.logit_loss`), each with its weight."""
    late: tuple[tuple[str, float], ...] = ()
    """Parts that join at a share of the run's updates, each with its share. Losses go by name: HASS's script trains
    four fifths of its epochs without the top-k loss. `steps` stands for the draft steps behind the first: before they
    join, an update costs what EAGLE's does."""
    step_decay: float = 1.0
    """Step `j`, from 0, counts `step_decay^j`: 1 in HASS, 0.8 in EAGLE-3 and Medusa."""
    step_weights: tuple[float, ...] = ()
    """Or one weight a step."""
    feature_steps: int | None = None
    """Steps whose features are held to the target's; None for all."""
    position_weights: str = "none"
    """Weights by the probabilities of the labels, see `losses.position_weights`."""
    noise: float = 0.2
    """Width of the uniform noise on the input features: `U(-1/2, 1/2) * noise * 512 / document length`."""
    reference_mask: bool = False
    """Gate each pair by its *feature's* token as the released EAGLE trainer does, which never trains the first pair of
    an answer, instead of by the token it predicts. EAGLE has one step. At later ones the pairs of a position `i` are
    gated by the same token `i`; HASS's released code gates them by the token of their column, `i + j` at step `j` from
    0, which is not offered."""
    chunk: int = 128
    """Positions whose logits are alive at once."""

    def __post_init__(self) -> None:
        for name, _ in self.weights:
            if name not in FEATURE_LOSSES:
                logit_loss(name)
        divides_by_weights(self.position_weights)  # names an unknown one
        if self.steps < 1 or self.chunk < 1:
            raise ValueError(f"steps={self.steps} and chunk={self.chunk} must be at least 1")
        if self.feature_steps is not None and self.feature_steps < 1:
            raise ValueError(f"feature_steps={self.feature_steps} must be at least 1, or none for all")
        if not (0 <= self.noise < math.inf and 0 < self.step_decay < math.inf):
            raise ValueError(f"noise={self.noise:g} must be at least 0, and step_decay={self.step_decay:g} above 0")
        if self.step_weights and len(self.step_weights) != self.steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} numbers for steps={self.steps}: give one a step"
            )

        weighted = [name for name, _ in self.weights]
        for field, names in (("weights", weighted), ("late", [name for name, _ in self.late])):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{field} names {twice} twice: give it once")
        for name, share in self.late:
            if name not in [*weighted, STEPS] or not 0 < share < 1:
                raise ValueError(
                    f"late={name}:{share:g}: give a loss of weights ({', '.join(weighted)}) or {STEPS}, and a share of "
                    "the run's updates above 0 and below 1"
                )
            if name == STEPS and (self.steps == 1 or self.per_step[0] == 0):
                why = "steps is 1, so none can join" if self.steps == 1 else "the first step counts nothing"
                raise ValueError(f"late={name}:{share:g}: {why}: change steps, or leave it out")
        if self.late and set(weighted) <= {name for name, _ in self.late}:
            raise ValueError("late names every loss of weights: one of them must count from the beginning")

    def stages(self, steps: int) -> list[tuple[int, Objective]]:
        """Returns the objectives of a run of so many steps in order, each with its first step, from 0."""
        # Whatever is late joins for the last update at least.
        begin = {name: min(max(1, round(share * steps)), max(steps - 1, 0)) for name, share in self.late}
        return [(first, self._joined(first, begin)) for first in sorted({0, *begin.values()})]

    def _joined(self, update: int, begin: dict[str, int]) -> Objective:
        """Returns the objective of an update, with what has joined by then."""
        weights = tuple((name, weight) for name, weight in self.weights if begin.get(name, 0) <= update)
        steps = self.steps if begin.get(STEPS, 0) <= update else 1
        return dataclasses.replace(self, late=(), weights=weights, steps=steps, step_weights=self.step_weights[:steps])

    @property
    def per_step(self) -> tuple[float, ...]:
        """Weight of each draft step."""
        return self.step_weights or tuple(self.step_decay**j for j in range(self.steps))

    @property
    def additive(self) -> bool:
        """Returns whether the loss is a sum over tokens with weights known before any is scored."""
        return self.position_weights == "none" and all(combiner(name) is mean for name, _ in self.weights)


def combiner(name: str) -> Callable[[Array, Array], Array]:
    """Returns the function from a loss's sums `[M]` and their weight to its mean."""
    return mean if name in FEATURE_LOSSES else logit_loss(name).combine


def steps_of(name: str, objective: Objective) -> tuple[float, ...]:
    """Returns the weight of each step of a loss; a feature loss may have fewer of them."""
    return objective.per_step[: objective.feature_steps if name in FEATURE_LOSSES else None]
