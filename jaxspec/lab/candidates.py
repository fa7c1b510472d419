"""Candidate shapes for a search, drawn from tables of acceptance, and their target calls by replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxspec.lab.acceptance import AcceptanceTable, acceptance_table
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.forest import Forest, Shape, beginnings, make_forest
from jaxspec.lab.optimal import beam, heap, solve
from jaxspec.lab.profile import Profile
from jaxspec.lab.replay import check_replayable, replay_calls, rounds_of, tokens_of

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Most nodes expanded a level, tried one after another."""
MOST_SHAPES = 10_000
"""Shapes that a search replays."""
GIB = 2**30
FIRST_SHAPES = 1000
"""Shapes of the first pass, which tells where rounds begin."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the trees that a search tries. Raises ValueError for those that leave nothing."""

    nodes: int = 64
    """Most nodes, root included."""
    depth: int = 8
    """Most levels."""
    branch: int | None = None
    """Most children of a node; 1: chains alone."""
    multiple: int = 1
    """Nodes, root included, are a multiple of this, or 1."""
    cache_bytes: int | None = None
    """Most bytes of the caches, with a round's nodes."""
    bytes_per_token: int | None = None
    """Bytes that one token of one row takes in the caches of target and drafter."""

    def __post_init__(self) -> None:
        for name in ("nodes", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.depth < 0 or (self.branch is not None and self.branch < 1):
            raise ValueError("trees need a depth of at least 0 and a branch limit of at least 1")
        if self.cache_bytes is not None and not self.bytes_per_token:
            raise ValueError("a limit of the caches needs the bytes that a token takes there")

    def allow(self, cost: RoundCost) -> int:
        """Returns the most nodes that limits, costs and the caches' memory allow for a batch and context.

        Raises ValueError where plain decoding does not fit either.
        """
        most = min(self.nodes, cost.most_nodes)
        self.check_memory(cost, 1)
        if self.cache_bytes is None or self.bytes_per_token is None:
            return most
        return min(most, self.cache_bytes // (self.bytes_per_token * cost.batch) - cost.context)

    def check_memory(self, cost: RoundCost, nodes: int) -> None:
        """Raises ValueError where the caches' memory does not hold a batch and context with a round's nodes."""
        if self.cache_bytes is None or self.bytes_per_token is None:
            return
        needed = cost.batch * (cost.context + nodes) * self.bytes_per_token
        if needed > self.cache_bytes:
            raise ValueError(
                f"{cost.batch} rows of {cost.context} tokens with {nodes} of the round take {needed / GIB:.4g} GiB, "
                f"and the caches may take {self.cache_bytes / GIB:.4g}: lower the batch or the context, or give a "
                "greater --max-cache-gib"
            )


@dataclasses.dataclass(frozen=True)
class ReplayedShapes:
    """Shapes with their target calls on the prompts that choose among them. Plain decoding is the first shape."""

    forest: Forest
    calls_SP: np.ndarray
    tokens_P: np.ndarray
    table: AcceptanceTable
    """Rates at the starts where rounds begin."""
    tried: int
    """Shapes that were costed by tables or replayed."""
    unpriced: int = 0
    """Shapes that were left out: their paths or levels are larger than any costs know."""

    @property
    def tau_S(self) -> np.ndarray:
        """Tokens per target call of each shape, over all prompts."""
        return self.tokens_P.sum() / self.calls_SP.sum(1)

    def rates(self, cost: RoundCost, limits: Limits) -> np.ndarray:
        """Returns `[S]`: tokens per second of all rows together; 0 where limits or costs leave a shape out."""
        return rates_at(cost, limits, self.tau_S, (self.forest.nodes_S, self.forest.width_SD))


def rates_at(cost: RoundCost, limits: Limits, tau_S: np.ndarray, sizes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns `[S]`: tokens per second of trees of these nodes and widths; 0 where limits or costs leave one out."""
    (nodes_S, width_SD), rate_S = sizes, np.zeros(len(tau_S))
    fits_S = (nodes_S <= limits.allow(cost)) & cost.known(nodes_S, width_SD)
    seconds_S = cost.round_seconds(nodes_S[fits_S], width_SD[fits_S])
    rate_S[fits_S] = cost.batch * tau_S[fits_S] / seconds_S
    return rate_S


def find_candidates(
    profile: Profile, costs: Sequence[RoundCost], limits: Limits, *, most: int = MOST_SHAPES
) -> ReplayedShapes:
    """Returns up to `most` shapes, those that tables rate best at the given costs, replayed on a profile.

    Two passes: tables over all starts first; then tables over the starts where the rounds of the first pass's best
    trees begin, since a text's hard places see more rounds than its easy ones. Raises ValueError for a profile that
    cannot be replayed.
    """
    check_replayable(profile)
    if not tokens_of(profile).sum():
        raise ValueError("the profile holds no starts: its answers need two tokens at least")
    depth = min(limits.depth, profile.rank_TD.shape[1])
    limits = dataclasses.replace(limits, depth=depth, nodes=min(limits.nodes, max(limits.allow(c) for c in costs)))
    skip = profile.facts.get("mode", "topk") == "topk"
    text, kept = (acceptance_table(profile, given=given) for given in ("text", "kept"))
    # Side branches may be harder than the main one for any drafter; the replay says where that counts.
    side = acceptance_table(profile, given="kept", by_parent=True)
    drawn = set(_drawn([text, kept, side], _loose(profile, None), limits, skip))
    first, _ = _best_rated(drawn, kept, costs, limits, min(most, FIRST_SHAPES))
    replayed = _replayed(profile, first, kept, len(drawn))
    best = {int(replayed.rates(cost, limits).argmax()) for cost in costs}
    starts = np.concatenate([rounds_of(profile, replayed.forest.shapes[i])[0] for i in best])
    rounds = acceptance_table(profile, starts=starts, given="kept")
    sides = acceptance_table(profile, starts=starts, given="kept", by_parent=True)
    drawn.update(_drawn([rounds, sides], _loose(profile, starts), limits, skip))
    best_rated, unpriced = _best_rated(drawn, rounds, costs, limits, most)
    replayed = _replayed(profile, best_rated, rounds, len(drawn) - unpriced)
    return dataclasses.replace(replayed, unpriced=unpriced)


def _loose(profile: Profile, starts: np.ndarray | None) -> AcceptanceTable:
    """Returns rates in the order of rank that the profile has, which the dynamic program takes as they are."""
    return acceptance_table(profile, starts=starts, given="kept", monotone=False, by_parent=False)


def _drawn(tables: Sequence[AcceptanceTable], loose: AcceptanceTable, limits: Limits, skip: bool) -> Iterator[Shape]:
    """Yields the shapes of heap and beam, the dynamic program's, and all chains, within the limits."""
    yield ()
    sizes = [n for n in range(2, limits.nodes + 1) if n % limits.multiple == 0]
    for depth in range(1, limits.depth + 1):
        if depth + 1 in sizes:
            yield tuple((0,) * d for d in range(1, depth + 1))
        for table in tables:
            cut = table.cut(depth, limits.branch)
            orders = [heap(cut, limits.nodes)] + [beam(cut, limits.nodes, width) for width in WIDTHS]
            for order in orders:
                yield from beginnings([path for path, _ in order], sizes)
        rate_DK = loose.cut(depth, limits.branch).rate_DK
        if np.any(np.diff(rate_DK, axis=1) > 0) and sizes:
            solution = solve(rate_DK, sizes[-1], skip=skip)
            yield from (solution.shape(n) for n in sizes if solution.value_M[n] > -np.inf)


def _best_rated(
    shapes: Iterable[Shape], table: AcceptanceTable, costs: Sequence[RoundCost], limits: Limits, most: int
) -> tuple[list[Shape], int]:
    """Returns plain decoding and the shapes that a table rates best at any of the costs, `most` in all.

    Returns the number of shapes, too, that none of the costs knows.
    """
    ordered = sorted(shapes, key=lambda shape: (len(shape), shape))
    ordered = [(), *(shape for shape in ordered if shape)]
    forest = make_forest(ordered)
    known_S = np.any([cost.known(forest.nodes_S, forest.width_SD) for cost in costs], axis=0)
    unpriced = int((~known_S).sum())
    if len(ordered) - unpriced <= most:
        return [ordered[i] for i in np.flatnonzero(known_S)], unpriced
    expected_S = forest.sums(table.values(forest))
    best_S = np.zeros(len(ordered))
    for cost in costs:
        # One call of one prompt that emits the table's tokens: rates by the table.
        rate_S = ReplayedShapes(forest, 1 / expected_S[:, None], np.ones(1), table, 0).rates(cost, limits)
        best_S = np.maximum(best_S, rate_S / rate_S.max())
    best_S[0] = np.inf
    best_S[~known_S] = -np.inf
    return [ordered[i] for i in np.sort(np.argsort(-best_S, kind="stable")[:most])], unpriced


def _replayed(profile: Profile, shapes: Sequence[Shape], table: AcceptanceTable, tried: int) -> ReplayedShapes:
    forest = make_forest(shapes)
    return ReplayedShapes(forest, replay_calls(profile, forest), tokens_of(profile), table, tried)
