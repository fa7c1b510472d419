"""The acceptance rule has exactly the target's distribution: by enumerating every draw, and by sampling the compiled
program."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toys import code_of, grow, node_paths, path_tables, random_tree, tree_of

from jaxspec import verify
from jaxspec.base import Tree
from jaxspec.sampling import Sampling, draw, warp_logits
from jaxspec.trees import AdaptiveTree, DynamicTree, StaticTree, chain

pytestmark = pytest.mark.usefixtures("compile_fully")

follow: Any = jax.jit(verify.follow, static_argnums=2)
warp_each = jax.jit(lambda tables, sampling: [warp_logits(x, sampling) for x in tables])
Law = dict[tuple[int, ...], float]
CHUNK = 2048


class TableTarget:
    """Next-token laws of every path in fp64, warped by the library's own `warp_logits`."""

    def __init__(self, seed: int, vocab: int, depth: int, t: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self.vocab, self.known = vocab, {}
        self.tables = path_tables(seed, vocab, depth)
        with jax.enable_x64(True):
            s = Sampling(*(jnp.asarray([v]) for v in (t, top_k, top_p, 0)))
            warped = warp_each([x.astype(np.float64) for x in self.tables], s)
        self.distributions = [softmax(np.asarray(x)[0]) for x in warped]

    def __call__(self, path: tuple[int, ...]) -> np.ndarray:
        return self.distributions[len(path)][code_of(path, self.vocab)]

    def texts(self, path: tuple[int, ...], length: int) -> np.ndarray:
        """The joint law `[V] * length` of the tokens behind a path."""
        if length == 0:
            return np.ones(())
        if (path, length) not in self.known:
            rest = [self.texts((*path, y), length - 1) for y in range(self.vocab)]
            self.known[path, length] = np.stack([p * x for p, x in zip(self(path), rest, strict=True)])
        return self.known[path, length]

    def probability(self, path: tuple[int, ...]) -> float:
        """Of a whole path."""
        return float(np.prod([self(path[:i])[token] for i, token in enumerate(path)]))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shared_draws(distributions: dict[int, np.ndarray]) -> Iterator[tuple[float, dict[int, int]]]:
    """Every joint outcome of nodes that invert one shared uniform, with its probability."""
    ends = {n: np.append(np.cumsum(p)[:-1], 1.0) for n, p in distributions.items()}
    cuts = np.unique(np.concatenate([[0.0], *ends.values()]))
    for low, high in itertools.pairwise(cuts):
        yield high - low, {n: int(np.searchsorted(e, (low + high) / 2)) for n, e in ends.items()}


def outcomes(groups: list[dict[int, np.ndarray]], nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and draws `[outcomes, N]` where each group of nodes has one uniform of its own."""
    weights, draws = np.ones(1), np.zeros((1, nodes), np.int32)
    for group in groups:
        cells = list(shared_draws(group))
        drawn = np.zeros((len(cells), nodes), np.int32)
        for row, (_, values) in zip(drawn, cells, strict=True):
            row[list(values)] = list(values.values())
        weights = np.outer(weights, [w for w, _ in cells]).ravel()
        draws = (draws[:, None] + drawn).reshape(-1, nodes)
    return weights, draws


def emitted(tree: Tree, groups: list[dict[int, np.ndarray]], depth: int) -> Law:
    """The law of what one round adds, through `follow`."""
    weights, draws = outcomes(groups, tree.token_BN.shape[1])
    distribution: Law = defaultdict(float)
    for begin in range(0, len(draws), CHUNK):
        some = draws[begin : begin + CHUNK]
        drawn = np.zeros((CHUNK, some.shape[1]), np.int32)
        drawn[: len(some)] = some
        many = jax.tree.map(lambda a: np.broadcast_to(a, (CHUNK, *a.shape[1:])), tree)
        accepted = jax.device_get(follow(many, drawn, depth))
        for w, count, tokens in zip(weights[begin:], accepted.count_B[: len(some)], accepted.token_BP, strict=False):
            distribution[tuple(tokens[: count + 1].tolist())] += w
    return distribution


def total_variation(distribution: Law, target: TableTarget, length: int) -> float:
    """Between the target's law of `length` tokens and: the round's tokens, then plain sampling."""
    whole = np.zeros((target.vocab,) * length)
    for path, w in distribution.items():
        whole[path] += w * target.texts(path, length - len(path))
    return 0.5 * float(np.abs(whole - target.texts((), length)).sum())


def laws_of(tree: Tree, target: TableTarget) -> dict[int, np.ndarray]:
    """The target's warped law at every valid node."""
    return {n: target(p) for n, p in enumerate(node_paths(tree)) if p is not None}


def independent(distributions: dict[int, np.ndarray]) -> list[dict[int, np.ndarray]]:
    return [{n: p} for n, p in distributions.items()]


def by_depth(distributions: dict[int, np.ndarray], tree: Tree) -> list[dict[int, np.ndarray]]:
    """One uniform a depth, as `draw` shares its noise."""
    depth = np.asarray(tree.depth_BN[0])
    return [
        {n: distributions[n] for n in distributions if depth[n] == d} for d in sorted({depth[n] for n in distributions})
    ]


@functools.cache
def trees(vocab: int) -> dict[str, tuple[Tree, int]]:
    """Deterministic trees of at most 7 nodes, with their `T`; padded alike, which keeps the programs few."""
    draft = path_tables(50, vocab, 3)
    policies = {
        "none": chain(0),
        "chain": chain(3),
        "padded chain": chain(2, rows=5),
        "2x2": StaticTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))),
        "lopsided": StaticTree(((0,), (1,), (1, 0), (1, 0, 0)), rows=6),
        "top-k": DynamicTree(6, 3, 2),
    }
    free, base = (1.0,) * 3, DynamicTree(6, 3, 2)
    # Deterministic children: a tree that stops early and is cut is one more function of the text before it.
    policies |= {
        f"adaptive at {price}": AdaptiveTree(base, (1, 3, 6), free, price, 0.0, 1.0) for price in (0.0, 0.5, 9.0)
    }
    found = {name: (jax.jit(lambda p=p: grow(p, draft))(), p.depth) for name, p in policies.items()}
    rng = np.random.default_rng(vocab)
    found |= {f"random {i}": (random_tree(rng, 6, vocab, 3, padding=i), 3) for i in range(3)}
    return {name: (pad(tree), depth) for name, (tree, depth) in found.items()}


