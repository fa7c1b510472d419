"""Every rule through the engine: the law of what the compiled program writes, and which rules go with which drafts."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toys import TableDrafter, TableTarget

from jaxspec import verify
from jaxspec.base import DraftMode
from jaxspec.decoding.generation import NO_LIMIT
from jaxspec.decoding.requests import Requests
from jaxspec.decoding.rounds import Engine, Weights, decode_rounds, prefill
from jaxspec.sampling import Sampling, distribution_of
from jaxspec.trees import AdaptiveTree, DynamicTree, StaticTree, chain, parse_paths
from jaxspec.verify import DEFAULT_RULES, RULES, rejection, rule_named, rules

pytestmark = pytest.mark.usefixtures("compile_fully")

VOCAB, LENGTH, BATCH = 3, 5, 50_000
TEMPERATURE, TOP_P = 0.8, 0.85
FORKED = StaticTree(parse_paths("0 1 00 01"))
ADAPTIVE = AdaptiveTree(
    DynamicTree(6, 3, 2), (1, 2, 4, 6), (1.0, 1.1, 1.4, 1.7), 0.2, 0.1, rate=1.2, reach=(0.9, 0.7)
)  # prices at which rounds of every budget and number of levels are chosen
ENGINES: list[tuple[DraftMode, str, Any]] = [
    ("topk", "target-draw", DynamicTree(5, 2, 2)),
    ("topk", "recursive-rejection", FORKED),
    ("topk", "traversal", DynamicTree(5, 2, 2)),
    ("topk", "target-draw", ADAPTIVE),
    ("topk", "recursive-rejection", ADAPTIVE),
    ("sample", "specinfer", FORKED),
    ("sample", "specinfer", DynamicTree(5, 2, 2)),
    ("sample", "speculative-sampling", chain(3)),
    ("sample", "block", chain(3)),
    ("sample", "traversal", FORKED),
    ("swor", "recursive-rejection", FORKED),
    ("swor", "recursive-rejection", DynamicTree(5, 2, 2)),
    ("swor", "traversal", DynamicTree(5, 2, 2)),
]
NAMES = [f"{mode}-{rule}-{tree.spec}" for mode, rule, tree in ENGINES]


def engine_of(mode: DraftMode, rule: str, tree: Any) -> Engine:
    return Engine(TableTarget(), TableDrafter(), tree, mode=mode, rule=RULES[rule])


@functools.cache
def weights() -> Weights:
    rng = np.random.default_rng(3)
    target = 0.8 * rng.normal(size=(VOCAB, VOCAB))
    draft = 0.5 * target + rng.normal(size=(VOCAB, VOCAB))
    return Weights(jnp.asarray(target, jnp.float32), jnp.asarray(draft, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def texts(engine: Engine, weights: Weights, seed_Q: jax.Array, draft_temperature: float = 0.9) -> jax.Array:
    """The first `LENGTH` tokens behind a prompt of one token, `[Q, LENGTH]`: prefill and rounds as they are used."""

    def one(seed: jax.Array) -> jax.Array:
        sampling = Sampling(jnp.full(1, TEMPERATURE), jnp.zeros(1, jnp.int32), jnp.full(1, TOP_P), seed[None])
        nothing, ones = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
        requests = Requests(nothing, ones, sampling, nothing - 1, LENGTH * ones, jnp.full(1, draft_temperature))
        slots = LENGTH + engine.path
        state = prefill(engine, weights, requests, 1 + slots, slots)
        return decode_rounds(engine, weights, state, NO_LIMIT).output_BO[0, :LENGTH]  # type: ignore[arg-type]

    return jax.vmap(one)(seed_Q)


def p_value(engine: Engine, trials: int, draft_temperature: float = 0.9) -> float:
    """Of the target's law of `LENGTH` tokens, by the likelihood ratio over all texts."""
    counts = np.zeros(VOCAB**LENGTH)
    for begin in range(0, trials, BATCH):
        text = np.asarray(
            texts(engine, weights(), jnp.arange(begin, begin + BATCH, dtype=jnp.uint32), draft_temperature)
        )
        counts += np.bincount(text @ VOCAB ** np.arange(LENGTH)[::-1], minlength=len(counts))
    one = Sampling(jnp.asarray([TEMPERATURE]), jnp.asarray([0]), jnp.asarray([TOP_P]), jnp.asarray([0]))
    step = np.asarray(distribution_of(weights().target[None], one), np.float64)[0]
    paths = itertools.product(range(VOCAB), repeat=LENGTH)
    distribution = np.array([np.prod([step[a, b] for a, b in itertools.pairwise((0, *path))]) for path in paths])
    if counts[distribution == 0].any():
        return 0.0
    seen, want = counts[distribution > 0], distribution[distribution > 0] * trials
    assert want.min() > 5
    g = 2 * np.sum(seen * np.log(np.maximum(seen, 1e-300) / want))
    return float(stats.chi2.sf(g, len(seen) - 1))


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_what_the_program_writes_over_round_boundaries_has_the_targets_distribution(engine: Any):
    assert p_value(engine_of(*engine), 50_000) > 1e-6


