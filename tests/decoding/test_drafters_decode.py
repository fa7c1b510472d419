"""Every drafter under the engine: its text is plain text row by row, whatever it drafts, and it learns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_weights
from toys import each_request, texts_of

from jaxspec.base import Array, ChooseChildren, DraftLogits, DraftMode, Tree, TreePolicy
from jaxspec.decoding import rounds
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import NO_LIMIT, collect, generate, generate_plain, run_rounds, sizes
from jaxspec.decoding.requests import Request, Requests, make_requests
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.decoding.slots import Slots
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import (
    DRAFTERS,
    DraftLM,
    DraftLMConfig,
    Eagle,
    Eagle3,
    Eagle3Config,
    EagleConfig,
    Fspad,
    FspadConfig,
    Medusa,
    MedusaConfig,
    ParallelSpec,
    ParallelSpecConfig,
    PEagle,
    PEagleConfig,
)
from jaxspec.evaluation.replay import record, replay
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import AdaptiveTree, BestFirstTree, DynamicTree, StaticTree, chain, parse_paths, parse_tree
from jaxspec.verify import RULES

VOCAB, WIDTH, DEEPEST, ROWS, BUDGET = 12, 16, 3, 8, 24
LENGTHS = (40, 3, 16)
PADDED = 64
SHAPE = (WIDTH, 2, 1, 6, 20)
CONFIG = LlamaConfig(VOCAB, WIDTH, 2, 2, 1, 6, 20)


@dataclasses.dataclass(frozen=True)
class ByRoot:
    """Every round, each row's tree is one of several, by its root token: one program for all of them."""

    trees: tuple[TreePolicy, ...]
    modes: tuple[DraftMode, ...] = ("topk",)
    nodes: int = ROWS
    depth: int = DEEPEST

    @property
    def slots(self) -> int:
        return max(tree.slots for tree in self.trees)

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        grown = [tree.grow(draft, choose, scratch, root_logits_BV, root_token_B) for tree in self.trees]
        which_B, rows = root_token_B % len(grown), jnp.arange(root_token_B.shape[0])
        return jax.tree.map(lambda *each: jnp.stack(each)[which_B, rows], *grown)


HEADS: dict[str, Any] = {
    "eagle": Eagle(EagleConfig(*SHAPE)),
    "fspad": Fspad(FspadConfig(*SHAPE)),
    "eagle3": Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1))),
    "medusa": Medusa(MedusaConfig(WIDTH, DEEPEST, vocab=VOCAB)),
    "parallelspec": ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=DEEPEST)),
    "peagle": PEagle(
        PEagleConfig(*SHAPE, vocab=VOCAB, taps=(0, 1), tokens=DEEPEST, layers=2, mask_token=3, embed_vocab=VOCAB)
    ),
    "draft_lm": DraftLM(DraftLMConfig(VOCAB, 12, 2, 2, 1, 6, 20)),
}
OTHERS: dict[str, Any] = {
    "medusa sharing the head": Medusa(MedusaConfig(WIDTH, DEEPEST)),
    "parallelspec in medusa": ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=DEEPEST, host="medusa")),
    "eagle3 narrow": Eagle3(
        Eagle3Config(12, 2, 1, 6, 20, vocab=VOCAB, taps=(0, 1), target_width=WIDTH, embed_vocab=VOCAB)
    ),
}
"""Other shapes, under best-first trees."""
TREES: dict[str, TreePolicy] = {
    "chain": chain(DEEPEST, rows=ROWS),
    "static": StaticTree(parse_paths("0 1 2 00 01 10 000"), rows=ROWS),
    "dynamic": DynamicTree(ROWS, DEEPEST, 3),
    "best_first": BestFirstTree(ROWS, DEEPEST, 3),
}
ADAPTIVE = AdaptiveTree(DynamicTree(ROWS, DEEPEST, 3), (1, 3, ROWS), (1.0, 1.1, 1.2), 0.05, 0.1, rate=1.0)
"""With a price on levels, so that drafting stops early in some rounds."""
TREES["adaptive"] = ADAPTIVE
TREES["mixed"] = ByRoot((TREES["chain"], TREES["static"], TREES["dynamic"]))
PAIRS = [*((head, "mixed") for head in HEADS), *((head, "best_first") for head in OTHERS)]
PAIRS += [(head, "adaptive") for head in ("eagle", "medusa", "parallelspec")]
SINGLE = [pytest.param(head, tree, marks=pytest.mark.slow) for head in HEADS for tree in ("chain", "static", "dynamic")]
every = pytest.mark.parametrize("head", HEADS)


