"""Trees that are grown anew each round are replayed as they are decoded, where the drafter is of one pass."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS, STEPS, VOCAB, WIDTH
from lab_toys import one_pass_toy, ridge_cost
from random_models import random_weights
from toys import each_request

from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Request, make_requests
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.evaluation.statistics import tau_interval
from jaxspec.lab.best_first import find_best_first
from jaxspec.lab.candidates import Limits
from jaxspec.lab.grown import GrownTree, growable, replay_tree, replayed_tree, sizes_of, text_nodes
from jaxspec.lab.making import joined
from jaxspec.lab.profile import Profile, load_profile
from jaxspec.lab.ranks import Text, rank_texts, ranked_profile, read_target
from jaxspec.lab.replay import replay, walk_rounds
from jaxspec.lab.search import Search, rate_tree
from jaxspec.lab.simulate import simulate
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import BestFirstTree, DynamicTree, StaticTree, parse_tree

CONFIG = LlamaConfig(VOCAB, WIDTH, 3, 2, 1, 6, 20)
RANKS = 5
DRAWN_FROM = (0, 1, 2, 4, 5, 8, 9, 12)
"""A draft vocabulary."""
TREES = ("best_first:9x4x3", "best_first:14x3x5", "best_first:5x4x2", "dynamic:9x4x3", "dynamic:6x2x5")
FAST = (("medusa sharing the head", TREES[0]), ("medusa sharing the head", TREES[3]), ("all alike", TREES[1]))
KINDS_OF_SLOTS = ("parallelspec", "parallelspec both ways", "peagle", "of a draft vocabulary")
SLOW = [("all alike", TREES[3]), *((kind, tree) for kind in KINDS_OF_SLOTS for tree in TREES)]
ARMS = [*FAST, *(pytest.param(*arm, marks=pytest.mark.slow) for arm in SLOW)]


@functools.cache
def models_of(kind: str, tree: str) -> Models:
    """A random target and one-pass drafter; of "all alike" every child of every node is as likely as another."""
    module, name = Decoder(CONFIG, stacked=False), {"of a draft vocabulary": "parallelspec per depth"}.get(kind, kind)
    drafter = KINDS[{"all alike": "medusa"}.get(name, name)]
    params = jax.tree.map(jnp.asarray, random_weights(drafter, 0.5, 2))
    if kind == "all alike":
        params = jax.tree.map(jnp.zeros_like, params)
    plain = Models(Engine(module), Weights(random_weights(module, 0.7, 1)), cast(Any, None), CONFIG)
    vocab = DRAWN_FROM if kind == "of a draft vocabulary" else None
    return plain.with_drafter(drafter, params, parse_tree(tree), vocab)


def asked() -> list[Request]:
    """Greedy rows and sampled ones, of different lengths."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, VOCAB, n) for n in (20, 3, 1, 9, 6, 12)]
    drawn = {"temperature": [0.0, 1.0, 1.0, 0.0, 0.7, 1.0], "top_k": [0, 0, 0, 0, 6, 0], "seed": [1, 2, 3, 4, 5, 6]}
    return each_request(prompts, max_new_tokens=[40, 33, 40, 2, 37, 40], **drawn)


def profile_of(models: Models, texts: list[Text]) -> Profile:
    drafter = models.engine.drafter
    assert drafter is not None
    parts = rank_texts(models, texts, read_target(models, texts), depth=STEPS, ranks=RANKS)
    facts = {"kind": "ranks", "ranks": RANKS, "one_pass": drafter.one_pass}
    return ranked_profile(texts, joined(dict(enumerate(parts)), len(parts)), ("",) * len(texts), facts)


@pytest.mark.parametrize(("kind", "tree"), ARMS)
def test_a_replay_is_decoding_round_for_round(kind: str, tree: str):
    models, requests = models_of(kind, tree), asked()
    answers = generate(models.engine, models.weights, make_requests(requests))
    texts = [Text(np.asarray(r.tokens), a.tokens) for r, a in zip(requests, answers, strict=True)]
    profile, policy = profile_of(models, texts), replayed_tree(tree)
    counts = replay_tree(profile, policy)
    assert counts.calls_P.tolist() == [answer.calls for answer in answers]
    assert counts.tokens_P.tolist() == [len(answer.tokens) - 1 for answer in answers]
    length_T = np.count_nonzero(text_nodes(profile, cast(GrownTree, policy)), axis=1)
    at = walk_rounds(profile, length_T)
    for prompt, answer in enumerate(answers):
        first = np.flatnonzero(profile.prompt_T == prompt)[0]
        begins = at[profile.prompt_T[at] == prompt] - first
        # Behind the start at which a round begins stand its tokens.
        calls = np.searchsorted(begins, np.arange(len(answer.tokens) - 1), side="right")
        assert calls.tolist() == answer.call_of[1:].tolist()
    assert counts.accepted_PA[:, 1:].sum() > 0


