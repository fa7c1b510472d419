"""The rank table of a text is what decoding meets there: of every kind of drafter, tree and temperature."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS, SHAPE, STEPS, VOCAB, WIDTH
from random_models import random_weights
from slow_replay import replay_paths
from toys import each_request

from jaxspec.base import Frontier
from jaxspec.bundled import bundled_path
from jaxspec.data.prompts import encode_prompt, text_prompt
from jaxspec.decoding.generation import generate, generate_plain
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.decoding.rounds import Engine, Weights, shared_tables
from jaxspec.drafters import DraftLM, DraftLMConfig, Eagle, Eagle3, Eagle3Config, EagleConfig
from jaxspec.evaluation.replay import record, replay
from jaxspec.lab.making import joined
from jaxspec.lab.profile import BEYOND, MISSED, Profile
from jaxspec.lab.ranks import Ranks, Text, batches, padded_length, rank_texts, ranked_profile, read_target
from jaxspec.serving.loading import Models, load_models
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import StaticTree, chain, parse_paths

CONFIG = LlamaConfig(VOCAB, WIDTH, 3, 2, 1, 6, 20)
DRAWN_FROM = (0, 1, 2, 4, 5, 8, 9, 12)
"""A draft vocabulary."""
OTHERS: dict[str, Any] = {
    "eagle zero logits": Eagle(EagleConfig(*SHAPE, zero_logits=True)),
    "eagle of a draft vocabulary": Eagle(EagleConfig(*SHAPE)),
    "eagle3 of a draft vocabulary": Eagle3(Eagle3Config(*SHAPE, vocab=len(DRAWN_FROM), taps=(0, 1, 2))),
    "draft_lm like the target": DraftLM(DraftLMConfig(VOCAB, WIDTH, 3, 2, 1, 6, 20)),
}
EVERY = {**KINDS, **OTHERS}
RANKS = 5
TREES = {"chain": chain(STEPS), "bushy": StaticTree(parse_paths("0 1 2 4 00 01 02 10 20 000 001 010 100 0000 0100"))}
FAST = ("eagle", "peagle", "draft_lm like the target")
"""Kinds that every run of the tests decodes with; the slow ones have the others too."""
WALKED = (
    *("eagle", "fspad", "eagle3", "medusa", "parallelspec both ways", "parallelspec in medusa", "peagle", "draft_lm"),
    *("eagle zero logits", "eagle3 of a draft vocabulary"),
)
"""Kinds that every run of the tests compares place by place."""


def marked(kinds: Iterable[str], *fast: str) -> list[Any]:
    """Returns the kinds, all but some of them marked as slow."""
    return [pytest.param(kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]


@functools.cache
def models_of(kind: str, tree: str) -> Models:
    """A random target and drafter, large enough weights that texts change and drafts hit now and then."""
    module = Decoder(CONFIG, stacked=False)
    drafter = EVERY[kind]
    weights, theirs = random_weights(drafter, 0.3, 2), random_weights(module, 0.7, 1)
    if kind == "draft_lm like the target":
        weights = jax.tree.map(lambda own, noise: own + 0.1 * noise, {name: theirs[name] for name in weights}, weights)
    plain = Models(Engine(module), Weights(theirs), cast(Any, None), CONFIG)
    vocab = DRAWN_FROM if "draft vocabulary" in kind else None
    return plain.with_drafter(drafter, jax.tree.map(jnp.asarray, weights), TREES[tree], vocab)


@functools.cache
def asked() -> list[Request]:
    """Two greedy rows and two sampled ones, of different lengths."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, VOCAB, n) for n in (20, 3, 1, 9)]
    return each_request(prompts, max_new_tokens=[40, 33, 40, 2], temperature=[0.0, 1.0, 1.0, 0.0], seed=[1, 2, 3, 4])


