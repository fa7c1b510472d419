"""Rounds that are decoded and counted: the counts are a replay's where that is exact, and add up by any rule."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights
from toys import each_request

from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import make_requests
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.lab.ranks import Text, rank_texts, read_target
from jaxspec.lab.round_log import LoggedPrompt, generous_tree, log_rounds
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import chain

VOCAB, WIDTH, DEPTH, RANKS, BUDGET = 11, 16, 3, 3, 40
CONFIG = LlamaConfig(VOCAB, WIDTH, 1, 2, 1, 6, 20)


@functools.cache
def models_of(mode: Any = "topk", rule: str | None = None) -> Models:
    """A random target, and a draft LM that is the target with noise."""
    target, drafter = Decoder(CONFIG, stacked=False), DraftLM(DraftLMConfig(VOCAB, WIDTH, 1, 2, 1, 6, 20))
    theirs, noise = random_weights(target, 0.7, 1), random_weights(drafter, 0.5, 2)
    own = jax.tree.map(lambda own, noise: jnp.asarray(own + 0.3 * noise), {n: theirs[n] for n in noise}, noise)
    plain = Models(Engine(target), Weights(theirs), cast(Any, None), CONFIG)
    return plain.with_drafter(drafter, own, generous_tree(DEPTH, RANKS, extra=9)).with_rule(mode, rule)


@functools.cache
def asked(temperature: float) -> list[Any]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, VOCAB, n) for n in (7, 3, 12)]
    rows = each_request(prompts, max_new_tokens=[BUDGET, 31, 2], temperature=[temperature] * 3, seed=[1, 2, 3])
    return [request._replace(key=i) for i, request in enumerate(rows)]


def logged(models: Models, temperature: float, batch: int = 2) -> list[LoggedPrompt]:
    found = log_rounds(models, asked(temperature), batch=batch, longest=BUDGET)
    return sorted(found, key=lambda one: one.key)


def counted_by_replay(models: Models, text: Text) -> tuple[np.ndarray, np.ndarray, int]:
    """Hits, turns and calls, by walking the text's ranks."""
    tree = models.engine.tree
    (ranks,) = rank_texts(models, [text], read_target(models, [text]), depth=DEPTH, ranks=RANKS)
    hits, turns = np.zeros((DEPTH, RANKS), int), np.zeros((DEPTH, RANKS), int)
    nodes, at, calls = set(cast(Any, tree).paths), 0, 0
    while at < text.starts:
        path: tuple[int, ...] = ()
        for depth in range(min(DEPTH, text.starts - at)):
            child = (*path, int(ranks.rank_TD[at, depth]))
            last = child[-1] if child in nodes else RANKS
            turns[depth] += [(*path, rank) in nodes and rank <= last for rank in range(RANKS)]
            if child not in nodes:
                break
            path = child
            hits[depth, path[-1]] += 1
        at, calls = at + 1 + len(path), calls + 1
    return hits, turns, calls


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counts_of_target_draw_are_those_of_replay(temperature: float):
    models = models_of()
    answers = generate(models.engine, models.weights, make_requests(asked(temperature)))
    for request, answer, one in zip(asked(temperature), answers, logged(models, temperature), strict=True):
        hits, turns, calls = counted_by_replay(models, Text(np.asarray(request.tokens), answer.tokens))
        assert (one.calls, one.tokens) == (answer.calls, len(answer.tokens) - 1) and one.calls == calls
        np.testing.assert_array_equal(one.hits_DK, hits)
        np.testing.assert_array_equal(one.turns_DK, turns)


@pytest.mark.parametrize(
    ("mode", "rule"), [("swor", "recursive-rejection"), ("sample", "specinfer"), ("topk", "traversal")]
)
def test_every_token_is_a_hit_or_a_bonus(mode: str, rule: str):
    """Each round adds one token besides the drafted ones it kept; the last may end at a drafted one."""
    for one in logged(models_of(mode, rule), 1.0):
        assert (one.hits_DK <= one.turns_DK).all()
        assert one.tokens - one.calls in (one.hits_DK.sum(), one.hits_DK.sum() - 1)
    assert sum(one.hits_DK.sum() for one in logged(models_of(mode, rule), 1.0)) > 10


def test_a_chain_has_one_rank():
    models = models_of()
    models = models.with_tree(chain(DEPTH)).with_rule("sample", "block")
    assert logged(models, 1.0)[0].hits_DK.shape == (DEPTH, 1)


def test_greedy_rows_are_counted_alike_by_every_rule():
    for one, other in zip(logged(models_of(), 0.0), logged(models_of("swor"), 0.0), strict=True):
        np.testing.assert_array_equal(one.hits_DK, other.hits_DK)
        np.testing.assert_array_equal(one.turns_DK, other.turns_DK)


def test_a_generous_tree_has_whole_families_along_its_likeliest_chain():
    tree = generous_tree(5, 4, extra=20)
    assert tree.nodes == 1 + 5 * 4 + 20 and tree.depth == 5
    for depth in range(5):
        assert all((0,) * depth + (rank,) in tree.paths for rank in range(4))
    for path in tree.paths:  # families have no gaps, as drawn children need
        assert all((*path[:-1], rank) in tree.paths for rank in range(path[-1]))
    assert generous_tree(4, 1) == chain(4)
    assert generous_tree(1, 3, extra=9).nodes == 4