def test_the_replayed_trees_accept_tokens_at_several_depths():
    models, requests = models_of(*FAST[0]), asked()
    answers = generate(models.engine, models.weights, make_requests(requests))
    assert np.count_nonzero(np.sum([answer.accepted for answer in answers], axis=0)) >= 3


def slow_best_first(logp_DK: np.ndarray, tree: BestFirstTree) -> set[tuple[int, ...]]:
    """Returns the paths of a best-first tree by a heap in float32, ties to the shallower and then the lower ranks."""
    queue: list[tuple[float, int, tuple[int, ...]]] = [(-0.0, 0, ())]
    found: list[tuple[int, ...]] = []
    while queue and len(found) < tree.nodes:
        minus, depth, path = heapq.heappop(queue)
        found.append(path)
        if depth < tree.depth:
            for rank in range(tree.width):
                score = np.float32(-minus) + logp_DK[depth, rank]
                heapq.heappush(queue, (-float(score), depth + 1, (*path, rank)))
    return set(found)


@pytest.mark.parametrize("sizes", [(6, 3, 4), (12, 3, 2), (3, 1, 4), (21, 2, 4)])
def test_the_nodes_are_those_of_a_heap_over_the_stored_log_probabilities(sizes: tuple[int, int, int]):
    profile, tree = one_pass_toy(prompts=3, tokens=30), BestFirstTree(*sizes)
    length_T = np.count_nonzero(text_nodes(profile, tree), axis=1)
    for t, rank_D in enumerate(profile.rank_TD):
        known, accepted = slow_best_first(profile.top_TDK[t], tree), 0
        while accepted < tree.depth and tuple(rank_D[: accepted + 1].tolist()) in known:
            accepted += 1
        assert length_T[t] == accepted


def test_a_grown_tree_over_one_distribution_is_a_static_one():
    profile = one_pass_toy(prompts=5, tokens=50)
    one = np.log(np.array([[0.5, 0.3, 0.1, 0.05], [0.6, 0.2, 0.1, 0.05], [0.7, 0.1, 0.1, 0.05]], np.float32))
    profile = dataclasses.replace(profile, top_TDK=np.broadcast_to(one, profile.top_TDK.shape).copy())
    tree = BestFirstTree(9, 3, 4)
    paths = sorted(slow_best_first(one, tree) - {()}, key=lambda path: (len(path), path))
    ours, theirs = replay_tree(profile, tree), replay(profile, tuple(paths))
    np.testing.assert_array_equal(ours.calls_P, theirs.calls_P)
    # A beam of all children expands the best of each level, and keeps as many of the best.
    np.testing.assert_array_equal(replay_tree(profile, DynamicTree(9, 3, 4)).calls_P, theirs.calls_P)


def test_replay_of_a_static_tree_is_what_it_was():
    profile, tree = one_pass_toy(), StaticTree(((0,), (1,), (0, 0)))
    np.testing.assert_array_equal(replay_tree(profile, tree).accepted_PA, replay(profile, tree.paths).accepted_PA)


def test_trees_of_the_grid_have_the_calls_of_their_own_replay():
    profile, cost = one_pass_toy(), ridge_cost(240, 2)
    grid = find_best_first(profile, [cost], Limits(nodes=12, depth=3))
    assert {tree.nodes for tree in grid.trees} == set(range(2, 13)) and {tree.depth for tree in grid.trees} == {1, 2, 3}
    for tree, calls_P in zip(grid.trees, grid.calls_SP, strict=True):
        np.testing.assert_array_equal(replay_tree(profile, tree).calls_P, calls_P)
    assert all(tree.nodes % 4 == 0 for tree in find_best_first(profile, [cost], Limits(12, 3, multiple=4)).trees)
    chains = find_best_first(profile, [cost], Limits(12, 3, branch=1)).trees
    assert {tree.width for tree in chains} == {1} and max(tree.nodes for tree in chains) == 4