@functools.cache
def target() -> tuple[Decoder, Any]:
    """Random weights large enough for a text that goes on changing."""
    module = Decoder(CONFIG, stacked=False)
    return module, random_weights(module, 0.7, 1)


def pair(head: str, tree: str) -> tuple[Engine, Weights]:
    module, params = target()
    drafter = {**HEADS, **OTHERS}[head]
    weights = Weights(params, random_weights(drafter, 0.5, 2))
    return Engine(module.clone(taps=drafter.taps), drafter, TREES[tree]), weights


@functools.cache
def asked(kind: str) -> list[Request]:
    """Three rows of different lengths: all greedy, or greedy, sampled and sampled from a truncated distribution."""
    rng = np.random.default_rng(len(kind))
    prompts = [rng.integers(0, VOCAB, n) for n in LENGTHS]
    mixed = {"temperature": [0.0, 0.8, 1.2], "top_k": [0, 0, 6], "top_p": [1, 1, 0.9], "seed": [1, 2, 3]}
    budgets = {"max_new_tokens": [BUDGET, BUDGET, 13]}
    return each_request(prompts, **budgets, **(mixed if kind == "sampled" else {}))


def batch(kind: str) -> Requests:
    return make_requests(asked(kind), width=PADDED)


def rows_of(requests: Requests, *rows: int) -> Requests:
    return jax.tree.map(lambda a: a[np.array(rows)], requests)


@functools.cache
def drafted(head: str, tree: str, kind: str) -> list[Answer]:
    return generate(*pair(head, tree), batch(kind))


@functools.cache
def plain_alone(kind: str, row: int) -> list[int]:
    """Returns the text of plain decoding for one row of a batch, with no row beside it."""
    engine, weights = pair("eagle", "chain")
    return generate_plain(engine, weights, rows_of(batch(kind), row), rows=ROWS)[0].tokens.tolist()


def test_every_drafter_of_the_table_is_here():
    assert {name: type(head) for name, head in HEADS.items()} == {name: kind.module for name, kind in DRAFTERS.items()}


def test_the_texts_are_worth_comparing():
    """They go on changing, and some but not all drafts are accepted: of every drafter, and at every depth of some."""
    for kind in ("greedy", "sampled"):
        assert all(len(set(plain_alone(kind, row))) > 4 for row in range(3))
    both = [[*drafted(*pair, "greedy"), *drafted(*pair, "sampled")] for pair in PAIRS]
    accepted = [np.sum([answer.accepted for answer in answers], axis=0) for answers in both]
    assert all(counts[0] > 0 and counts[1:].sum() > 0 for counts in accepted)
    assert (np.sum(accepted, axis=0) > 0).all()


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize(("head", "tree"), [*PAIRS, *SINGLE])
def test_text_is_that_of_plain_decoding_alone_token_for_token(head: str, tree: str, kind: str):
    text = drafted(head, tree, kind)
    assert texts_of(text) == [plain_alone(kind, row) for row in range(3)]
    assert all(answer.finish == "length" and answer.calls == answer.accepted.sum() for answer in text)


