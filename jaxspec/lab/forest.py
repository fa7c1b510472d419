"""Many tree shapes in one: the union of their nodes as arrays, so that questions about all shapes are look-ups."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Path = tuple[int, ...]
"""Ranks from 0 of the children on the way from the root to a node; `()` is the root."""
Shape = tuple[Path, ...]
"""A static tree: the paths of its drafted nodes, by length and then in order. `()` is the one node, plain decoding."""


def shape_of(paths: Iterable[Path]) -> Shape:
    """Returns the shape with these nodes, the root among them or not."""
    return tuple(sorted({path for path in paths if path}, key=lambda path: (len(path), path)))


def beginnings(order: Sequence[Path], sizes: Iterable[int]) -> Iterator[Shape]:
    """Yields the shapes of the first `n` paths of an order for each of the ascending sizes; the root comes first."""
    keys: list[tuple[int, Path]] = []
    paths: list[Path] = []
    taken = 1
    for size in sizes:
        if size > len(order):
            return
        for path in order[taken:size]:
            key = len(path), path
            place = bisect.bisect(keys, key)
            keys.insert(place, key)
            paths.insert(place, path)
        taken = max(taken, size)
        yield tuple(paths)


@dataclasses.dataclass(frozen=True)
class Forest:
    """Shapes `S` and the union `U` of their nodes, the root first and parents before their children."""

    shapes: tuple[Shape, ...]
    parent_U: np.ndarray
    """0 for the root itself."""
    depth_U: np.ndarray
    rank_U: np.ndarray
    """-1 for the root."""
    member_M: np.ndarray
    """Nodes of the shapes, one shape after another, without the root."""
    end_S: np.ndarray
    """End of each shape's nodes in `member_M`."""
    width_SD: np.ndarray
    """Nodes with children at each depth from 1 on: the widths of the draft's levels. The root's children are drafted by
    the drafter's `extend`; the deepest nodes expand nothing."""

    @functools.cached_property
    def nodes_S(self) -> np.ndarray:
        """Nodes of each shape, root included."""
        return 1 + np.diff(self.end_S, prepend=0)

    @functools.cached_property
    def depth_S(self) -> np.ndarray:
        """Depth of each shape."""
        return np.array([len(shape[-1]) if shape else 0 for shape in self.shapes])

    @functools.cached_property
    def child_UR(self) -> np.ndarray:
        """`[U, R]`: the node's child of each rank; -1 where no shape has it."""
        child = np.full((len(self.parent_U), int(self.rank_U.max(initial=-1)) + 2), -1, np.int32)
        drafted = np.arange(1, len(self.parent_U))
        child[self.parent_U[drafted], self.rank_U[drafted]] = drafted
        return child

    def members(self, first: int, last: int) -> np.ndarray:
        """Returns `[last - first, U]`: the nodes that are in each of these shapes, the root in all."""
        inside = np.zeros((last - first, len(self.parent_U)), bool)
        inside[:, 0] = True
        begin = self.end_S[first - 1] if first else 0
        rows = np.repeat(np.arange(last - first), self.nodes_S[first:last] - 1)
        inside[rows, self.member_M[begin : self.end_S[last - 1]]] = True
        return inside

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Returns `[last - first, U]`, int8: the depth of each node's deepest ancestor, or itself, in each shape."""
        length = self.members(first, last).astype(np.int8)
        length[:, 0] = 0
        ends = np.searchsorted(self.depth_U, np.arange(1, int(self.depth_U.max(initial=0)) + 2))
        for depth, (begin, end) in enumerate(itertools.pairwise(ends), 1):
            above = length[:, self.parent_U[begin:end]]
            length[:, begin:end] = np.where(length[:, begin:end] > 0, np.int8(depth), above)
        return length

    def sums(self, value_U: np.ndarray) -> np.ndarray:
        """Returns `[S]`: the sum of the values of each shape's nodes, the root's included."""
        whole = np.concatenate([[0.0], np.cumsum(value_U[self.member_M])])
        return value_U[0] + np.diff(whole[np.concatenate([[0], self.end_S])])


def make_forest(shapes: Sequence[Shape]) -> Forest:
    """Returns the forest of these shapes. Raises ValueError for a node without its parent."""
    union = [(), *sorted(set().union(*shapes), key=lambda path: (len(path), path))]
    place = {path: number for number, path in enumerate(union)}
    depth_U = np.array([len(path) for path in union], np.int32)
    member_M = np.array([place[path] for shape in shapes for path in shape], np.int64)
    end_S = np.cumsum([len(shape) for shape in shapes]).astype(np.int64)
    of_M = np.repeat(np.arange(len(shapes)), np.diff(end_S, prepend=0))
    above_M = np.array([place.get(path[:-1], -1) for path in union])[member_M]
    # A shape and a node as one number.
    own_M = np.sort(of_M * len(union) + member_M)
    inner_M = np.sort((of_M * len(union) + above_M)[above_M != 0])
    inner_I = inner_M[np.diff(inner_M, prepend=-1) != 0]  # quicker than np.unique, which hashes
    if np.any(above_M < 0) or not np.array_equal(inner_I, own_M[_find(own_M, inner_I)]):
        _refuse_orphan(shapes)
    width_SD = np.zeros((len(shapes), max(int(depth_U[-1]) - 1, 0)), np.int32)
    np.add.at(width_SD, (inner_I // len(union), depth_U[inner_I % len(union)] - 1), 1)
    rank_U = np.array([path[-1] if path else -1 for path in union], np.int32)
    parent_U = np.array([place[path[:-1]] for path in union], np.int32)
    return Forest(tuple(shapes), parent_U, depth_U, rank_U, member_M, end_S, width_SD)


def _find(sorted_M: np.ndarray, value_I: np.ndarray) -> np.ndarray:
    """Returns the places of values in a sorted array; that of another value where one is not there."""
    return np.minimum(np.searchsorted(sorted_M, value_I), max(len(sorted_M) - 1, 0))


def _refuse_orphan(shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        known = {(), *shape}
        for path in shape:
            if path[:-1] not in known:
                raise ValueError(f"tree path {path} stands without its parent {path[:-1]}")