def test_the_best_first_tree_is_chosen_on_one_half_and_reported_on_the_other():
    profile, cost = one_pass_toy(prompts=40), dataclasses.replace(ridge_cost(240, 8, step=1), one_pass=True)
    search = Search(profile, [cost], Limits(nodes=6, depth=3))
    found = search.choose_best_first(cost)
    assert found is not None and isinstance(found.rated.tree, BestFirstTree)
    assert found.rated == rate_tree(found.rated.tree, cost, replay_tree(search.reporting, found.rated.tree))
    tries = [rate_tree(t, cost, replay_tree(search.choosing, t)) for t in search.grid.trees]  # type: ignore[union-attr]
    assert found.choosing == pytest.approx(max(rated.tokens_per_second.value for rated in tries))
    # The draft says the truth at every place, and a static tree hears none of it.
    choice = search.choose(cost)
    assert found.choosing > choice.choosing[0] and found.rated.tau.value > choice.chosen.tau.value
    assert Search(simulate([[0.5]] * 3), [cost], Limits(nodes=8)).choose_best_first(cost) is None


def test_a_rounds_seconds_are_those_of_its_nodes_and_levels():
    cost, tau = ridge_cost(240, 8), replay_tree(one_pass_toy(), BestFirstTree(9, 3, 4))
    wide, narrow = rate_tree(DynamicTree(9, 3, 4), cost, tau), rate_tree(BestFirstTree(9, 3, 4), cost, tau)
    assert narrow.round_seconds == pytest.approx(cost.verify_N[9] + 2 * cost.level_W[1] + cost.extend_P[4] + cost.rest)
    assert wide.round_seconds == pytest.approx(cost.verify_N[9] + 2 * cost.level_W[4] + cost.extend_P[4] + cost.rest)
    assert [x.tolist() for x in sizes_of(BestFirstTree(3, 1, 4))] == [[3], [[]]]
    assert narrow.shape == () and not narrow.plain and narrow.tau == tau_interval(tau)


def test_full_precision_and_what_lies_behind_the_end_are_kept(tmp_path: Any):
    models = models_of("medusa sharing the head", TREES[0])
    profile = profile_of(models, [Text(np.arange(3), np.arange(7))])
    assert profile.top_TDK.dtype == np.float32 and np.isfinite(profile.top_TDK).all()
    profile.save(tmp_path / "p.npz")
    np.testing.assert_array_equal(load_profile(tmp_path / "p.npz").top_TDK, profile.top_TDK)


@pytest.mark.parametrize(
    ("change", "facts", "told"),
    [
        ({}, {"one_pass": False}, "does not hold its probabilities off the text"),
        ({}, {"kind": "simulated"}, "texts are drawn from rates"),
        ({}, {"rule": "block"}, "is of the rule block"),
        ({"top_TDK": np.zeros((312, 0, 4), np.float16)}, {}, "make it anew with `jaxspec lab profile`"),
        ({"top_TDK": np.zeros((312, 3, 4), np.float16)}, {}, "is of an earlier version"),
    ],
)
def test_a_profile_that_does_not_hold_the_whole_tree_is_refused(change: Any, facts: dict[str, Any], told: str):
    profile = one_pass_toy()
    profile = dataclasses.replace(profile, facts={**profile.facts, **facts}, **change)
    with pytest.raises(ValueError, match=told):
        replay_tree(profile, BestFirstTree(4, 2, 2))
    assert not growable(profile) and growable(one_pass_toy())


@pytest.mark.parametrize("tree", [BestFirstTree(4, 4, 2), BestFirstTree(6, 1, 5), DynamicTree(6, 2, 5)])
def test_a_tree_beyond_the_profile_is_refused(tree: GrownTree):
    with pytest.raises(ValueError, match="a profile of 3 depths and 4 ranks"):
        replay_tree(one_pass_toy(), tree)


def test_adaptive_trees_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"lookup:7 is adaptive.* `jaxspec bench decode --tree`"):
        replayed_tree("lookup:7")
    assert replayed_tree("static:00,0,1").spec == "static:0,1,00" and replayed_tree("none").nodes == 1
