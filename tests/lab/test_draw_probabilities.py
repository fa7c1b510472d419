"""The target's own probabilities of the children of depth 1: the hits' mean, without the luck of the draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS, STEPS, VOCAB, WIDTH
from lab_toys import one_pass_toy
from random_models import random_weights

from jaxspec.decoding.requests import Settings
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.lab.acceptance import acceptance_table
from jaxspec.lab.making import ProfiledDrafter, joined, rank_arms
from jaxspec.lab.profile import Profile, load_profile
from jaxspec.lab.ranks import Draws, Ranks, Text, batches, rank_texts, ranked_profile, read_target
from jaxspec.lab.rates import measure_rates
from jaxspec.lab.replay import replay
from jaxspec.nn.attention import causal_mask
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import chain

CONFIG = LlamaConfig(VOCAB, WIDTH, 3, 2, 1, 6, 20)
RANKS = 5
DRAWN_FROM = (0, 1, 2, 4, 5, 8, 9, 12)
"""A draft vocabulary."""
PROMPT = np.array([3, 1, 4])


def models_of(kind: str, vocab: tuple[int, ...] | None = None) -> Models:
    module, drafter = Decoder(CONFIG, stacked=False), KINDS[kind]
    params = jax.tree.map(jnp.asarray, random_weights(drafter, 0.5, 2))
    plain = Models(Engine(module), Weights(random_weights(module, 0.7, 1)), cast(Any, None), CONFIG)
    return plain.with_drafter(drafter, params, chain(2), vocab)


def ranks_of(models: Models, texts: list[Text], settings: Settings) -> Ranks:
    found: dict[int, Ranks] = {}
    for group in batches(texts):
        some = [texts[i] for i in group]
        draws = Draws(read_target(models.plain(), some), settings)
        parts = rank_texts(models, some, read_target(models, some), depth=STEPS, ranks=RANKS, draws=draws)
        found |= dict(zip(group, parts, strict=True))
    return joined(found, len(texts))


def law_behind(models: Models, tokens: list[int], settings: Settings) -> np.ndarray:
    """Returns the distribution `[V]` of the next token, by the definitions of temperature, top-k and top-p."""
    plain, length = models.plain(), len(tokens)
    target, params = plain.engine.target, plain.weights.target
    out = target.forward(params, jnp.array([tokens]), jnp.arange(length)[None], causal_mask(length))
    logits_V = np.asarray(target.logits(params, out.features_BLD))[0, -1].astype(np.float64) / settings.temperature
    order = np.argsort(-logits_V, kind="stable")
    kept = order[: settings.top_k or None]
    p_K = np.exp(logits_V[kept] - logits_V[kept].max())
    p_K /= p_K.sum()
    # The likeliest tokens up to the one at which their mass reaches top-p.
    count = 1 + int(np.searchsorted(np.cumsum(p_K)[:-1], settings.top_p)) if settings.top_p < 1 else len(kept)
    law_V = np.zeros(VOCAB)
    law_V[kept[:count]] = p_K[:count] / p_K[:count].sum()
    return law_V


@pytest.mark.parametrize(
    ("kind", "vocab", "settings"),
    [
        ("eagle", None, Settings(temperature=1.0)),
        ("eagle", DRAWN_FROM, Settings(temperature=0.6)),
        ("eagle3", None, Settings(temperature=0.8, top_k=4)),
        ("medusa sharing the head", DRAWN_FROM, Settings(temperature=1.3, top_p=0.7)),
        ("draft_lm", None, Settings(temperature=1.0)),
    ],
)
def test_the_mean_is_the_probability_of_acceptance_by_enumeration(kind: str, vocab: Any, settings: Settings):
    """Every text of two tokens, by its probability: sums of hits and of the target's probabilities are equal."""
    models = models_of(kind, vocab)
    root_V = law_behind(models, PROMPT.tolist(), settings)
    laws_VV = np.array([law_behind(models, [*PROMPT.tolist(), v], settings) for v in range(VOCAB)])
    texts = [Text(PROMPT, np.array([v, w])) for v in range(VOCAB) for w in range(VOCAB)]
    found = ranks_of(models, texts, settings)
    rank_VV, p_VVK = found.rank_TD[:, 0].reshape(VOCAB, VOCAB), found.p_TK.reshape(VOCAB, VOCAB, RANKS)
    hit_VVK = rank_VV[..., None] == np.arange(RANKS)
    # Given the root, the probability does not depend on the token that was drawn.
    assert np.ptp(p_VVK, axis=1).max() < 1e-6
    np.testing.assert_allclose(p_VVK[:, 0], np.einsum("vw,vwk->vk", laws_VV, hit_VVK), atol=2e-6)
    accepted_K = np.einsum("v,vw,vwk->k", root_V, laws_VV, hit_VVK)
    np.testing.assert_allclose(np.einsum("v,vw,vwk->k", root_V, laws_VV, p_VVK), accepted_K, atol=2e-6)
    assert accepted_K.max() > 0.01


