"""Slow and plain references of the tree lab: all trees of a size, and a replay that walks token by token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from jaxspec.lab.forest import Path, Shape
from jaxspec.lab.profile import Profile


def every_tree(nodes: int, depth: int, ranks: int, *, skip: bool = False) -> Iterator[list[Path]]:
    """Yields every tree of exactly `nodes` nodes, root included; siblings are the first ranks, or any with `skip`."""
    if nodes == 1:
        yield [()]
    elif depth > 0:
        for count in range(1, min(ranks, nodes - 1) + 1):
            families = itertools.combinations(range(ranks), count) if skip else [tuple(range(count))]
            for family in families:
                yield from _of_family(family, nodes - 1, depth - 1, ranks, skip)


def _of_family(family: tuple[int, ...], nodes: int, depth: int, ranks: int, skip: bool) -> Iterator[list[Path]]:
    """Yields the trees whose root has these children, `nodes` nodes below the root shared among them."""
    for sizes in itertools.product(range(1, nodes + 1), repeat=len(family)):
        if sum(sizes) == nodes:
            below = [list(every_tree(size, depth, ranks, skip=skip)) for size in sizes]
            for chosen in itertools.product(*below):
                yield [(), *((r, *p) for r, paths in zip(family, chosen, strict=True) for p in paths)]


def value_of(path: Path, rate_DK: np.ndarray) -> float:
    """Returns the product of the rates along a path."""
    return float(np.prod([rate_DK[depth, rank] for depth, rank in enumerate(path)]))


def total_of(paths: list[Path] | Shape, rate_DK: np.ndarray) -> float:
    """Returns the sum of the values of a list of paths."""
    return sum(value_of(path, rate_DK) for path in paths)


def slow_replay(profile: Profile, shape: Shape) -> list[tuple[int, list[int]]]:
    """Returns tokens, and the accepted tokens of every round, of each prompt."""
    known, found = {(), *shape}, []
    for prompt in range(len(profile.sources)):
        rank_TD = profile.rank_TD[profile.prompt_T == prompt]
        at, rounds = 0, []
        while at < len(rank_TD):
            path: Path = ()
            while len(path) < rank_TD.shape[1] and (*path, int(rank_TD[at, len(path)])) in known:
                path = (*path, int(rank_TD[at, len(path)]))
            rounds.append(len(path))
            at += 1 + len(path)
        found.append((len(rank_TD), rounds))
    return found


def random_shape(rng: np.random.Generator, nodes: int, depth: int, ranks: int) -> list[Path]:
    """Returns a random tree with its root, of up to `nodes` nodes; ranks may be left out."""
    paths: list[Path] = [()]
    for _ in range(4 * nodes):
        path = (*paths[rng.integers(len(paths))], int(rng.integers(ranks)))
        if len(paths) < nodes and len(path) <= depth and path not in paths:
            paths.append(path)
    return paths


def random_rates(rng: np.random.Generator, depth: int, ranks: int, *, falling: bool = False) -> np.ndarray:
    """Returns `[depth, ranks]` rates; `falling` along the rank."""
    rate_DK = rng.dirichlet(np.ones(ranks + 1), depth)[:, :ranks]
    return -np.sort(-rate_DK, axis=1) if falling else rate_DK
