"""The search for the tree of the most tokens per second, by replay on a profile and a cost model.

Shapes are chosen on one half of the prompts and reported on the other, so that the best of thousands is not believed
for its luck. Plain decoding is always among them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluation.statistics import Counts, Interval, ratio_interval, tau_interval
from jaxspec.lab.best_first import BestFirstGrid, find_best_first
from jaxspec.lab.candidates import MOST_SHAPES, Limits, ReplayedShapes, find_candidates
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.forest import Shape
from jaxspec.lab.grown import ReplayedTree, growable, replay_tree, sizes_of
from jaxspec.lab.profile import Profile, split_prompts
from jaxspec.trees import StaticTree, chain

NEAR = 0.99
"""Least share of the best rate at which a smaller tree is taken, where the prompts cannot tell the two apart."""
ERROR = 0.1
"""Relative error of acceptance and costs that a choice is tried against."""


@dataclasses.dataclass(frozen=True)
class Rated:
    """A tree with what it makes of a batch and context."""

    tree: ReplayedTree
    """The tree as decoding takes it."""
    batch: int
    context: int
    tau: Interval
    """Tokens per target call on the reporting prompts."""
    round_seconds: float

    @property
    def shape(self) -> Shape:
        """Paths of a static tree; one that is grown anew each round has none."""
        return self.tree.paths if isinstance(self.tree, StaticTree) else ()

    @property
    def plain(self) -> bool:
        """Returns whether it is plain decoding."""
        return self.tree.nodes == 1

    @property
    def tokens_per_second(self) -> Interval:
        """Tokens of all rows a second, with tau's interval."""
        return Interval(*(self.batch * t / self.round_seconds for t in self.tau))

    @property
    def seconds_per_token(self) -> float:
        """Seconds that one row waits for a token."""
        return self.round_seconds / self.tau.value

    def row(self) -> dict[str, Any]:
        """Returns the tree and its figures as JSON's types."""
        speed = self.tokens_per_second
        return {
            "spec": self.tree.spec,
            "nodes": self.tree.nodes,
            "depth": self.tree.depth,
            "batch": self.batch,
            "context": self.context,
            "expected_tau": self.tau.value,
            "tau_low": self.tau.low,
            "tau_high": self.tau.high,
            "predicted_tokens_per_second": speed.value,
            "predicted_tokens_per_second_low": speed.low,
            "predicted_tokens_per_second_high": speed.high,
            "seconds_per_token": self.seconds_per_token,
            "round_seconds": self.round_seconds,
        }


def rate_tree(tree: ReplayedTree, cost: RoundCost, counts: Counts) -> Rated:
    """Returns a tree's figures from its counts on some prompts. Raises ValueError beyond the costs."""
    seconds = float(cost.round_seconds(*sizes_of(tree))[0])
    return Rated(tree, cost.batch, cost.context, tau_interval(counts), seconds)


class Choice(NamedTuple):
    """The tree chosen for a batch and context."""

    chosen: Rated
    runner_up: Rated | None
    """The next best shape; None where nothing else fits."""
    plain: Rated
    index: int
    """Place of the chosen shape among the candidates."""
    choosing: tuple[float, float, float]
    """Tokens a second of the chosen tree, the runner-up (NaN without) and plain decoding on the prompts that chose."""

    @property
    def slower(self) -> str | None:
        """A sentence where the prompts that report find the tree slower than plain decoding."""
        chosen, plain = self.chosen.tokens_per_second.value, self.plain.tokens_per_second.value
        if chosen >= plain:
            return None
        return (
            f"the prompts that report find the chosen tree slower than plain decoding, {chosen:.4g} tokens/s against "
            f"{plain:.4g}, and those that chose {self.choosing[0]:.4g} against {self.choosing[2]:.4g}: profile more "
            "prompts, or try it with --measure"
        )

    @property
    def doubt(self) -> str | None:
        """A sentence where the prompts that report do not confirm the choice over plain decoding or the runner-up."""
        if self.slower is not None or self.runner_up is None:
            return self.slower
        reported = [rated.tokens_per_second.value for rated in (self.chosen, self.runner_up)]
        if reported[1] <= reported[0]:
            return None
        return (
            f"the prompts that report have the runner-up faster, {reported[1]:.4g} tokens/s against {reported[0]:.4g}, "
            f"and those that chose {self.choosing[1]:.4g} against {self.choosing[0]:.4g}: they do not tell the two "
            "apart; profile more prompts, or try both with --measure"
        )


class GrownChoice(NamedTuple):
    """The best-first tree chosen for a batch and context, where the drafter is of one pass."""

    rated: Rated
    choosing: float
    """Tokens a second on the prompts that chose."""