@pytest.mark.parametrize(("head", "tree"), [*PAIRS, *SINGLE])
def test_what_a_row_drafts_does_not_depend_on_its_neighbours(head: str, tree: str):
    """Among copies of itself and in another place it accepts the same number of drafts in every round."""
    engine, weights = pair(head, tree)
    together = drafted(head, tree, "sampled")
    for rows in ((0, 0, 0), (2, 0, 1)):
        other = generate(engine, weights, rows_of(batch("sampled"), *rows))
        for answer, expected in zip(other, [together[i] for i in rows], strict=True):
            assert answer.tokens.tolist() == expected.tokens.tolist()
            assert answer.accepted.tolist() == expected.accepted.tolist()


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize(("head", "tree"), [*PAIRS, *SINGLE])
def test_a_replay_makes_the_calls_of_decoding(head: str, tree: str, kind: str):
    """Side by side and filled up; only a last round accepts less, by what decoding drafts past the answer's end."""
    engine, weights = pair(head, tree)
    models = Models(engine, weights, cast(Any, None), CONFIG)
    decoded, requests = drafted(head, tree, kind), asked(kind)
    recordings = [
        record(models, np.asarray(r.tokens), a.tokens, r.settings) for r, a in zip(requests, decoded, strict=True)
    ]
    replayed = dict(replay(models, recordings, batch=2))
    assert sorted(replayed) == [0, 1, 2]
    for row, answer in replayed.items():
        assert answer.tokens.tolist() == decoded[row].tokens.tolist()
        assert answer.calls == decoded[row].calls
        assert np.abs(answer.accepted - decoded[row].accepted).sum() in (0, 2)
        past = answer.accepted @ np.arange(1, DEEPEST + 2) - (len(answer.tokens) - 1)
        assert past in (0, 1)  # the last round's bonus token


def test_other_rules_are_not_replayed():
    engine, weights = pair("eagle", "dynamic")
    models = Models(engine, weights, cast(Any, None), CONFIG).with_rule("sample")
    with pytest.raises(ValueError, match="only texts of the rule target-draw can be replayed"):
        next(replay(models, [], batch=1))


@every
def test_a_second_generation_compiles_nothing(head: str, compilations: list[str]):
    drafted(head, "mixed", "greedy")
    engine, weights = pair(head, "mixed")
    requests = batch("sampled")
    compilations.clear()
    generate(engine, weights, requests)
    assert not compilations


@pytest.mark.parametrize("head", ["eagle", "parallelspec", "draft_lm"])
def test_prompts_read_in_chunks_are_drafted_for_as_if_read_at_once(head: str, monkeypatch: pytest.MonkeyPatch):
    """One drafter of each kind of state; the prompts end in the third chunk, in the first, and with it."""
    engine, weights = pair(head, "mixed")
    whole = drafted(head, "mixed", "sampled")
    monkeypatch.setattr("jaxspec.decoding.rounds.CHUNK", 16)
    requests = batch("sampled")
    read = jax.jit(lambda w, r: rounds.prefill(engine, w, r, *sizes(engine, PADDED, BUDGET)))
    pieces = collect(run_rounds(engine, weights, read(weights, requests), NO_LIMIT))
    assert texts_of(pieces) == texts_of(whole)
    assert [a.accepted.tolist() for a in pieces] == [a.accepted.tolist() for a in whole]


def test_a_draft_lm_in_a_refilled_slot_drafts_as_it_does_alone():
    """Its state begins with the prompt's first token, which nothing else brings."""
    engine, weights = pair("draft_lm", "mixed")
    slots = Slots(engine, weights, 3, longest=PADDED, max_new_tokens=BUDGET, stops=1)
    waiting = [(kind, row) for kind in ("greedy", "sampled") for row in range(3)]
    held, done = {}, {}
    while waiting or held:
        while waiting and slots.free:
            place = slots.free[0]
            held[place] = kind, row = waiting.pop()
            slots.admit(asked(kind)[row], place)
        done |= {held.pop(place): text for place, text in slots.run().items()}
    for (kind, row), text in done.items():
        together = drafted("draft_lm", "mixed", kind)[row]
        assert text.tokens.tolist() == together.tokens.tolist()
        assert text.accepted.tolist() == together.accepted.tolist()
    assert len(done) == 6


