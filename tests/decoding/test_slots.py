"""Mixed rows: each as if it were alone, whoever is beside it and whoever was in its place before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from test_rounds import VOCAB, assert_same_text, models, pair
from toys import batch_of

from jaxspec.base import DraftMode
from jaxspec.decoding import rounds
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Request, Settings, bucket, make_requests
from jaxspec.decoding.rounds import CHUNK, Engine, Weights
from jaxspec.decoding.slots import Slots
from jaxspec.trees import DynamicTree, StaticTree, chain, parse_paths
from jaxspec.verify import RULES

BUDGET = 24


def engine_of(mode: DraftMode, rule: str, tree: Any) -> tuple[Engine, Weights]:
    m = models()
    return Engine(m.target, m.eagle, tree, mode=mode, rule=RULES[rule]), m.weights


ENGINES = {
    "target-draw": engine_of("topk", "target-draw", DynamicTree(8, 3, 3)),
    "recursive-rejection": engine_of("swor", "recursive-rejection", DynamicTree(8, 3, 3)),
    "traversal": engine_of("swor", "traversal", StaticTree(parse_paths("0 1 00 01 10 000"))),
    "block": engine_of("sample", "block", chain(4)),
    "adaptive": pair("lookup", "both"),
}


def random_rows(rng: np.random.Generator, count: int, longest: int = 30) -> list[Request]:
    """As many requests, greedy ones among them."""
    return [
        Request(
            rng.integers(0, VOCAB, rng.integers(1, longest + 1)),
            Settings(
                max_new_tokens=int(rng.integers(1, BUDGET + 1)),
                temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 1.5])),
                draft_temperature=float(rng.choice([0.0, 0.5, 1.0])),
                top_k=int(rng.choice([0, 0, 3, 8])),
                top_p=float(rng.choice([1.0, 1.0, 0.9, 0.6])),
                seed=int(rng.integers(2**32)),
                stop_ids=tuple(rng.integers(0, VOCAB, 2).tolist()) if rng.random() < 0.5 else (VOCAB, VOCAB + 1),
            ),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("rule", ENGINES)
def test_a_row_among_eight_mixed_ones_writes_what_it_writes_alone(rule: str):
    """Five mixes a rule; one row of each is decoded alone, and all of them in another order."""
    engine, weights = ENGINES[rule]
    rng = np.random.default_rng(len(rule))
    for _ in range(5):
        rows = random_rows(rng, 8)
        together = generate(engine, weights, make_requests(rows, width=32))
        chosen = int(rng.integers(8))
        alone = generate(engine, weights, make_requests([rows[chosen]], width=32))
        assert_same_text(alone, [together[chosen]])
        order = rng.permutation(8)
        turned = generate(engine, weights, make_requests([rows[i] for i in order], width=32))
        assert_same_text(turned, [together[i] for i in order])


def serve(slots: Slots, rows: Sequence[Request]) -> dict[int, Answer]:
    """Every request's answer, each taken in as soon as there is a place."""
    waiting, held, done = list(range(len(rows)))[::-1], {}, {}
    while waiting or held:
        while waiting and slots.free:
            place, row = slots.free[0], waiting.pop()
            slots.admit(rows[row], place)
            held[place] = row
        done |= {held.pop(place): answer for place, answer in slots.run().items()}
    return done


@pytest.mark.parametrize("rule", ["target-draw", "traversal", "adaptive"])
def test_rows_that_take_the_place_of_others_write_what_they_write_alone(rule: str):
    engine, weights = ENGINES[rule]
    rows = random_rows(np.random.default_rng(1), 20)
    slots = Slots(engine, weights, 4, longest=30, max_new_tokens=BUDGET, stops=2)
    done = serve(slots, rows)
    assert sorted(slots.free) == [0, 1, 2, 3] and slots.run() == {}
    for i, row in enumerate(rows):
        assert_same_text([done[i]], generate(engine, weights, make_requests([row])))