def pad(tree: Tree, rows: int = 8) -> Tree:
    """The tree with `rows` rows, on the host."""
    token, parent, depth, score, valid, ancestors = (np.asarray(a) for a in tree[:6])
    more = ((0, 0), (0, rows - token.shape[1]))
    wide = np.eye(rows, dtype=bool)[None].copy()
    wide[:, : token.shape[1], : token.shape[1]] = ancestors
    fills = zip((token, parent, depth, score, valid), (0, -1, 0, -np.inf, False), strict=True)
    return tree_of(*(np.pad(a, more, constant_values=fill) for a, fill in fills), wide)


WARPS = {"plain": {}, "top-p": {"top_p": 0.9}, "top-k": {"top_k": 2}}


@pytest.mark.parametrize("vocab", [2, 4])
@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("t", [0.3, 1.0, 1.5])
def test_the_output_has_exactly_the_targets_distribution(vocab: int, warp: str, t: float):
    target = TableTarget(vocab, vocab, 3, t, **WARPS[warp])
    for name, (tree, depth) in trees(vocab).items():
        distributions = laws_of(tree, target)
        coupled = emitted(tree, by_depth(distributions, tree), depth)
        assert total_variation(coupled, target, depth + 1) < 1e-12, name
        if vocab ** len(distributions) <= 1024:
            free = emitted(tree, independent(distributions), depth)
            assert total_variation(free, target, depth + 1) < 1e-12, name


def test_independent_draws_on_a_branching_tree_have_exactly_the_targets_distribution():
    target = TableTarget(0, 4, 2)
    tree, depth = trees(4)["2x2"]
    assert total_variation(emitted(tree, independent(laws_of(tree, target)), depth), target, 3) < 1e-12


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_the_mean_accept_length_is_the_probability_of_the_trees_paths(t: float):
    for name, (tree, depth) in trees(4).items():
        target = TableTarget(9, 4, 3, t)
        distribution = emitted(tree, by_depth(laws_of(tree, target), tree), depth)
        reach = sum(target.probability(p) for p in node_paths(tree)[1:] if p is not None)
        assert abs(sum(w * (len(p) - 1) for p, w in distribution.items()) - reach) < 1e-12, name


# Wrong rules. Each must be seen by the same measure.


def test_one_draw_used_at_two_depths_is_not_lossless():
    target = TableTarget(1, 4, 3)
    tree, depth = trees(4)["chain"]
    assert total_variation(emitted(tree, [laws_of(tree, target)], depth), target, depth + 1) > 1e-3