SOFT = (("soft_cross_entropy", 1.0),)
OBJECTIVES = {
    "eagle": Objective(noise=0.0),
    "fspad": Objective(noise=0.0),
    "eagle3": Objective(steps=3, weights=SOFT, step_decay=0.8, noise=0.0),
    "medusa": Objective(steps=DEEPEST, weights=(("cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
    "parallelspec": Objective(steps=DEEPEST, noise=0.0),
    "peagle": Objective(steps=DEEPEST, weights=(("kl", 1.0),), noise=0.0),
    "draft_lm": Objective(weights=(("kl", 1.0),), noise=0.0),
}
"""What each drafter is trained on by its paper."""


@every
def test_a_few_training_steps_lower_the_loss_and_are_compiled_once(head: str, compilations: list[str]):
    module, frozen = target()
    drafter = HEADS[head]
    optimizer = optax.adam(1e-2)
    task = Task(module.clone(taps=drafter.taps), drafter, OBJECTIVES[head])
    step = jax.jit(functools.partial(train_step, task, optimizer))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
    tokens, ones, at = map(jnp.int32, (tokens, np.ones_like(tokens), np.broadcast_to(np.arange(12), (2, 12))))
    rows = Batch(tokens, ones, at, ones)
    params = jax.tree.map(jnp.asarray, random_weights(drafter, 0.2, 3))
    state = init_state(drafter, optimizer, jax.random.key(0), params=params)
    losses = []
    for i in range(8):
        if i == 1:
            compilations.clear()
        state, loss = step(Frozen(frozen), state, rows)
        losses.append(loss)
    assert not compilations
    assert float(losses[-1]) < 0.95 * float(losses[0]) and np.isfinite(losses).all()


def models() -> Models:
    module, params = target()
    return Models(Engine(module), Weights(params), cast(Any, None), CONFIG)


@pytest.mark.parametrize(
    "drafter",
    [
        Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB + 1, taps=(0, 1))),
        Medusa(MedusaConfig(WIDTH, DEEPEST, vocab=VOCAB + 1)),
        DraftLM(DraftLMConfig(VOCAB + 1, 12, 1, 2, 1, 6, 20)),
    ],
    ids=lambda drafter: type(drafter).__name__,
)
def test_an_lm_head_of_another_vocabulary_is_refused(drafter: Any):
    with pytest.raises(ValueError, match=r"^the drafter's own LM head scores 13 tokens, not 12: [^.]*$"):
        models().with_drafter(drafter, None, chain(1))
    with pytest.raises(ValueError, match=r"^the drafter's own LM head scores 13 tokens, not 3: [^.]*$"):
        models().with_drafter(drafter, None, chain(1), [1, 4, 7])


@pytest.mark.parametrize("head", ["medusa", "parallelspec", "peagle"])
@pytest.mark.parametrize(
    "tree",
    [chain(4), DynamicTree(5, 4, 2), BestFirstTree(5, 4, 2), parse_tree("lookup:7+dynamic:5x4x2")],
    ids=lambda tree: tree.spec,
)
def test_a_tree_deeper_than_the_drafter_drafts_is_refused(head: str, tree: Any):
    with pytest.raises(ValueError, match=r"^the tree is 4 deep and the drafter drafts 3 tokens ahead: [^.]*$"):
        models().with_drafter(HEADS[head], None, tree)


def test_drafted_levels_without_a_drafter_are_refused():
    plain = models().plain()
    assert plain.with_prompt_lookup(parse_tree("lookup:3")).engine.tree is not None
    with pytest.raises(ValueError, match=r"^the tree has drafted levels beside its looked-up branch: [^.]*$"):
        plain.with_prompt_lookup(parse_tree("lookup:7+dynamic:5x4x2"))


@pytest.mark.parametrize(
    ("mode", "rule"), [("sample", "specinfer"), ("swor", "recursive-rejection"), ("swor", "traversal")]
)
def test_a_best_first_tree_of_drawn_children_is_refused(mode: DraftMode, rule: str):
    with pytest.raises(
        ValueError, match=rf"^the tree best_first:\w+ is for children drafted by topk, not {mode}: [^.]*$"
    ):
        Engine(target()[0], HEADS["medusa"], TREES["best_first"], mode=mode, rule=RULES[rule])
