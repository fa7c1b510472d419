"""Rules for drawn children have exactly the target's distribution: every tree that can be drawn, and every coin, in
fp64.

The trees come from the library's own policies: the noise that picks each family of children is made up here, one array
for every sequence of draws, and weighed with the laws that the tree itself reports.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Tables, grow, path_tables

from jaxspec.base import DRAFT_MODES, Array, DraftMode, Tree
from jaxspec.sampling import Sampling, distribution_of
from jaxspec.trees import DynamicTree, StaticTree, chain, parse_paths
from jaxspec.trees.children import drawn
from jaxspec.verify import rejection
from jaxspec.verify.rejection import RejectionResult, recursive_rejection, traversal_verification


class Shape(NamedTuple):
    """A tree policy, and the vocabulary it is enumerated with."""

    policy: Any
    vocab: int
    children: int
    """Drawn for every expanded node."""


SHAPES = {
    "chain": Shape(chain(3), 3, 1),
    "flat": Shape(StaticTree(parse_paths("0 1 2")), 5, 3),
    "2x2": Shape(StaticTree(parse_paths("0 1 00 01 10 11")), 3, 2),
    "lopsided": Shape(StaticTree(parse_paths("0 1 00 10 11 100")), 2, 2),
    "dynamic": Shape(DynamicTree(4, 2, 2), 3, 2),
    "deep dynamic": Shape(DynamicTree(5, 3, 2), 3, 2),
}
RULES: dict[str, Callable[..., RejectionResult]] = {
    "recursive-rejection": lambda mode, tree, p, coin, depth: recursive_rejection(mode, tree, p, coin),
    "traversal": traversal_verification,
}
T_AND_WARPS = [*itertools.product((0.3, 1.0, 1.5), ((0, 1.0), (0, 0.9), (5, 1.0))), (0.0, (0, 1.0))]
LOUD = 1e6
"""Noise beside which log-probabilities do not count."""


def sequences(mode: DraftMode, vocab: int, count: int) -> np.ndarray:
    """Every way a family's draws can come out, `[outcomes, count]`."""
    ways = itertools.permutations if mode == "swor" else lambda v, c: itertools.product(v, repeat=c)
    return np.array(list(ways(range(vocab), count)))


def loud_noise(mode: DraftMode, drawn_EK: np.ndarray, vocab: int) -> np.ndarray:
    """Gumbel noise with which those tokens are drawn, in their order."""
    one_hot = np.eye(vocab)[drawn_EK]
    if mode == "sample":
        return LOUD * one_hot
    falling = np.arange(drawn_EK.shape[-1], 0, -1)[:, None]
    return LOUD * (one_hot * falling).sum(-2)