def test_a_bonus_token_from_the_unwarped_softmax_is_not_lossless():
    target = TableTarget(2, 4, 3, 0.3)
    tree, depth = trees(4)["2x2"]
    raw = TableTarget(2, 4, 3)
    leaves = np.asarray(tree.depth_BN[0]) == depth
    distributions = {n: laws_of(tree, raw if leaves[n] else target)[n] for n in laws_of(tree, target)}
    assert total_variation(emitted(tree, independent(distributions), depth), target, depth + 1) > 1e-3


def test_top_p_before_temperature_is_not_lossless():
    tree, depth = trees(4)["2x2"]
    seen = []
    for seed in range(4):
        target = TableTarget(seed, 4, 3, 1.5, top_p=0.8)
        early = laws_of(tree, TableTarget(seed, 4, 3, 1.0, top_p=0.8))
        heated = {n: p ** (1 / 1.5) / np.sum(p ** (1 / 1.5)) for n, p in early.items()}
        seen.append(total_variation(emitted(tree, by_depth(heated, tree), depth), target, depth + 1))
    assert max(seen) > 1e-3


def test_duplicate_siblings_with_draws_of_their_own_are_not_lossless():
    """Two copies of a child are two chances for its own children; shared noise makes them one again."""
    target = TableTarget(4, 3, 2)
    likely = int(np.argmax(target(())))
    below = int(np.argmax(target((likely,))))
    token, parent, depth = ([0, likely, likely, below], [-1, 0, 0, 2], [0, 1, 1, 2])
    ancestors = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    arrays = (token, parent, depth, [0.0] * 4, [True] * 4, ancestors)
    tree = pad(tree_of(*(np.asarray(a)[None] for a in arrays)))
    distributions = laws_of(tree, target)
    assert total_variation(emitted(tree, independent(distributions), 2), target, 3) > 1e-3
    assert total_variation(emitted(tree, by_depth(distributions, tree), 2), target, 3) < 1e-12


def test_accepting_top_k_children_by_the_drafts_softmax_is_not_lossless():
    """The rule for sampled children, min(1, p/q) and the residual (p - q)+, on children that were not sampled."""
    target, q = TableTarget(5, 4, 1), softmax(path_tables(60, 4, 0)[0][0, 0].astype(np.float64))
    distribution: Law = defaultdict(float)
    p, reach = target(()).copy(), 1.0
    for child in np.argsort(-q)[:2]:
        take = min(1.0, p[child] / q[child])
        for y, w in enumerate(target((int(child),))):
            distribution[int(child), y] += reach * take * w
        reach *= 1 - take
        p = np.maximum(p - q, 0)
        p /= p.sum()
    for y, w in enumerate(p):
        distribution[(y,)] += reach * w
    assert total_variation(distribution, target, 2) > 1e-3


# The rule itself.


def walk(tree: Tree, drawn: np.ndarray, row: int) -> tuple[list[int], list[int]]:
    """Nodes and tokens of the path, one child at a time."""
    token, parent, valid = (np.asarray(a[row]) for a in (tree.token_BN, tree.parent_BN, tree.valid_BN))
    nodes = [0]
    while True:
        fits = [n for n in range(1, len(token)) if valid[n] and parent[n] == nodes[-1] and token[n] == drawn[nodes[-1]]]
        if not fits:
            return nodes, [int(drawn[n]) for n in nodes]
        nodes.append(fits[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_path_is_what_a_literal_walk_finds(seed: int):
    rng = np.random.default_rng(seed)
    vocab, depth, nodes, padding = 3, 4, 14, 3
    tree = random_tree(rng, nodes, vocab, depth, padding)
    batch = 300
    drawn = rng.integers(0, vocab, (batch, nodes + padding))
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape[1:])), tree)
    accepted = jax.device_get(follow(many, jnp.asarray(drawn, jnp.int32), depth))
    deepest = 0
    for b in range(batch):
        path, tokens = walk(tree, drawn[b], 0)
        deepest = max(deepest, len(path) - 1)
        repeat = depth + 1 - len(path)
        assert accepted.count_B[b] == len(path) - 1
        assert accepted.path_BP[b].tolist() == path + [path[-1]] * repeat
        assert accepted.token_BP[b].tolist() == tokens + [tokens[-1]] * repeat
    assert deepest >= 3