def profile_of(models: Models, texts: list[Text], depth: int = STEPS, ranks: int = RANKS) -> Profile:
    found: dict[int, Ranks] = {}
    for group in batches(texts):
        some = [texts[i] for i in group]
        read = read_target(models, some)
        found |= dict(zip(group, rank_texts(models, some, read, depth=depth, ranks=ranks), strict=True))
    return ranked_profile(texts, joined(found, len(texts)), ("",) * len(texts), {"ranks": ranks})


@functools.cache
def decoded(kind: str, tree: str) -> tuple[list[Text], list[Any]]:
    models = models_of(kind, tree)
    answers = generate(models.engine, models.weights, make_requests(asked()))
    return [Text(np.asarray(r.tokens), a.tokens) for r, a in zip(asked(), answers, strict=True)], answers


@pytest.mark.parametrize("tree", [pytest.param("chain", marks=pytest.mark.slow), "bushy"])
@pytest.mark.parametrize("kind", marked(EVERY, *FAST))
def test_replay_of_a_static_tree_makes_the_calls_of_decoding(kind: str, tree: str):
    models = models_of(kind, tree)
    texts, answers = decoded(kind, tree)
    counts = replay_paths(profile_of(models, texts), TREES[tree].paths)
    assert counts.calls_P.tolist() == [answer.calls for answer in answers]
    assert counts.tokens_P.tolist() == [len(answer.tokens) - 1 for answer in answers]
    for accepted, answer in zip(counts.accepted_PA, answers, strict=True):
        assert np.abs(accepted - answer.accepted).sum() in (0, 2)  # the last round may reach past the answer's end
        assert accepted[1:].sum() <= answer.accepted[1:].sum()