def chance_of(mode: DraftMode, distribution: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Probability `[trees]` of each sequence under its law; what is drawn when nothing is left is not random."""
    chance, rest = np.ones(len(distribution)), distribution.copy()
    for i in range(tokens.shape[1]):
        token = tokens[:, i : i + 1]
        here, total = np.take_along_axis(rest, token, 1)[:, 0], rest.sum(1)
        some = total > 0
        # The lowest of the tokens not drawn yet stand for what comes when the support is used up.
        fresh = np.ones(distribution.shape, bool)
        np.put_along_axis(fresh, tokens[:, :i], False, 1)
        stand_in = token[:, 0] == fresh.argmax(1)
        chance *= np.where(some, here / np.where(some, total, 1), stand_in)
        if mode == "swor":
            np.put_along_axis(rest, token, 0, 1)
    return chance


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow_with(mode: DraftMode, policy: Any, tables: Any, noise_QEKV: Array) -> Tree:
    """A tree a row, `noise[q, e]` for the family of slot `e - 1`."""

    def noise(slot: int, shape: tuple[int, ...]) -> Array:
        found = noise_QEKV[:, slot + 1 : slot + 1 + shape[0]]
        return found if mode == "sample" else found[:, :, 0]

    return grow(policy, tables, choose=drawn(mode, jnp.ones(noise_QEKV.shape[0], noise_QEKV.dtype), noise))


class Drafts(NamedTuple):
    """Every tree of a policy, with its probability."""

    tree: Tree
    weight_Q: np.ndarray


def drafts(mode: DraftMode, shape: Shape, draft: Tables) -> Drafts:
    """Those with a probability above 0; `draft` has one batch row."""
    policy, vocab, count = shape
    expanded = policy.slots + 1
    ways = np.zeros((1, count), int) if mode == "topk" else sequences(mode, vocab, count)
    pick = np.array(list(itertools.product(range(len(ways)), repeat=1 if mode == "topk" else expanded)))
    pick = np.broadcast_to(pick, (len(pick), expanded))
    tokens = ways[pick]
    noise = np.stack([loud_noise(mode, tokens[:, e], vocab) for e in range(expanded)], 1)
    noise = noise if mode == "sample" else noise[:, :, None]
    tables = [np.broadcast_to(x, (len(pick), *x.shape[1:])) for x in draft]
    tree: Tree = jax.device_get(grow_with(mode, policy, tables, noise))
    if mode == "topk":
        return Drafts(tree, np.ones(1))
    assert tree.distributions is not None
    distribution_QEV = np.asarray(tree.distributions.distribution_BEV)
    weight = np.prod([chance_of(mode, distribution_QEV[:, e], tokens[:, e]) for e in range(expanded)], axis=0)
    # Families that the tree does not hold are summed out.
    keep = weight > 0
    return Drafts(jax.tree.map(lambda x: x[keep], tree), weight[keep])


def codes(tree: Tree, vocab: int) -> np.ndarray:
    """Of each node's path."""
    code = np.zeros(tree.token_BN.shape, int)
    for n in range(1, code.shape[1]):
        above = np.maximum(tree.parent_BN[:, n], 0)[:, None]
        code[:, n] = np.take_along_axis(code, above, 1)[:, 0] * vocab + tree.token_BN[:, n]
    return code


law_each = jax.jit(lambda tables, sampling: [distribution_of(x, sampling) for x in tables])


def warped(tables: Tables, t: float, top_k: int, top_p: float) -> list[np.ndarray]:
    """The laws of the paths of each length, `[V ** d, V]`."""
    sampling = Sampling(*(jnp.asarray([v], d) for v, d in zip((t, top_k, top_p, 0), "fifi", strict=True)))
    return [np.asarray(x)[0] for x in law_each(tables, sampling)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def judge(rule: str, mode: DraftMode, depth: int, tree: Tree, p_QNV: Array, coin_QN: Array) -> RejectionResult:
    return RULES[rule](mode, tree, p_QNV, coin_QN, depth)


class Outcome(NamedTuple):
    """What a rule makes of the drafts: paths by depth and code, and their weight."""

    distance: float
    """Total variation between the target's law of `T + 1` tokens and: the round's tokens, then plain sampling."""
    length: float
    """Mean accept length."""


Change = Callable[..., Any]


def same(x: Any) -> Any:
    return x


def measure(
    rule: str,
    mode: DraftMode,
    shape: Shape,
    target: Tables,
    draft: Tables,
    warps: list[tuple[float, tuple[int, float]]],
    *,
    seen_distributions: Change = same,
    seen_tree: Change = same,
    coins: Callable[[int], np.ndarray] | None = None,
    rest: Change | None = None,
) -> list[Outcome]:
    """One outcome a warp. The changes make rules wrong: what they see of the target, the tree, coins, the bonus
    distribution."""
    found, depth, vocab = drafts(mode, shape, draft), shape.policy.depth, shape.vocab
    tree, trees, nodes = found.tree, len(found.weight_Q), shape.policy.nodes
    code = codes(tree, vocab)
    falls = np.array(list(itertools.product((0.0, 1.0), repeat=nodes - 1))) if coins is None else coins(nodes - 1)
    coin = np.tile(np.pad(falls, ((0, 0), (1, 0))), (trees, 1))
    each = functools.partial(np.repeat, repeats=len(falls), axis=0)
    many = jax.tree.map(each, seen_tree(tree))
    outcomes = []
    for t, (top_k, top_p) in warps:
        distributions = warped(target, t, top_k, top_p)
        shown = seen_distributions(distributions)
        p = np.zeros((*code.shape, vocab))
        for d in range(depth + 1):
            p[tree.depth_BN == d] = shown[d][code[tree.depth_BN == d]]
        result = jax.device_get(judge(rule, mode, depth, many, each(p), coin))
        weight = each(found.weight_Q)
        if coins is None:
            chance = np.where(result.tested_BN, np.where(coin == 0, result.chance_BN, 1 - result.chance_BN), 0.5)
            weight = weight * chance[:, 1:].prod(axis=1)
        else:
            weight = weight / len(falls)
        at = np.arange(len(weight)), result.last_B
        bonus = result.rest_BV if rest is None else rest(each(p)[at])
        joint = joint_distribution(each(code)[at], each(tree.depth_BN)[at], weight, bonus, distributions)
        want = np.ones(1)
        for distribution in distributions[: depth + 1]:
            want = (want[:, None] * distribution).ravel()
        outcomes.append(Outcome(0.5 * float(np.abs(joint - want).sum()), float(weight @ each(tree.depth_BN)[at])))
    return outcomes


def joint_distribution(
    code: np.ndarray, depth: np.ndarray, weight: np.ndarray, rest: np.ndarray, distributions: list[np.ndarray]
) -> np.ndarray:
    """The law of `T + 1` tokens: accepted paths, the bonus token, and plain sampling behind it."""
    vocab, length = rest.shape[1], len(distributions)
    joint = np.zeros(vocab**length)
    for d in range(length):
        here, mass = depth == d, np.zeros((vocab**d, vocab))
        np.add.at(mass, code[here], weight[here, None] * rest[here])
        text = mass.ravel()
        for later in range(d + 1, length):
            text = (text[:, None] * distributions[later]).ravel()
        joint += text
    return joint


def with_zeros(tables: Tables, seed: int) -> Tables:
    """Some tokens impossible, never the likeliest."""
    rng = np.random.default_rng(seed)
    return [np.where((rng.random(x.shape) < 0.4) & (x < x.max(-1, keepdims=True)), -np.inf, x) for x in tables]


def pair(case: str, seed: int, shape: Shape) -> tuple[Tables, Tables]:
    """Target and draft."""
    target, draft = (path_tables(s, shape.vocab, shape.policy.depth) for s in (seed, seed + 900))
    if case == "zeros":
        target, draft = with_zeros(target, seed), with_zeros(draft, seed + 1)
    fp64 = [[x.astype(np.float64) for x in tables] for tables in (target, draft)]
    return fp64[0], fp64[0] if case == "same" else fp64[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", DRAFT_MODES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_exactly_the_targets_distribution(rule: str, mode: DraftMode, shape: str):
    s = SHAPES[shape]
    if (mode, shape) == ("sample", "deep dynamic"):
        s = s._replace(vocab=2)  # 59,049 trees otherwise
    with jax.enable_x64(True):
        for seed, case in enumerate(("random", "zeros", "same")):
            outcomes = measure(rule, mode, s, *pair(case, seed, s), T_AND_WARPS)
            for warp, outcome in zip(T_AND_WARPS, outcomes, strict=True):
                assert outcome.distance < 1e-12, (case, warp)


# Wrong rules. Each must be seen by the same measure.


def worst(rule: str, mode: DraftMode, shape: str, warp: tuple = (1.0, (0, 1.0)), **changes: Any) -> float:
    """The greatest distance over a few random pairs."""
    with jax.enable_x64(True):
        found = [
            measure(rule, mode, SHAPES[shape], *pair("random", seed, SHAPES[shape]), [warp], **changes)[0].distance
            for seed in range(4)
        ]
    return max(found)


def without_duplicates(tree: Tree) -> Tree:
    """Siblings that repeat a token left out, and what is below them."""
    valid = np.array(tree.valid_BN)
    for n in range(1, valid.shape[1]):
        for m in range(1, n):
            twin = (tree.parent_BN[:, m] == tree.parent_BN[:, n]) & (tree.token_BN[:, m] == tree.token_BN[:, n])
            valid[:, n] &= ~np.asarray(twin)
        above = np.maximum(np.asarray(tree.parent_BN)[:, n], 0)[:, None]
        valid[:, n] &= np.take_along_axis(valid, above, 1)[:, 0]
    return tree._replace(valid_BN=valid)


@pytest.mark.parametrize("rule", RULES)
def test_leaving_out_duplicate_siblings_is_not_lossless(rule: str):
    assert worst(rule, "sample", "2x2", seen_tree=without_duplicates) > 1e-3


@pytest.fixture
def changed_rules(monkeypatch: pytest.MonkeyPatch):
    """Patches the rules, and forgets the programs made of them on both sides."""
    judge.clear_cache()  # type: ignore[attr-defined]
    yield monkeypatch
    monkeypatch.undo()
    judge.clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_law_that_is_not_renormalised_is_not_lossless(rule: str, changed_rules: pytest.MonkeyPatch):
    changed_rules.setattr(rejection, "_next_draw", lambda mode, s_V, token: s_V.at[token].set(0))
    assert worst(rule, "swor", "2x2") > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_testing_likeliest_children_by_the_drafts_softmax_is_not_lossless(rule: str, changed_rules: pytest.MonkeyPatch):
    distribution = jax.nn.softmax(jnp.asarray(path_tables(900, 3, 0)[0][0, 0], jnp.float32))
    changed_rules.setattr(rejection, "_drawn_from", lambda mode, row, s_V, token: distribution.astype(s_V.dtype))
    assert worst(rule, "topk", "2x2") > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_one_uniform_for_all_tests_is_not_lossless(rule: str):
    grid = (np.arange(600)[:, None] + 0.5) / 600
    assert worst(rule, "swor", "2x2", coins=lambda tests: np.broadcast_to(grid, (600, tests))) > 1e-2


def test_the_measure_of_reused_uniforms_is_finer_than_what_it_shows():
    """The same grid, but every test with a uniform of its own: on a flat tree of one child, nothing is reused."""
    grid = (np.arange(600)[:, None] + 0.5) / 600
    with jax.enable_x64(True):
        one = Shape(chain(1), 3, 1)
        (outcome,) = measure(
            "recursive-rejection", "sample", one, *pair("random", 0, one), [(1.0, (0, 1.0))], coins=lambda _: grid
        )
    assert outcome.distance < 3e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_bonus_token_from_the_plain_softmax_is_not_lossless(rule: str):
    assert worst(rule, "swor", "2x2", rest=same) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_top_p_before_temperature_is_not_lossless(rule: str):
    def late(distributions: list[np.ndarray]) -> list[np.ndarray]:
        heated = [x ** (1 / 1.5) for x in distributions]
        return [x / x.sum(-1, keepdims=True) for x in heated]

    with jax.enable_x64(True):
        found = []
        for seed in range(4):
            target, draft = pair("random", seed, SHAPES["2x2"])
            early = warped(target, 1.0, 0, 0.8)
            wrong = functools.partial(lambda distributions, early: late(early), early=early)
            found += measure(rule, "swor", SHAPES["2x2"], target, draft, [(1.5, (0, 0.8))], seen_distributions=wrong)
    assert max(outcome.distance for outcome in found) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_greedy_rows_at_a_negative_temperature_are_not_greedy(rule: str):
    def upside_down(distributions: list[np.ndarray]) -> list[np.ndarray]:
        return [np.eye(x.shape[-1])[x.argmin(-1)] for x in distributions]

    assert worst(rule, "swor", "2x2", (0.0, (0, 1.0)), seen_distributions=upside_down) > 1e-3


def test_keeping_drawn_nodes_by_their_own_probability_is_not_lossless(monkeypatch: pytest.MonkeyPatch):
    """What a dynamic tree must not do, and does in other systems: prefer, among drawn tokens, the likelier."""

    rightly = drawn

    def by_own(mode: DraftMode, temperature_B: Array, noise: Any) -> Any:
        choose = rightly(mode, temperature_B, noise)

        def preferring(logits_BWV: Array, count: int, slot: int) -> Any:
            found = choose(logits_BWV, count, slot)
            return found._replace(bound_BWR=found.logp_BWR)

        return preferring

    monkeypatch.setitem(globals(), "drawn", by_own)
    grow_with.clear_cache()  # type: ignore[attr-defined]
    try:
        assert worst("recursive-rejection", "swor", "dynamic") > 1e-3
    finally:
        grow_with.clear_cache()  # type: ignore[attr-defined]


# Accept lengths.


def written_out(rule: str, mode: DraftMode, p: list[np.ndarray], q: list[np.ndarray], children: list[int]) -> float:
    """The mean accept length by recursion over draws, in plain Python: the rules as the papers state them."""
    vocab = p[0].shape[-1]

    def draws(distribution: np.ndarray, count: int) -> list[tuple[tuple[int, ...], float]]:
        if mode == "topk":
            return [(tuple(np.argsort(-distribution, kind="stable")[:count].tolist()), 1.0)]
        found = [((), 1.0, distribution)]
        for _ in range(count):
            found = [
                ((*t, x), w * s[x], after(s, x) if mode == "swor" else s)
                for t, w, s in found
                for x in range(vocab)
                if s[x] > 0
            ]
        return [(t, w) for t, w, _ in found]

    def after(s: np.ndarray, x: int) -> np.ndarray:
        left = np.where(np.arange(vocab) == x, 0, s)
        return left / left.sum() if left.sum() > 1e-14 else s

    def down(code: int, d: int) -> float:
        """Mean accept length below a node that is accepted, the children drawn on the way."""
        if d == len(children):
            return 0.0
        total = 0.0
        for tokens, weight in draws(q[d][code], children[d]):
            r, s, reach = p[d][code], q[d][code], weight
            for x in tokens:
                used = np.eye(vocab)[x] if mode == "topk" else s
                take = min(1.0, r[x] / used[x])
                total += reach * take * (1 + down(code * vocab + x, d + 1))
                reach *= 1 - take
                left = np.maximum(r - used, 0)
                r, s = (left / left.sum() if left.sum() > 1e-14 else r), (after(s, x) if mode == "swor" else s)
        return total

    def up(code: int, d: int, rho: float) -> float:
        """Mean accept length gained below and at a node handed the weight `rho`; its own acceptance counts `d`."""
        if d == len(children):
            return rho * d
        total = 0.0
        for tokens, weight in draws(q[d][code], children[d]):
            b, s, reach, w = p[d][code], q[d][code], weight, rho
            for x in tokens:
                used = np.eye(vocab)[x] if mode == "topk" else s
                handed = min(1.0, w * b[x] / used[x])
                total += reach * up(code * vocab + x, d + 1, handed)
                reach *= 1 - handed
                left = np.maximum(w * b - used, 0)
                b, mass = (left / left.sum() if left.sum() > 1e-14 else b), left.sum()
                w = mass / (mass + 1 - w) if mass + 1 - w > 1e-14 else 1.0
                s = after(s, x) if mode == "swor" else s
            total += reach * w * d
        return total

    return down(0, 0) if rule == "recursive-rejection" else up(0, 0, 1.0)


def mixed_pair(seed: int, overlap: float, vocab: int, depth: int) -> tuple[Tables, Tables]:
    """A Dirichlet target, and a draft that is partly it and partly another."""
    rng = np.random.default_rng(seed)
    p = [rng.dirichlet(np.full(vocab, 0.7), (1, vocab**d)) for d in range(depth + 1)]
    q = [overlap * x + (1 - overlap) * rng.dirichlet(np.full(vocab, 0.7), (1, vocab**d)) for d, x in enumerate(p)]
    return [np.log(x) for x in p], [np.log(x) for x in q]


FAMILIES = {"chain": [1, 1, 1], "2x2": [2, 2]}


@functools.cache
def lengths(rule: str, mode: DraftMode, shape: str, overlap: float) -> np.ndarray:
    """The enumerated mean accept length of 40 pairs."""
    s, found = SHAPES[shape], []
    with jax.enable_x64(True):
        for seed in range(40):
            target, draft = mixed_pair(seed, overlap, s.vocab, s.policy.depth)
            found.append(measure(rule, mode, s, target, draft, [(1.0, (0, 1.0))])[0].length)
    return np.array(found)


@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize("mode", DRAFT_MODES)
@pytest.mark.parametrize("rule", RULES)
def test_the_mean_accept_length_of_40_pairs_is_the_rules_own(rule: str, mode: DraftMode, shape: str):
    found = lengths(rule, mode, shape, 0.5)
    for seed in range(40):
        p, q = ([np.exp(x)[0] for x in tables] for tables in mixed_pair(seed, 0.5, 3, len(FAMILIES[shape])))
        assert abs(found[seed] - written_out(rule, mode, p, q, FAMILIES[shape])) < 1e-9, seed


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
        (outcome,) = measure(rule, "sample", Shape(chain(2), 2, 1), tables[0], tables[1], [(1.0, (0, 1.0))])
    assert abs(outcome.length - expected) < 1e-12 and outcome.distance < 1e-12