@pytest.mark.parametrize("rule", ["recursive-rejection", "traversal"])
def test_rows_that_draft_their_likeliest_tokens_among_drawn_ones_have_the_targets_distribution(rule: str, monkeypatch):
    """Draft temperature 0: tested as what they are. As drawn ones they would not have it."""
    engine = engine_of("swor", rule, FORKED)
    assert p_value(engine, 50_000, 0.0) > 1e-6
    monkeypatch.setattr(rejection, "_drawn_from", lambda mode, row, s_V, token: s_V)
    texts.clear_cache()  # type: ignore[attr-defined]
    try:
        assert p_value(engine, 50_000, 0.0) < 1e-6
    finally:
        texts.clear_cache()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_a_million_texts_have_the_targets_distribution(engine: Any):
    assert p_value(engine_of(*engine), 1_000_000) > 1e-6


@pytest.mark.parametrize("use", [rules.COINS, rules.BONUS])
def test_noise_used_again_in_the_next_round_is_seen(use: int, monkeypatch: pytest.MonkeyPatch):
    rightly = rules.round_noise

    def again(seed_B: Any, length_B: Any, which: int, make: Any) -> Any:
        return rightly(seed_B, jnp.where(which == use, 0, length_B), which, make)

    monkeypatch.setattr(rules, "round_noise", again)
    texts.clear_cache()  # type: ignore[attr-defined]
    try:
        assert p_value(engine_of("sample", "speculative-sampling", chain(1)), 300_000) < 1e-6
    finally:
        texts.clear_cache()  # type: ignore[attr-defined]


def test_typical_acceptance_is_seen_to_be_lossy():
    engine = engine_of("topk", "typical", FORKED)
    assert not engine.rule.lossless and p_value(engine, 50_000) < 1e-6


def test_typical_acceptance_keeps_the_longest_path_that_is_likely_enough():
    """By hand: thresholds min(0.09, 0.3 exp(-H)); of two paths as long, the likelier."""
    from toys import node_paths, tree_of

    token, parent, depth = [0, 1, 2, 1, 3, 0], [-1, 0, 0, 1, 2, 3], [0, 1, 1, 2, 2, 3]
    ancestors = np.eye(6, dtype=bool)
    for n in range(1, 6):
        ancestors[n] |= ancestors[parent[n]]
    tree = tree_of(*(jnp.asarray(a)[None] for a in (token, parent, depth, np.zeros(6), np.ones(6, bool), ancestors)))
    flat = np.full(4, 0.25)  # threshold 0.3 / 4 = 0.075
    sure = np.array([0.96, 0.02, 0.01, 0.01])  # threshold 0.09
    distribution = np.array([flat, flat, [0.1, 0.1, 0.1, 0.7], sure, flat, flat])
    assert node_paths(tree)[4] == (2, 3)
    sampling = Sampling(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.zeros(1, jnp.uint32))

    def count_and_path(distribution: np.ndarray) -> tuple[int, list[int]]:
        case = verify.VerifyInputs(
            "topk", tree, 3, jnp.log(jnp.asarray(distribution, jnp.float32))[None], jnp.zeros(1, int), sampling
        )
        accepted = jax.device_get(RULES["typical"].accept(case))
        return int(accepted.count_B[0]), accepted.path_BP[0].tolist()

    assert count_and_path(distribution) == (3, [0, 1, 3, 5])
    distribution[3] = sure[
        ::-1
    ]  # the token 0 behind node 3 has 0.01: both paths have two tokens, (2, 3) is the likelier
    assert count_and_path(distribution) == (2, [0, 2, 4, 4])
    distribution[0] = [0.5, 0.45, 0.05, 0.0]  # H = 0.86 nats, threshold 0.09: token 2 falls, and what is below it
    assert count_and_path(distribution) == (2, [0, 1, 3, 3])


def test_rules_refuse_what_they_are_not_right_for():
    for mode, name in DEFAULT_RULES.items():
        assert rule_named(None, mode) is RULES[name] and mode in RULES[name].modes and RULES[name].lossless
    with pytest.raises(ValueError, match="target-draw is for children drafted by topk, not swor: take the draft mode"):
        engine_of("swor", "target-draw", chain(2))
    with pytest.raises(ValueError, match="block is for chains: take the tree chain:2"):
        engine_of("sample", "block", FORKED)
    with pytest.raises(ValueError, match="there is no rule 'coin'; the rules are target-draw,"):
        rule_named("coin", "topk")
    assert [name for name, rule in RULES.items() if not rule.lossless] == ["typical"]
