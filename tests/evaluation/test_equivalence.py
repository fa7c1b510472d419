"""The bundled target decodes the same text with and without speculation; where rounding decides, it is a near tie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.data.corpus import tokenize_conversations
from jaxspec.data.messages import Conversation
from jaxspec.data.packing import PackedBatches
from jaxspec.decoding.answers import total_tau
from jaxspec.decoding.generation import generate, generate_plain
from jaxspec.decoding.requests import Requests, Settings, make_requests
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.evaluation.equivalence import divergences
from jaxspec.interchange import target_folders
from jaxspec.parallel.mesh import make_mesh
from jaxspec.serving import loading
from jaxspec.serving.loading import Models
from jaxspec.serving.regeneration import RewriteOptions, rewrite, write_user_turns
from jaxspec.training.distill import distill
from jaxspec.trees import parse_tree

TREES = ("chain:4", "static:eagle1", "dynamic:24x4x6")
WARPS = ({}, {"top_p": 0.9}, {"top_k": 20})
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)


class Head(NamedTuple):
    """The bundled target, a drafter, and questions the target wrote."""

    models: Models
    questions: list[str]


def questions_from(models: Models, count: int, *, seed: int) -> list[str]:
    """Short user turns that the target writes itself."""
    short = Settings(max_new_tokens=96, temperature=1.0)
    return [turn.text for turn in write_user_turns(models.plain(), count, seed=seed, settings=short, batch=32)]


@pytest.fixture(scope="module")
def head() -> Head:
    """The drafter is the target without its last layer: good enough to be kept and to be refused, without training."""
    models = loading.load_models("tiny")
    c, target = models.config, models.weights.target
    shape = DraftLMConfig(
        c.vocab, c.width, c.layers - 1, c.heads, c.kv_heads, c.head_dim, c.mlp, c.rope_theta, tied=c.tied
    )
    params = {**target, "layers": target["layers"][:-1]}
    return Head(models.with_drafter(DraftLM(shape), params, parse_tree("chain:4")), questions_from(models, 12, seed=7))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head distilled for a minute, on one device, and evaluated by one step, to compile less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxspec.training.resolve.make_mesh", lambda *_, **__: make_mesh(1, devices=jax.devices()[:1]))
        patch.setattr("jaxspec.training.distill.EVAL_STEPS", 1)
        yield train_head(tmp_path_factory.mktemp("identity"))


def train_head(folder: Path) -> Head:
    models = loading.load_models("tiny")
    questions = questions_from(models, 52, seed=7)
    asked = [Conversation(str(i), "self", ({"role": "user", "content": q},)) for i, q in enumerate(questions[12:])]
    answered = []
    for _, done in rewrite(models, enumerate(asked), Settings(112, seed=7), RewriteOptions(batch=40)):
        answered += [r.conversation for r in done]
    config = DistillConfig(
        "identity",
        "tiny",
        DataConfig("", "", length=128, batch=4, loss_on="assistant"),
        OptimizerConfig(5e-3, warmup_steps=5, steps=100, clip_value=0.5),
        CheckpointConfig(str(folder / "run"), save_every=100),
        str(folder / "drafter"),
    )
    corpus = tokenize_conversations(answered, models.tokenizer, length=128)
    data = [PackedBatches(corpus, 128, 4, epochs=e, loss_on="assistant") for e in (None, 1)]
    target = models.engine.target
    module, done = distill(config, target, models.weights.target, *data)  # type: ignore[arg-type]
    return Head(models.with_drafter(module, done.params, parse_tree("chain:4")), questions[:12])


@pytest.fixture(scope="module")
def many(trained: Head) -> Head:
    """The trained head with 300 questions."""
    return trained._replace(questions=questions_from(trained.models, 300, seed=8))


def batches(head: Head, count: int, batch: int, temperature: Any = 0.0, **warp: Any) -> list[Requests]:
    """The first `count` questions in batches; every row has its own seed, and perhaps its own temperature."""
    models, at = head.models, np.broadcast_to(temperature, batch).tolist()
    requests = [
        models.request(
            models.tokenizer.encode_prompt([{"role": "user", "content": question}]),
            Settings(48, at[i % batch], seed=i, **warp),
        )
        for i, question in enumerate(head.questions[: count - count % batch])
    ]
    return [make_requests(requests[i : i + batch]) for i in range(0, len(requests), batch)]


def differing(head: Head, tree: str, requests: list[Requests], rows: int | None) -> tuple[int, list[float]]:
    """Rows whose text differs from plain decoding `rows` wide (None: as wide as the tree), and their margins."""
    models = head.models.with_tree(parse_tree(tree))
    engine, weights = models.engine, models.weights
    assert engine.tree is not None
    margins = []
    for request in requests:
        fast = generate(engine, weights, request)
        plain = generate_plain(engine, weights, request, rows=rows or engine.tree.nodes)
        margins += [d.margin for d in divergences(engine, weights, request, plain, fast)]
    return len(margins), margins


ALONE = pytest.param(TREES[0], 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("tree", "batch"), [*((tree, 4) for tree in TREES), ALONE])
def test_greedy_text_is_plain_decodings_token_for_token(head: Head, tree: str, batch: int):
    assert differing(head, tree, batches(head, 3 * batch, batch), None) == (0, [])


@pytest.mark.parametrize(("tree", "warp"), list(zip(TREES, WARPS, strict=True)))
def test_sampled_text_is_plain_decodings_token_for_token_with_the_same_seed(head: Head, tree: str, warp: dict):
    """Rows of one batch at different temperatures."""
    assert differing(head, tree, batches(head, 12, 4, temperature=TEMPERATURES, **warp), None) == (0, [])


def test_the_head_is_good_enough_for_these_tests_to_mean_something(head: Head):
    done = [generate(head.models.engine, head.models.weights, requests) for requests in batches(head, 12, 4)]
    assert np.mean([total_tau(answers) for answers in done]) > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", TREES)
def test_300_greedy_texts_are_plain_decodings_and_one_row_programs_part_only_at_near_ties(
    many: Head, tree: str, batch: int, record_property
):
    requests = batches(many, 300, batch)
    assert differing(many, tree, requests, None) == (0, [])
    count, margins = differing(many, tree, requests, 1)
    record_property("one_row_divergences", count)
    assert all(m < 1e-3 for m in margins), margins


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tree", TREES)
def test_sampled_texts_are_plain_decodings_under_every_warp(many: Head, tree: str, temperature: float):
    for warp in WARPS:
        requests = batches(many, 60, 4, temperature=temperature, **warp)
        assert differing(many, tree, requests, None) == (0, []), warp


def test_bf16_texts_part_only_at_near_ties(head: Head):
    models = head.models
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), models.weights)
    engine = Engine(
        models.engine.target.clone(dtype=jnp.bfloat16),  # type: ignore[attr-defined]
        models.engine.drafter.clone(dtype=jnp.bfloat16),  # type: ignore[union-attr]
        parse_tree("chain:4"),
    )
    exact = Engine(models.engine.target)
    whole = Weights(jax.tree.map(lambda a: a.astype(jnp.float32), half.target))
    requests = batches(head, 4, 4)[0]
    fast = generate(engine, half, requests)
    plain = generate_plain(engine, half, requests, rows=5)
    assert all(np.isin(answer.tokens, np.arange(models.config.vocab)).all() for answer in fast)
    margins = [d.margin for d in divergences(exact, whole, requests, plain, fast)]
    assert all(m < 0.5 for m in margins), margins  # a logit of 16 has steps of 0.125 in bf16


def test_a_row_that_parts_is_reported_with_its_place_and_margin(head: Head):
    requests = batches(head, 2, 2)[0]
    models = head.models
    plain = generate_plain(models.engine, models.weights, requests)
    other = plain[1].tokens.copy()
    other[3] = (other[3] + 1) % models.config.vocab
    changed = [plain[0], plain[1]._replace(tokens=other)]
    (found,) = divergences(models.engine, models.weights, requests, plain, changed)
    assert (found.row, found.index) == (1, 3) and found.margin > 0


def test_the_bundled_folder_is_small_enough_to_ship():
    folder = Path(target_folders.target_folder("tiny"))
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 14 * 2**20
    assert dataclasses.asdict(loading.load_models("tiny").config)["vocab"] == 4096