def test_probabilities_of_a_longer_text_stand_at_its_starts():
    models, settings = models_of("eagle3"), Settings(temperature=1.0)
    texts = [Text(PROMPT, np.array([5, 2, 8, 8, 1])), Text(PROMPT[:1], np.array([7, 6])), Text(PROMPT, np.array([2]))]
    found = ranks_of(models, texts, settings)
    assert found.p_TK.shape == (5, RANKS) and found.p_TK.dtype == np.float32
    laws = [law_behind(models, [*PROMPT, *texts[0].answer[: t + 1]], settings) for t in range(4)]
    laws.append(law_behind(models, [PROMPT[0], 7], settings))
    hits = found.rank_TD[:, 0] >= 0
    tokens = np.array([2, 8, 8, 1, 6])
    for law_V, p_K, rank, token in zip(laws, found.p_TK, found.rank_TD[:, 0], tokens, strict=True):
        if rank >= 0:
            assert p_K[rank] == pytest.approx(law_V[token], abs=2e-6)
    assert hits.any() and np.isfinite(found.p_TK).all() and (found.p_TK.sum(1) <= 1 + 1e-5).all()


def test_batches_are_kept_with_their_probabilities_and_by_their_temperature(tmp_path: Path):
    models = models_of("eagle3")
    arms = [ProfiledDrafter("one", models, STEPS, "d"), ProfiledDrafter("two", models_of("eagle"), STEPS, "e")]
    texts = [Text(PROMPT, np.arange(6))]
    made = {}
    for t in (0.0, 0.5, 1.0, 1.0):
        made[t] = rank_arms(arms, texts, Settings(temperature=t), RANKS, tmp_path, lambda _: None)
    assert len(list((tmp_path / "ranks").iterdir())) == 6
    assert [found.p_TK.shape for found in made[0.0]] == [(5, 0)] * 2
    for arm, found, cold in zip(arms, made[1.0], made[0.5], strict=True):
        np.testing.assert_allclose(found.p_TK, ranks_of(arm.models, texts, Settings(temperature=1.0)).p_TK, atol=1e-6)
        np.testing.assert_array_equal(found.rank_TD, cold.rank_TD)
        assert not np.allclose(found.p_TK, cold.p_TK)


def drawn(prompts: int, tokens: int, seed: int) -> Profile:
    """Returns a simulated profile whose ranks of depth 1 are drawn from probabilities that it holds."""
    profile = one_pass_toy(prompts=prompts, tokens=tokens, seed=seed)
    return dataclasses.replace(profile, p_TK=np.exp(profile.top_TDK[:, 0]))


def test_the_rates_have_the_same_mean_and_vary_less():
    known, rates = [], []
    for seed in range(40):
        profile = drawn(12, 40, seed)
        rates.append(measure_rates(dataclasses.replace(profile, p_TK=None)))
        known.append(measure_rates(profile))
    ours, theirs = (np.array([r.rate_DK for r in many]) for many in (known, rates))
    # The draw of a token and that of its distribution: with the first taken out, a fraction of the variance is left.
    assert ours[:, 0].var(0).sum() < 0.6 * theirs[:, 0].var(0).sum()
    error = np.sqrt((ours[:, 0] - theirs[:, 0]).var(0) / len(ours))
    assert (np.abs(ours[:, 0].mean(0) - theirs[:, 0].mean(0)) < 4 * error).all()
    np.testing.assert_array_equal(ours[:, 1:], theirs[:, 1:])
    widths = [np.mean([(r.high_DK - r.low_DK)[0] for r in many]) for many in (known, rates)]
    assert widths[0] < 0.85 * widths[1]


def test_the_tables_of_a_search_take_them_and_a_replay_does_not():
    profile = drawn(12, 40, 0)
    bare = dataclasses.replace(profile, p_TK=None)
    assert profile.p_TK is not None
    table = acceptance_table(profile, strength=0, monotone=False)
    assert table.rate_DK[0] == pytest.approx(profile.p_TK.mean(0), rel=1e-5)
    assert table.rate_DK[1:] == pytest.approx(acceptance_table(bare, strength=0, monotone=False).rate_DK[1:])
    some = np.arange(0, 400, 3)
    chosen = acceptance_table(profile, starts=some, given="kept", strength=0, monotone=False)
    assert chosen.rate_DK[0] == pytest.approx(profile.p_TK[some].mean(0), rel=1e-5)
    shape = ((0,), (1,), (0, 0))
    np.testing.assert_array_equal(replay(profile, shape).accepted_PA, replay(bare, shape).accepted_PA)


def test_a_file_keeps_them_and_one_without_is_read_as_before(tmp_path: Path):
    profile = drawn(3, 9, 0)
    profile.save(tmp_path / "p.npz")
    again = load_profile(tmp_path / "p.npz")
    assert again.p_TK is not None and profile.p_TK is not None
    np.testing.assert_array_equal(again.p_TK, profile.p_TK)
    part = again.of(np.array([2, 0])).p_TK
    assert part is not None
    np.testing.assert_array_equal(part, np.concatenate([profile.p_TK[16:], profile.p_TK[:8]]))
    dataclasses.replace(profile, p_TK=None).save(tmp_path / "old.npz")
    assert load_profile(tmp_path / "old.npz").p_TK is None
    with pytest.raises(ValueError, match="make it anew"):
        dataclasses.replace(profile, p_TK=profile.p_TK[1:])


def test_greedy_texts_have_none():
    models, texts = models_of("eagle"), [Text(PROMPT, np.arange(6))]
    (found,) = rank_texts(models, texts, read_target(models, texts), depth=STEPS, ranks=RANKS)
    assert ranked_profile(texts, found, ("",), {"ranks": RANKS}).p_TK is None