def test_plain_decoding_is_served_in_slots_too():
    engine = Engine(models().target)
    rows = random_rows(np.random.default_rng(2), 9)
    weights = Weights(models().weights.target)
    done = serve(Slots(engine, weights, 2, longest=30, max_new_tokens=BUDGET, stops=2), rows)
    for i, row in enumerate(rows):
        assert_same_text([done[i]], generate(engine, weights, make_requests([row])))


def test_prompts_of_random_lengths_compile_nothing_once_every_width_has_been_seen(compilations):
    engine, weights = pair("eagle", "chain")
    rng = np.random.default_rng(3)
    longest = 2 * CHUNK
    slots = Slots(engine, weights, 8, longest=longest, max_new_tokens=BUDGET, stops=2)
    widths = sorted({bucket(n) for n in range(1, CHUNK + 1)} | {CHUNK + 1})
    rows = random_rows(rng, len(widths))
    warm = [row._replace(tokens=np.ones(n, int)) for row, n in zip(rows, widths, strict=True)]
    serve(slots, warm)
    rows = [
        row._replace(tokens=rng.integers(0, VOCAB, int(np.exp(rng.uniform(0, np.log(longest))))))
        for row in random_rows(rng, 60)
    ]
    compilations.clear()
    assert len(serve(slots, rows)) == 60 and not compilations
    jax.jit(lambda x: x + 41)(1.0)
    assert compilations, "the count of compilations counts nothing"


@pytest.mark.parametrize(("drafter", "longest"), [("eagle", 64), ("eagle", 57), ("table", 64), ("table", 34)])
def test_prompts_read_in_chunks_are_read_as_a_whole(drafter: str, longest: int, monkeypatch: pytest.MonkeyPatch):
    """Prompts that end within a chunk, with it, just behind it, in the first, and in narrow ones behind the wide."""
    engine, weights = pair(drafter, "chain")
    rng, lengths = np.random.default_rng(5), (longest, 33, 32, 17, 5)
    prompts = [rng.integers(0, VOCAB, n) for n in lengths]
    requests = batch_of(prompts, max_new_tokens=4, temperature=[0, 0.5, 1, 0, 0.7], seed=range(5))

    def read(chunk: int) -> Any:
        monkeypatch.setattr("jaxspec.decoding.rounds.CHUNK", chunk)
        return jax.device_get(jax.jit(lambda w, r: rounds.prefill(engine, w, r, 80, 16))(weights, requests))

    whole, pieces = read(64), read(16)
    for name in ("length_B", "root_B", "output_BO", "produced_B", "finish_B"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))
    np.testing.assert_allclose(whole.root_logits_BV, pieces.root_logits_BV, atol=2e-5)
    for b, n in enumerate(lengths):
        for one, other in zip(jax.tree.leaves(whole.cache), jax.tree.leaves(pieces.cache), strict=True):
            slots = one.shape.index(80)
            one, other = (np.take(x[:, b], np.arange(n), axis=slots - 1) for x in (one, other))
            np.testing.assert_allclose(one, other, atol=2e-5)
    if drafter == "eagle":
        np.testing.assert_allclose(whole.draft.hidden_BD, pieces.draft.hidden_BD, atol=2e-5)
    with pytest.raises(ValueError, match=r"padded to .. tokens, which is not a multiple of 9"):
        read(36)


def test_a_slot_refuses_what_does_not_fit_it():
    engine, weights = pair("eagle", "chain")
    slots = Slots(engine, weights, 1, longest=20, max_new_tokens=4, stops=1)
    with pytest.raises(ValueError, match="2 stop ids do not fit slots made for 1"):
        slots.admit(Request([1], Settings(4, stop_ids=(2, 3))), 0)
    for length, new in ((21, 4), (20, 5)):
        with pytest.raises(
            ValueError, match=f"{length} tokens of prompt and {new} new ones do not fit slots made for 20"
        ):
            slots.admit(Request(np.ones(length, int), Settings(new)), 0)
    assert slots.free == [0]
