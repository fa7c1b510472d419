"""All that a report shows of a search: the best tree at one batch and context, of every size, and over a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.flags import SearchFlags
from jaxspec.lab.forest import Path as NodePath
from jaxspec.lab.replay import node_shares
from jaxspec.lab.search import Choice, Rated, Search
from jaxspec.trees import StaticTree

MOST_SIZES = 64
"""Sizes of trees in a curve."""

Cell = tuple[int, int]
"""A batch and a context."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a profile and a file of costs on a page."""

    profile: str
    machine: str
    whole: str
    """Both, or the machine alone where all is of one profile."""


@dataclasses.dataclass(frozen=True)
class SearchFinding:
    """A search in one profile with one file of costs."""

    names: Names
    flags: SearchFlags
    search: Search
    cost: RoundCost
    choice: Choice
    by_nodes: list[Rated]
    """The fastest tree of each number of nodes; plain decoding first."""
    by_depth: list[Rated]
    """The fastest tree of each depth."""
    shares: dict[NodePath, float]
    """Share of rounds that accept each node of the chosen tree."""
    sensitivity: list[dict[str, Any]]
    batches: list[int]
    contexts: list[int]
    cells: Mapping[Cell, Choice]
    """The best trees of batches and contexts."""
    refused: Mapping[Cell, str]
    """Batches and contexts without one, and why."""

    @property
    def speedup(self) -> float:
        """Tokens a second over those of plain decoding."""
        return self.choice.chosen.tokens_per_second.value / self.choice.plain.tokens_per_second.value

    def row(self) -> dict[str, Any]:
        """Returns the search and its figures as JSON's types."""
        return {
            "profile": self.flags.profile,
            "cost": self.flags.cost,
            **self.choice.chosen.row(),
            "plain_tokens_per_second": self.choice.plain.tokens_per_second.value,
            "speedup": self.speedup,
            "shapes_tried": self.search.candidates.tried,
            "made_from": self.flags.made_from(self.search),
        }


def name_files(profiles: Sequence[Path], costs: Mapping[Path, str]) -> dict[tuple[Path, Path], Names]:
    """Returns the names of each profile and each file of costs, given with its device and source: no two alike."""
    stems = [path.stem for path in profiles]
    machines = list(costs.values())
    by_profile = {path: path.stem if stems.count(path.stem) == 1 else str(path) for path in profiles}
    by_cost = {path: name if machines.count(name) == 1 else f"{name}, {path.name}" for path, name in costs.items()}
    if len(set(by_cost.values())) < len(by_cost):
        by_cost = {path: f"{name}, {path}" for path, name in costs.items()}
    return {
        (p, c): Names(mine, theirs, theirs if len(profiles) == 1 else f"{mine} on {theirs}")
        for p, mine in by_profile.items()
        for c, theirs in by_cost.items()
    }


def machine_of(flags: SearchFlags) -> str:
    """Returns the device of costs, their source, and the target where the facts name one."""
    facts = flags.inputs.costs.facts
    row = flags.inputs.costs.rows[0]
    return f"{facts.get('device') or row.device} ({facts.get('source') or row.source})"


def find(
    flags: SearchFlags,
    names: Names,
    at: tuple[int | None, int | None],
    over: tuple[Sequence[int] | None, Sequence[int] | None],
) -> SearchFinding:
    """Returns a search at a batch and context, and over a grid of them; None is what the costs have.

    Batches and contexts of the grid that costs or limits refuse are kept with the reason. Raises ValueError where the
    batch and context asked for are refused.
    """
    known = flags.cost_grid
    batches, contexts = (list(given or known[i]) for i, given in enumerate(over))
    batch, context = _place(at, known)
    _allow(flags, batch, context)
    refused: dict[Cell, str] = {}
    for cell in [(b, c) for c in contexts for b in batches]:
        try:
            _allow(flags, *cell)
        except ValueError as problem:
            refused[cell] = str(problem)
    cells = [(b, c) for c in contexts for b in batches if (b, c) not in refused]
    search = flags.search([(batch, context), *cells])
    cost = flags.cost_at(batch, context)
    choice, forest = search.choose(cost), search.candidates.forest
    return SearchFinding(
        names,
        flags,
        search,
        cost,
        choice,
        by_nodes=best_by(search, cost, forest.nodes_S),
        by_depth=best_by(search, cost, forest.depth_S),
        shares=node_shares(search.reporting, choice.chosen.shape),
        sensitivity=search.sensitivity(cost, choice.index),
        batches=batches,
        contexts=contexts,
        cells={cell: search.choose(flags.cost_at(*cell)) for cell in cells},
        refused=refused,
    )


def _place(at: tuple[int | None, int | None], known: tuple[tuple[int, ...], tuple[int, ...]]) -> Cell:
    """Returns the batch and context given, or the least batch and the middle context of the costs."""
    (batch, context), (batches, contexts) = at, known
    return batch or batches[0], context or contexts[len(contexts) // 2]


def _allow(flags: SearchFlags, batch: int, context: int) -> None:
    """Raises ValueError naming the file of costs where a batch and context are beyond it, or beyond the memory."""
    try:
        flags.limits.allow(flags.cost_at(batch, context))
    except ValueError as problem:
        raise ValueError(f"{flags.cost}: {problem}") from problem


def best_by(search: Search, cost: RoundCost, size_S: np.ndarray) -> list[Rated]:
    """Returns the fastest shape of each size, chosen on one half of the prompts and rated on the other."""
    rate_S = search.candidates.rates(cost, search.limits)
    sizes = np.unique(size_S[rate_S > 0])
    if len(sizes) > MOST_SIZES:
        sizes = sizes[np.unique(np.linspace(0, len(sizes) - 1, MOST_SIZES).round().astype(int))]
    best = [int(np.argmax(np.where(size_S == size, rate_S, -1.0))) for size in sizes]
    return [search.rate(StaticTree(search.candidates.forest.shapes[index]), cost) for index in best]
