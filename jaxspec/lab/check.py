"""Predictions held to the clock: trees that were decoded at several batches, beside what the lab foretold.

A batch ends with its last row, so rows that end early idle in a measurement. A server refills them, and the lab
predicts that: tokens/s are therefore the rows times tau by the seconds of a round, on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.lab.candidates import Limits, find_candidates
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.forest import Shape
from jaxspec.lab.profile import Profile
from jaxspec.lab.search import Rated
from jaxspec.lab.trial import TriedTree


class CheckedTree(NamedTuple):
    """A tree at one batch, predicted and measured."""

    predicted: Rated
    measured: TriedTree

    @property
    def tokens_per_second(self) -> float:
        """Measured tokens a second while all rows write."""
        return self.predicted.batch * self.measured.tau / self.measured.round_seconds

    @property
    def errors(self) -> dict[str, float]:
        """Predicted over measured, less 1: tokens a second, and the two figures that they are made of."""
        predicted, measured = self.predicted, self.measured
        return {
            "tokens_per_second": predicted.tokens_per_second.value / self.tokens_per_second - 1,
            "tau": predicted.tau.value / measured.tau - 1,
            "round_seconds": predicted.round_seconds / measured.round_seconds - 1,
        }

    def row(self) -> dict[str, Any]:
        """Returns all figures as JSON's types."""
        return {
            **self.predicted.row(),
            "measured_tau": self.measured.tau,
            "measured_round_seconds": self.measured.round_seconds,
            "measured_tokens_per_second": self.tokens_per_second,
            "measured_tokens_per_second_until_the_last_row_ends": self.measured.tokens_per_second,
            **{f"error_of_{name}": error for name, error in self.errors.items()},
        }


def trees_of_sizes(profile: Profile, cost: RoundCost, limits: Limits, count: int) -> list[Shape]:
    """Returns `count` trees, or as many as there are: each the fastest of its number of nodes by prediction.

    The numbers of nodes are spread evenly on a logarithm from the least to the greatest.
    """
    found = find_candidates(profile, [cost], limits)
    rate_S, nodes_S = found.rates(cost, limits), found.forest.nodes_S
    sizes = np.unique(nodes_S[(nodes_S > 1) & (rate_S > 0)])
    if not len(sizes):
        raise ValueError("no tree fits the limits and the costs: give a greater --max-nodes, or costs of more nodes")
    return [found.forest.shapes[int(np.where(nodes_S == size, rate_S, -1).argmax())] for size in _spread(sizes, count)]


def _spread(sizes: np.ndarray, count: int) -> list[int]:
    """Returns up to `count` of the ascending sizes, each time the one nearest to an even step of the logarithm."""
    left, taken = list(map(int, sizes)), []
    for step in np.geomspace(left[0], left[-1], min(count, len(left))):
        taken.append(min(left, key=lambda size: abs(np.log(size / step))))
        left.remove(taken[-1])
    return sorted(taken)


def rows_of(checked: Sequence[CheckedTree]) -> list[dict[str, Any]]:
    """Returns the rows of one or more batches; tokens a second stand over those of the batch's plain decoding too.

    There a machine that is slower on one day than on another changes nothing.
    """
    plain = {c.predicted.batch: c for c in checked if c.predicted.plain}
    rows = []
    for one in checked:
        base = plain[one.predicted.batch]
        predicted = one.predicted.tokens_per_second.value / base.predicted.tokens_per_second.value
        measured = one.tokens_per_second / base.tokens_per_second
        ratios = {"predicted_speedup": predicted, "measured_speedup": measured}
        rows.append({**one.row(), **ratios, "error_of_speedup": predicted / measured - 1})
    return rows


def summarize(checked: Sequence[CheckedTree]) -> dict[str, Any]:
    """Returns how far predictions of one or more batches are from measurements.

    `median_error` has the median size of each error, `worst_error` the greatest with its sign, and `bias` the median
    with its sign; those of the speed-up are of drafted trees. `picked_share` is by batch what the tree of the highest
    prediction, plain decoding included, reached of the best measured one.
    """
    errors = {name: np.array([c.errors[name] for c in checked]) for name in checked[0].errors}
    drafted = [row["error_of_speedup"] for row in rows_of(checked) if row["nodes"] > 1]
    errors["speedup"] = np.array(drafted or [0.0])
    shares = {}
    for batch in dict.fromkeys(c.predicted.batch for c in checked):
        mine = [c for c in checked if c.predicted.batch == batch]
        picked = max(mine, key=lambda c: c.predicted.tokens_per_second.value)
        shares[str(batch)] = picked.tokens_per_second / max(c.tokens_per_second for c in mine)
    return {
        "median_error": {name: float(np.median(np.abs(values))) for name, values in errors.items()},
        "worst_error": {name: float(max(values, key=abs)) for name, values in errors.items()},
        "bias": {name: float(np.median(values)) for name, values in errors.items()},
        "picked_share": shares,
    }