@pytest.mark.slow
def test_replay_is_decoding_token_for_token_on_twenty_prompts_of_the_bundled_target():
    """Drafts are of the target itself with noise on its weights, so that some are accepted and some are not."""
    models = load_models("tiny", drafter=bundled_path("tiny"), tree=TREES["bushy"].spec)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda a: a + 0.3 * jnp.std(a) * rng.standard_normal(a.shape).astype(a.dtype), models.weights.drafter
    )
    models = models._replace(weights=models.weights._replace(drafter=noisy))
    prompts = [f"{verb} {n} and {3 * n % 7} {end}" for n in range(1, 6) for verb, end in ASKED]
    encoded = [encode_prompt(text_prompt(str(i), p), models.tokenizer) for i, p in enumerate(prompts)]
    requests = [models.request(tokens, Settings(24), i) for i, tokens in enumerate(encoded)]
    answers = generate(models.engine, models.weights, make_requests(requests))
    plain = generate_plain(models.engine, models.weights, make_requests(requests))
    assert len(answers) == 20
    for ours, theirs in zip(answers, plain, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    texts = [Text(np.asarray(tokens), a.tokens) for tokens, a in zip(encoded, answers, strict=True)]
    kept = [i for i, text in enumerate(texts) if text.starts > 0]
    profile = profile_of(models, [texts[i] for i in kept], depth=4, ranks=RANKS)
    counts = replay_paths(profile, TREES["bushy"].paths)
    assert len(kept) == 20
    assert counts.calls_P.tolist() == [answers[i].calls for i in kept]
    assert counts.tokens_P.tolist() == [len(answers[i].tokens) - 1 for i in kept]
    for accepted, i in zip(counts.accepted_PA, kept, strict=True):
        assert np.abs(accepted - answers[i].accepted).sum() in (0, 2)  # the last round may reach past the answer's end
    assert 1.3 < counts.tokens_P.sum() / counts.calls_P.sum() < 4.5


ASKED = (("how much is", "?"), ("what do", "make?"), ("", "make a pair, or so it seems"), ("say", "again"))


def drafted_one_by_one(models: Models, text: Text) -> np.ndarray:
    """Draft log-probabilities `[T, D, V]` along the text, by what decoding calls: a row of the batch is a start."""
    drafter, params, shared = (
        models.engine.drafter,
        models.weights.drafter,
        shared_tables(models.engine, models.weights),
    )
    assert drafter is not None
    read_D = read_target(models, [text])[0]
    tokens = np.concatenate([text.prompt, text.answer])
    at_T, starts = len(text.prompt) + np.arange(text.starts), text.starts
    ahead_TL = jnp.asarray(np.broadcast_to(tokens[1:], (starts, len(tokens) - 1)))
    features = jnp.broadcast_to(read_D[: len(tokens) - 1], (starts, len(tokens) - 1, read_D.shape[-1]))
    state = drafter.init_state(params, shared, jnp.full(starts, tokens[0]), 64)
    state, logits_TV = drafter.extend(params, shared, state, ahead_TL, features, jnp.asarray(at_T))
    scratch, levels = drafter.scratch(state, STEPS - 1), [logits_TV]
    for d in range(1, STEPS):
        token_T1 = jnp.asarray(tokens[np.minimum(at_T + d, len(tokens) - 1)])[:, None]
        frontier = Frontier(token_T1, jnp.full((starts, 1), d - 2), jnp.ones((starts, 1, d), bool), d, d - 1)
        logits_T1V, scratch = drafter.expand(params, shared, state, scratch, frontier)
        levels.append(logits_T1V[:, 0])
    return np.asarray(jax.nn.log_softmax(jnp.stack(levels, axis=1), axis=-1))


@pytest.mark.parametrize("kind", marked(EVERY, *WALKED))
def test_ranks_are_those_of_drafting_level_by_level(kind: str):
    """At every start and depth, whether decoding would get there or not."""
    models, rng = models_of(kind, "chain"), np.random.default_rng(4)
    text = Text(rng.integers(0, VOCAB, 5), rng.integers(0, VOCAB, 12))
    profile = profile_of(models, [text])
    logp_TDV = drafted_one_by_one(models, text)
    ids = np.asarray(DRAWN_FROM if "draft vocabulary" in kind else range(VOCAB))
    order = np.argsort(-logp_TDV, axis=-1, kind="stable")
    for t in range(text.starts):
        for d in range(min(STEPS, text.starts - t)):
            place = np.flatnonzero(ids == text.answer[t + d + 1])
            rank = np.flatnonzero(order[t, d] == place)[0] if place.size else RANKS
            assert profile.rank_TD[t, d] == (rank if rank < RANKS else MISSED)
            if place.size:
                np.testing.assert_allclose(profile.logp_TD[t, d], logp_TDV[t, d, place[0]], rtol=1e-4, atol=2e-4)
            top = np.take_along_axis(logp_TDV[t, d], order[t, d, :RANKS], axis=-1)
            np.testing.assert_allclose(profile.top_TDK[t, d].astype(float), top, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("kind", ["eagle", "peagle"])
def test_replay_of_the_profile_is_that_of_the_recorded_texts(kind: str):
    models = models_of(kind, "bushy")
    texts, _ = decoded(kind, "bushy")
    recordings = [record(models, t.prompt, t.answer, r.settings) for t, r in zip(texts, asked(), strict=True)]
    replayed = dict(replay(models, recordings, batch=4))
    counts = replay_paths(profile_of(models, texts), TREES["bushy"].paths)
    assert counts.calls_P.tolist() == [replayed[i].calls for i in range(len(texts))]


def test_the_drafts_are_worth_comparing():
    """Of all kinds together every depth is reached, and hits and misses are found at every depth."""
    accepted = np.sum([np.sum([a.accepted for a in decoded(kind, "bushy")[1]], axis=0) for kind in FAST], axis=0)
    assert (accepted > 0).all()
    profile = profile_of(models_of("eagle", "bushy"), decoded("eagle", "bushy")[0])
    assert ((profile.rank_TD >= 0).any(axis=0) & (profile.rank_TD == MISSED).any(axis=0)).all()


def test_tokens_outside_a_draft_vocabulary_are_missed():
    models, (texts, _) = models_of("eagle of a draft vocabulary", "bushy"), decoded("eagle", "bushy")
    profile = profile_of(models, texts)
    tokens = np.concatenate([text.answer[1:] for text in texts])
    outside = ~np.isin(tokens, DRAWN_FROM)
    assert outside.any() and (profile.rank_TD[outside, 0] == MISSED).all()
    assert (profile.logp_TD[outside, 0] == -np.inf).all()
    assert np.isfinite(profile.logp_TD[~outside, 0]).all()


def test_all_ranks_hold_all_probability_and_agree_with_the_log_probability():
    models, (texts, _) = models_of("fspad", "bushy"), decoded("fspad", "bushy")
    profile = profile_of(models, texts, ranks=VOCAB)
    there = profile.rank_TD != BEYOND
    top = profile.top_TDK[there].astype(np.float64)
    assert (np.diff(top, axis=-1) <= 0).all() and np.allclose(np.exp(top).sum(-1), 1, atol=0.01)
    chosen = np.take_along_axis(top, profile.rank_TD[there][:, None].astype(int), axis=-1)[:, 0]
    np.testing.assert_allclose(chosen, profile.logp_TD[there], rtol=1e-3, atol=0.02)
    np.testing.assert_allclose(profile.entropy_TD[there], -(np.exp(top) * top).sum(-1), atol=0.02)


def test_places_behind_the_end_are_marked():
    texts = [Text(np.arange(1, 4), np.arange(6)), Text(np.arange(2), np.arange(1))]
    profile = profile_of(models_of("eagle", "bushy"), texts)
    assert profile.rank_TD.shape == (5, STEPS)
    beyond = profile.rank_TD == BEYOND
    assert beyond.sum(axis=1).tolist() == [0, 0, 1, 2, 3]
    assert np.isnan(profile.logp_TD[beyond]).all() and np.isnan(profile.entropy_TD[beyond]).all()
    assert np.isfinite(profile.logp_TD[~beyond]).all()


def test_ties_go_to_the_lower_id():
    """A drafter whose outputs are zero gives every token the same logit: rank and id are one."""
    models, (texts, _) = models_of("draft_lm", "bushy"), decoded("draft_lm", "bushy")
    nothing = jax.tree.map(jnp.zeros_like, models.weights.drafter)
    models = models._replace(weights=models.weights._replace(drafter=nothing))
    profile = profile_of(models, texts)
    tokens = np.concatenate([text.answer[1:] for text in texts])
    np.testing.assert_array_equal(profile.rank_TD[:, 0], np.where(tokens < RANKS, tokens, MISSED))


def test_a_text_has_the_same_ranks_in_every_batch():
    models, (texts, _) = models_of("eagle3", "bushy"), decoded("eagle3", "bushy")
    long = Text(np.arange(100) % VOCAB, texts[0].answer)
    together = profile_of(models, [*texts, long])
    alone = profile_of(models, texts[:1])
    np.testing.assert_array_equal(together.of(np.array([0])).rank_TD, alone.rank_TD)
    assert padded_length(long.length) > padded_length(texts[0].length)


def test_sizes_that_the_drafter_does_not_have_are_refused():
    texts = [Text(np.arange(1, 4), np.arange(6))]
    models = models_of("medusa", "bushy")
    with pytest.raises(ValueError, match=f"drafts {STEPS} tokens ahead, not {STEPS + 1}"):
        rank_texts(models, texts, read_target(models, texts), depth=STEPS + 1, ranks=2)
    models = models_of("eagle3 of a draft vocabulary", "bushy")
    with pytest.raises(ValueError, match="scores 8 tokens, fewer than 9 ranks"):
        rank_texts(models, texts, read_target(models, texts), depth=2, ranks=9)