class Search:
    """ReplayedShapes replayed on one half of a profile's prompts, and reports on the other half.

    `costs` are all that the search is asked about later; shapes are drawn for them. Raises ValueError for a profile
    that cannot be replayed, of one prompt, or without text.
    """

    def __init__(
        self, profile: Profile, costs: Sequence[RoundCost], limits: Limits, *, most: int = MOST_SHAPES, seed: int = 0
    ) -> None:
        choosing, reporting = split_prompts(profile, seed)
        self.limits, self.costs = limits, costs
        self.choosing, self.reporting = profile.of(choosing), profile.of(reporting)
        self.candidates: ReplayedShapes = find_candidates(self.choosing, costs, limits, most=most)
        self.counts = functools.cache(functools.partial(replay_tree, self.reporting))

    @property
    def left_out(self) -> str | None:
        """A sentence where shapes could not be tried, for the costs do not go so far."""
        return left_out(self.candidates.unpriced)

    def choose(self, cost: RoundCost) -> Choice:
        """Returns the tree for a batch and context: the fastest, or the smallest that prompts cannot tell from it.

        The prompts that choose decide alone, also between trees and plain decoding, which is always among the shapes.
        What the others report is therefore no best of several figures, and may be below plain decoding's.
        """
        rate_S = self.candidates.rates(cost, self.limits)
        index = pick(self.candidates, rate_S)
        shapes = self.candidates.forest.shapes
        plain, chosen = self.rate(chain(0), cost), self.rate(StaticTree(shapes[index]), cost)
        order = [int(i) for i in np.argsort(-rate_S, kind="stable")[:2] if rate_S[i] > 0]
        other = next((i for i in order if i != index), None)
        runner_up = None if other is None else self.rate(StaticTree(shapes[other]), cost)
        before = (rate_S[index], float("nan") if other is None else rate_S[other], rate_S[0])
        return Choice(chosen, runner_up, plain, index, (float(before[0]), float(before[1]), float(before[2])))

    def rate(self, tree: ReplayedTree, cost: RoundCost) -> Rated:
        """Returns any tree's figures on the reporting prompts. Raises ValueError beyond the profile or the costs."""
        return rate_tree(tree, cost, self.counts(tree))

    @functools.cached_property
    def grid(self) -> BestFirstGrid | None:
        """Best-first trees of all sizes on the prompts that choose; None where the profile cannot replay them."""
        return find_best_first(self.choosing, self.costs, self.limits) if growable(self.choosing) else None

    def choose_best_first(self, cost: RoundCost) -> GrownChoice | None:
        """Returns the fastest best-first tree for a batch and context, chosen on one half and reported on the other.

        None for drafters that are not of one pass, and where limits and costs leave no such tree.
        """
        if self.grid is None:
            return None
        rate_S = self.grid.rates(cost, self.limits)
        if not np.any(rate_S > 0):
            return None
        index = int(rate_S.argmax())
        return GrownChoice(self.rate(self.grid.trees[index], cost), float(rate_S[index]))

    def sensitivity(self, cost: RoundCost, index: int) -> list[dict[str, Any]]:
        """Returns how the choice changes where acceptance or a part of the cost is off by `ERROR`.

        A row names the error, the tree that would be best then, and the share of its rate that the chosen tree loses.
        """
        return [self._under(name, factor, cost, index) for name in ERRORS for factor in (1 - ERROR, 1 + ERROR)]

    def _under(self, name: str, factor: float, cost: RoundCost, index: int) -> dict[str, Any]:
        found, forest = self.candidates, self.candidates.forest
        rate_S = found.rates(cost if name == "acceptance" else cost.scaled(**{name: factor}), self.limits)
        if name == "acceptance":
            # Replay holds what happened; a table says by how much it would be more or less.
            rate_S = rate_S * forest.sums(found.table.scaled(factor).values(forest))
            rate_S = rate_S / forest.sums(found.table.values(forest))
        best = int(rate_S.argmax())
        tree = StaticTree(forest.shapes[best])
        return {
            "error": name,
            "factor": factor,
            "predicted_tokens_per_second": float(rate_S[index]),
            "best_spec": tree.spec,
            "best_nodes": tree.nodes,
            "best_tokens_per_second": float(rate_S[best]),
            "lost": float(1 - rate_S[index] / rate_S[best]),
        }


def left_out(unpriced: int) -> str | None:
    """Returns a sentence about so many shapes that costs do not know; None for none."""
    if not unpriced:
        return None
    return (
        f"{unpriced:,} shapes were not tried, for the costs do not know paths so long or levels so wide: price more "
        "--paths and --widths with `jaxspec lab cost`"
    )


ERRORS = ("acceptance", "target", "draft", "other")
"""Errors that a choice is tried against: of the rates, and of the parts of a round's cost."""


def pick(found: ReplayedShapes, rate_S: np.ndarray) -> int:
    """Returns the shape of the highest rate or, of those near it that the prompts cannot tell from it, the smallest.

    Near is `NEAR` of the rate; told apart are rates whose paired interval over resampled prompts leaves out 1. Ties go
    to fewer nodes, then to fewer levels.
    """
    nodes_S, depth_S = found.forest.nodes_S, found.forest.depth_S
    best = int(np.lexsort((depth_S, nodes_S, -rate_S))[0])
    near = np.flatnonzero((rate_S >= NEAR * rate_S[best]) & (nodes_S < nodes_S[best]))
    for index in near[np.lexsort((-rate_S[near], nodes_S[near]))]:
        # Rate over tau is what the cost makes of a call, without error over prompts.
        per_tau = (rate_S[index] / found.tau_S[index]) / (rate_S[best] / found.tau_S[best])
        if ratio_interval(_counts(found, int(index)), _counts(found, best)).high * per_tau >= 1:
            return int(index)
    return best


def _counts(found: ReplayedShapes, index: int) -> Counts:
    return Counts(found.tokens_P, found.calls_SP[index], np.zeros((len(found.tokens_P), 0)))


def frontier(points: Iterable[Rated]) -> list[Rated]:
    """Returns the points that no other beats in both tokens per second and seconds per token, by batch."""
    ordered = sorted(points, key=lambda p: (p.seconds_per_token, -p.tokens_per_second.value))
    kept: list[Rated] = []
    for point in ordered:
        if not kept or point.tokens_per_second.value > kept[-1].tokens_per_second.value:
            kept.append(point)
    return kept