def test_rows_with_trees_of_their_own_are_followed_apart():
    rng = np.random.default_rng(1)
    tables = path_tables(3, 5, 3, batch=6)
    tree = grow(DynamicTree(9, 3, 3), tables)
    drawn = rng.integers(0, 5, (6, 9))
    accepted = jax.device_get(follow(tree, jnp.asarray(drawn, jnp.int32), 3))
    for b in range(6):
        path, tokens = walk(tree, drawn[b], b)
        assert accepted.path_BP[b, : len(path)].tolist() == path and accepted.count_B[b] == len(path) - 1
        assert accepted.token_BP[b, : len(path)].tolist() == tokens


# The compiled program, its noise included.

TRIALS, VOCAB, LENGTH = 120_000, 4, 3


@functools.partial(jax.jit, static_argnames="reuse")
def sampled_text(target: list[jax.Array], seed_B: jax.Array, *, reuse: bool = False) -> jax.Array:
    """The first three tokens of as many rows as seeds: rounds of a one-level tree of two children, in fp32."""
    batch = seed_B.shape[0]
    sampling = Sampling(jnp.full(batch, 0.8), jnp.full(batch, 3), jnp.ones(batch), seed_B)
    draft = path_tables(70, VOCAB, LENGTH + 1)
    text, length = jnp.zeros((batch, LENGTH + 2), jnp.int32), jnp.zeros(batch, jnp.int32)
    rows, code = jnp.arange(batch)[:, None], jnp.zeros(batch, jnp.int32)

    def lookup(tables, length_B, code_B):
        found = [jnp.asarray(x)[0][jnp.minimum(code_B, x.shape[1] - 1)] for x in tables]
        return jnp.take_along_axis(jnp.stack(found, 1), length_B[:, None, None], axis=1)[:, 0]

    for _ in range(LENGTH):
        best = jax.lax.top_k(lookup(draft, jnp.minimum(length, LENGTH), code), 2)[1]
        child = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), best], axis=1)
        below = code[:, None] * VOCAB + best
        at = jnp.minimum(length, LENGTH)
        logits = [lookup(target, at, code)]
        logits += [lookup(target, jnp.minimum(at + 1, LENGTH), below[:, i]) for i in range(2)]
        depth = jnp.broadcast_to(jnp.array([0, 1, 1]), (batch, 3))
        wide = jnp.broadcast_to
        ancestors = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
        tree = Tree(
            child, wide(jnp.array([-1, 0, 0]), (batch, 3)), depth, jnp.zeros((batch, 3)),
            jnp.ones((batch, 3), bool), wide(ancestors, (batch, 3, 3)),
        )  # fmt: skip
        first = jnp.zeros_like(length) if reuse else length
        accepted = follow(tree, draw(jnp.stack(logits, 1), depth, first, 2, sampling), 1)
        text = text.at[rows, jnp.minimum(length[:, None] + jnp.arange(2), LENGTH + 1)].set(accepted.token_BP)
        done = length >= LENGTH
        length = jnp.where(done, length, length + accepted.count_B + 1)
        first_code = code * VOCAB + accepted.token_BP[:, 0]
        code = jnp.where(accepted.count_B == 1, first_code * VOCAB + accepted.token_BP[:, 1], first_code)
        code = jnp.where(length >= LENGTH, 0, code)
    return text[:, :LENGTH]


@pytest.mark.parametrize("reuse", [False, True])
def test_sampled_text_over_round_boundaries_follows_the_target(reuse: bool):
    """The joint law of three tokens, rounds ending behind the first, second and third. Reused positions must show."""
    target = TableTarget(8, VOCAB, LENGTH, 0.8, top_k=3)
    seeds = jnp.arange(TRIALS, dtype=jnp.uint32)
    text = np.asarray(sampled_text([jnp.asarray(x) for x in target.tables], seeds, reuse=reuse))
    counts = np.bincount(text @ [16, 4, 1], minlength=VOCAB**LENGTH)
    distribution = np.array([target.probability(p) for p in itertools.product(range(VOCAB), repeat=LENGTH)])
    assert not counts[distribution == 0].any() or reuse
    keep = distribution * TRIALS >= 5
    seen = np.append(counts[keep], counts[~keep].sum())
    want = np.append(distribution[keep], distribution[~keep].sum()) * TRIALS
    seen, want = seen[want > 0], want[want > 0]
    g = 2 * np.sum(seen * np.log(np.maximum(seen, 1e-300) / want))
    p_value = stats.chi2.sf(g, len(seen) - 1)
    assert (p_value < 1e-6) if reuse else (p_value > 1e-6)
