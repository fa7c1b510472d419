"""Enumerated mean accept lengths of the rules for drawn children equal those of the rules as the papers state them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from enumeration import PLAIN, RULES, SHAPES, Pair, TreeCase, measure

from jaxspec.base import DRAFT_MODES, DraftMode
from jaxspec.trees import chain

pytestmark = pytest.mark.usefixtures("compile_fully")


def renormalised(left: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Returns `left` with sum 1, or `otherwise` if nothing is left."""
    return left / left.sum() if left.sum() > 1e-14 else otherwise


@dataclass(frozen=True, eq=False)
class WrittenOut:
    """The mean accept length by recursion over draws, in plain Python: the rules as the papers state them."""

    mode: DraftMode
    p: list[np.ndarray]
    """The target's distributions after the paths of each length."""
    q: list[np.ndarray]
    """The draft's."""
    children: list[int]
    """Number of children of a node of each depth."""

    @property
    def vocab(self) -> int:
        return self.p[0].shape[-1]

    def draws(self, distribution: np.ndarray, count: int) -> list[tuple[tuple[int, ...], float]]:
        """Returns every sequence of draws, and its probability."""
        if self.mode == "topk":
            return [(tuple(np.argsort(-distribution, kind="stable")[:count].tolist()), 1.0)]
        found = [((), 1.0, distribution)]
        for _ in range(count):
            found = [((*t, x), w * s[x], self.after(s, x)) for t, w, s in found for x in range(self.vocab) if s[x] > 0]
        return [(t, w) for t, w, _ in found]

    def after(self, s: np.ndarray, x: int) -> np.ndarray:
        """Returns the distribution of the draw after `x`."""
        return renormalised(np.where(np.arange(self.vocab) == x, 0, s), s) if self.mode == "swor" else s

    def used(self, s: np.ndarray, x: int) -> np.ndarray:
        """Returns the distribution that `x` is tested against."""
        return np.eye(self.vocab)[x] if self.mode == "topk" else s

    def recursive_rejection(self, code: int = 0, d: int = 0) -> float:
        """Returns the mean accept length below a node that is accepted; its children are drawn on the way."""
        if d == len(self.children):
            return 0.0
        total = 0.0
        for tokens, weight in self.draws(self.q[d][code], self.children[d]):
            r, s, reach = self.p[d][code], self.q[d][code], weight
            for x in tokens:
                used = self.used(s, x)
                take = min(1.0, r[x] / used[x])
                total += reach * take * (1 + self.recursive_rejection(code * self.vocab + x, d + 1))
                reach *= 1 - take
                r, s = renormalised(np.maximum(r - used, 0), r), self.after(s, x)
        return total

    def traversal(self, code: int = 0, d: int = 0, rho: float = 1.0) -> float:
        """Returns the mean accept length gained below and at a node of weight `rho`; its own acceptance counts `d`."""
        if d == len(self.children):
            return rho * d
        total = 0.0
        for tokens, weight in self.draws(self.q[d][code], self.children[d]):
            b, s, reach, w = self.p[d][code], self.q[d][code], weight, rho
            for x in tokens:
                used = self.used(s, x)
                handed = min(1.0, w * b[x] / used[x])
                total += reach * self.traversal(code * self.vocab + x, d + 1, handed)
                reach *= 1 - handed
                left = np.maximum(w * b - used, 0)
                b, mass = renormalised(left, b), left.sum()
                w = mass / (mass + 1 - w) if mass + 1 - w > 1e-14 else 1.0
                s = self.after(s, x)
            total += reach * w * d
        return total

    def length(self, rule: str) -> float:
        return self.recursive_rejection() if rule == "recursive-rejection" else self.traversal()


def mixed_pair(seed: int, overlap: float, vocab: int, depth: int) -> Pair:
    """Returns a Dirichlet target, and a draft that is partly the target and partly another one."""
    rng = np.random.default_rng(seed)
    p = [rng.dirichlet(np.full(vocab, 0.7), (1, vocab**d)) for d in range(depth + 1)]
    q = [overlap * x + (1 - overlap) * rng.dirichlet(np.full(vocab, 0.7), (1, vocab**d)) for d, x in enumerate(p)]
    return [np.log(x) for x in p], [np.log(x) for x in q]


FAMILIES = {"chain": [1, 1, 1], "2x2": [2, 2]}


@functools.cache
def lengths(rule: str, mode: DraftMode, shape: str, overlap: float) -> np.ndarray:
    """Returns the enumerated mean accept lengths of 40 pairs."""
    s, found = SHAPES[shape], []
    with jax.enable_x64(True):
        for seed in range(40):
            tables = mixed_pair(seed, overlap, s.vocab, s.policy.depth)
            found.append(measure(rule, mode, s, tables, [PLAIN])[0].length)
    return np.array(found)


@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize("mode", DRAFT_MODES)
@pytest.mark.parametrize("rule", RULES)
def test_the_mean_accept_length_of_40_pairs_is_that_of_the_papers_rule(rule: str, mode: DraftMode, shape: str):
    found = lengths(rule, mode, shape, 0.5)
    for seed in range(40):
        p, q = ([np.exp(x)[0] for x in tables] for tables in mixed_pair(seed, 0.5, 3, len(FAMILIES[shape])))
        assert abs(found[seed] - WrittenOut(mode, p, q, FAMILIES[shape]).length(rule)) < 1e-9, seed


def test_traversal_verification_never_accepts_less_and_with_likeliest_children_exactly_as_much():
    for shape in FAMILIES:
        for mode in DRAFT_MODES:
            gain = lengths("traversal", mode, shape, 0.5) - lengths("recursive-rejection", mode, shape, 0.5)
            assert (gain > -1e-12).all()
            assert (np.abs(gain) < 1e-12).all() if mode == "topk" else gain.max() > 1e-3


@pytest.mark.parametrize(("rule", "expected"), [("recursive-rejection", 10 / 9), ("traversal", 11 / 9)])
def test_the_published_toy_of_block_verification(rule: str, expected: float):
    """Sun et al. 2024: target (1/3, 2/3), draft (2/3, 1/3), two tokens drafted."""
    tables = [
        [np.log(np.broadcast_to(distribution, (1, 2**d, 2))) for d in range(3)]
        for distribution in ([1 / 3, 2 / 3], [2 / 3, 1 / 3])
    ]
    with jax.enable_x64(True):
        (outcome,) = measure(rule, "sample", TreeCase(chain(2), 2, 1), (tables[0], tables[1]), [PLAIN])
    assert abs(outcome.length - expected) < 1e-12 and outcome.distance < 1e-12
