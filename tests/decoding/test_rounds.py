"""Decoding: speculative text is plain text token for token, rows are independent, and one program does it in place."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import RememberingDrafter, TableDrafter, TableTarget, batch_of, texts_of

from jaxspec.base import KVCache
from jaxspec.decoding.answers import Answer, total_tau
from jaxspec.decoding.generation import (
    NO_LIMIT,
    collect,
    generate,
    generate_plain,
    run_prefill,
    run_rounds,
    sizes,
    start,
    stream,
)
from jaxspec.decoding.requests import Requests
from jaxspec.decoding.rounds import DraftVocab, Engine, Weights, grow
from jaxspec.drafters.eagle import Eagle, EagleConfig
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.nn import cache as kv
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import AdaptiveTree, DynamicTree, chain, parse_paths
from jaxspec.trees.lookup import LookupBranch
from jaxspec.trees.static import StaticTree
from jaxspec.verify import RULES

VOCAB, WIDTH, ROWS, BUDGET = 24, 16, 8, 60

TREES = {
    "none": chain(0, rows=ROWS),
    "chain": chain(3, rows=ROWS),
    "static": StaticTree(parse_paths("0 1 00 01 10 000 001"), rows=ROWS),
    "dynamic": DynamicTree(ROWS, 3, 3),
    "adaptive": AdaptiveTree(DynamicTree(ROWS, 3, 3), (1, 2, 4, ROWS), (1.0, 1.4, 1.7, 1.9), 0.75, 0.1, rate=1.0),
    "lookup": AdaptiveTree(None, (ROWS,), (1.0,), 0.0, 0.0, rate=1.0, lookup=LookupBranch(ROWS - 1)),
    "both": AdaptiveTree(
        DynamicTree(ROWS, 3, 3), (1, 2, 4, ROWS), (1.0, 1.4, 1.7, 1.9), 0.75, 0.1, rate=1.0, lookup=LookupBranch(5)
    ),
    "ragged": AdaptiveTree(DynamicTree(ROWS, 3, 3), (2, 3, ROWS), (1.0, 1.1, 3.0), 0.2, 0.1, rate=1.0, ragged=True),
    "ragged both": AdaptiveTree(
        DynamicTree(ROWS, 3, 3), (3, ROWS), (1.0, 3.0), 0.2, 0.1, rate=1.0, lookup=LookupBranch(5), ragged=True
    ),
}
CONFIG = LlamaConfig(VOCAB, WIDTH, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=24)


class Models(NamedTuple):
    target: Decoder
    eagle: Eagle
    weights: Weights
    table: jax.Array


@functools.cache
def models(dtype: str = "float32") -> Models:
    """A target whose next token is mostly a permutation of the current one, and drafters that mostly know it."""
    target = Decoder(CONFIG, stacked=False, dtype=jnp.dtype(dtype))
    keys = jax.random.split(jax.random.key(5), 6)
    params = target.init_params(keys[0])
    layers = [{n: w if w.ndim == 1 else 9 * w for n, w in layer.items()} for layer in params["layers"]]
    embed = jax.random.normal(keys[1], (VOCAB, WIDTH))
    following = jax.random.permutation(keys[2], VOCAB)
    head = jnp.zeros((VOCAB, WIDTH)).at[following].set(0.35 * embed)
    params = {**params, "layers": layers, "embed": embed, "head": head}

    wrong = jax.random.randint(keys[3], (VOCAB,), 0, VOCAB)
    believed = jnp.where(jnp.arange(VOCAB) % 10 < 7, following, wrong)
    table = jax.random.normal(keys[4], (VOCAB, VOCAB)).at[jnp.arange(VOCAB), believed].add(4.0)

    # The head passes the embedding on: its residual stream is the token, which the shared LM head maps to the next.
    eagle = Eagle(EagleConfig(WIDTH, 4, 2, 6, 24), dtype=jnp.dtype(dtype))
    drafter = dict(eagle.init_params(keys[5]))
    drafter["fc"] = 0.1 * drafter["fc"] + jnp.concatenate([jnp.eye(WIDTH), jnp.zeros((WIDTH, WIDTH))])
    return Models(target, eagle, Weights(params, drafter), table)


def pair(drafter: str, tree: str, dtype: str = "float32") -> tuple[Engine, Weights]:
    m = models(dtype)
    if drafter == "table":
        return Engine(m.target, TableDrafter(), TREES[tree]), m.weights._replace(drafter=m.table)
    if drafter == "lookup":
        return Engine(m.target, PromptLookup(None if tree == "lookup" else m.eagle), TREES[tree]), m.weights
    return Engine(m.target, m.eagle, TREES[tree]), m.weights


def prompts(seed: int = 0, lengths: tuple[int, ...] = (3, 17, 64, 1)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def batches() -> dict[str, Requests]:
    """Four rows each, of one shape: greedy, sampled with and without truncation, and everything mixed with stops."""
    no_stop = [(VOCAB + 1, VOCAB + 2)]
    mixed = {"temperature": [0.0, 0.7, 1.0, 1.5], "top_k": [3, 5, 0, 0], "top_p": [0.5, 1.0, 0.9, 1.0]}
    return {
        "greedy": batch_of(prompts(), max_new_tokens=BUDGET, stop_ids=no_stop * 4),
        "sampled": batch_of(
            prompts(1), max_new_tokens=BUDGET, temperature=[0.3, 0.7, 1.0, 1.5], seed=[1, 2, 3, 3], stop_ids=no_stop * 4
        ),
        "truncated": batch_of(
            prompts(2), max_new_tokens=BUDGET, temperature=[0.3, 0.7, 1.0, 1.5], top_k=[5, 0, 2, 7],
            top_p=[1.0, 0.8, 0.95, 0.9], seed=9, stop_ids=no_stop * 4,
        ),
        "mixed": batch_of(
            prompts(3), max_new_tokens=[BUDGET, 1, 19, 30], **mixed, seed=range(4), stop_ids=[(5, 9), (1,), (), (2,)]
        ),
        "budgets": batch_of(prompts(4), max_new_tokens=[BUDGET, 2, 3, 11], seed=5, stop_ids=no_stop * 4),
        "stops": batch_of(
            prompts(5), max_new_tokens=BUDGET, temperature=[0, 0.5, 0.5, 1], seed=6,
            stop_ids=[(3, 11), (4, 12), (7, 0), (8, 21)],
        ),
    }  # fmt: skip


@functools.cache
def plain(name: str) -> list[Answer]:
    m = models()
    return generate_plain(Engine(m.target), m.weights, batches()[name], rows=ROWS)


def rows_of(requests: Requests, *rows: int) -> Requests:
    """Some rows of a batch."""
    return jax.tree.map(lambda a: a[np.array(rows)], requests)


def assert_same_text(a: list[Answer], b: list[Answer]) -> None:
    for row, (x, y) in enumerate(zip(texts_of(a), texts_of(b), strict=True)):
        assert x == y, row
    assert [answer.finish for answer in a] == [answer.finish for answer in b]


def accepted_of(answers: list[Answer]) -> np.ndarray:
    """Returns `[B, P]` rounds by accept length."""
    return np.stack([answer.accepted for answer in answers])


LOOKED_UP = ("lookup", "both", "ragged both")
PAIRS = [
    *(("table", tree) for tree in TREES if tree not in LOOKED_UP),
    *(("lookup", tree) for tree in LOOKED_UP),
    ("eagle", "chain"),
    ("eagle", "dynamic"),
    ("eagle", "adaptive"),
    ("eagle", "ragged"),
]


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize(("drafter", "tree"), PAIRS)
def test_speculative_text_is_plain_text_token_for_token(drafter: str, tree: str, batch: str):
    """Mixed lengths, budgets, temperatures, truncations, stop ids and seeds; ends in the middle of a path included."""
    engine, weights = pair(drafter, tree)
    text = generate(engine, weights, batches()[batch])
    assert_same_text(text, plain(batch))
    accepted, calls = accepted_of(text), [a.calls for a in text]
    rounds = accepted @ np.arange(1, engine.path + 1)
    cut = 1 + rounds - [len(a.tokens) for a in text]
    assert accepted.sum(1).tolist() == calls
    assert (cut >= 0).all() and (cut <= engine.path - 1).all()
    assert total_tau(text) == sum(len(a.tokens) - 1 for a in text) / sum(calls)
    assert all(a.tau == (len(a.tokens) - 1) / a.calls for a in text if a.calls)
    if tree == "none":
        assert (cut == 0).all() and calls == [len(a.tokens) - 1 for a in text]


@pytest.mark.parametrize("batch", ["greedy", "mixed"])
@pytest.mark.parametrize("tree", ["chain", "dynamic", "adaptive"])
def test_a_draft_vocabulary_drafts_no_other_token_and_leaves_the_text_alone(tree: str, batch: str):
    engine, weights = pair("eagle", tree)
    token_U = jnp.arange(1, VOCAB, 2)
    head_VD = engine.target.shared_tables(weights.target).head_VD
    pruned = weights._replace(vocab=DraftVocab(token_U, head_VD[token_U]))
    text = generate(engine, pruned, batches()[batch])
    assert_same_text(text, plain(batch))
    assert accepted_of(text)[:, 1:].sum() > 0
    state = start(engine, pruned, batches()[batch])
    drafted = jax.jit(grow, static_argnums=0)(engine, pruned, state).token_BN
    assert set(np.asarray(drafted[:, 1:]).ravel().tolist()) <= {0, *token_U.tolist()}  # 0 pads
    np.testing.assert_array_equal(drafted[:, 0], state.root_B)


def test_a_draft_vocabulary_of_all_tokens_is_none():
    engine, weights = pair("eagle", "dynamic")
    whole = weights._replace(vocab=DraftVocab(jnp.arange(VOCAB), engine.target.shared_tables(weights.target).head_VD))
    a, b = (generate(engine, w, batches()["sampled"]) for w in (weights, whole))
    assert_same_text(a, b)
    np.testing.assert_array_equal(accepted_of(a), accepted_of(b))


def test_the_cases_above_do_accept_and_do_end_inside_paths():
    """Otherwise they show nothing."""
    engine, weights = pair("table", "dynamic")
    text = generate(engine, weights, batches()["greedy"])
    assert total_tau(text) > 1.7 and (accepted_of(text).sum(0) > 0).all()
    assert total_tau(generate(*pair("eagle", "chain"), batches()["greedy"])) > 1.7
    for name, why in (("stops", "stop"), ("budgets", "length")):
        text = generate(engine, weights, batches()[name])
        cut = 1 + accepted_of(text) @ np.arange(1, 5) - [len(a.tokens) for a in text]
        assert any(c > 0 and a.finish == why for c, a in zip(cut, text, strict=True)), name
    sampled = generate(engine, weights, batches()["sampled"])
    assert len({a.tokens.tobytes() for a in sampled}) == 4 and total_tau(sampled) > 1.2


def test_an_adaptive_tree_uses_all_its_budgets_and_counts_its_rounds():
    """Otherwise the cases above show little of it."""
    engine, weights = pair("table", "adaptive")
    used, drafted = np.zeros(4, int), np.zeros(3, int)
    for name in ("greedy", "sampled"):
        state = run_rounds(engine, weights, start(engine, weights, batches()[name]), NO_LIMIT)
        policy, calls = state.policy, np.asarray(state.calls_B)
        assert policy is not None
        np.testing.assert_array_equal(np.asarray(policy.budgets_BX).sum(1), calls)
        np.testing.assert_array_equal(np.asarray(policy.levels_BT).sum(1), calls)
        used += np.asarray(policy.budgets_BX).sum(0)
        drafted += np.asarray(policy.levels_BT).sum(0)
    assert (used > 0).sum() >= 3 and (drafted > 0).sum() >= 2, (used, drafted)


def test_one_node_is_plain_decoding_one_token_wide():
    m, requests = models(), rows_of(batches()["sampled"], 1)
    engine = Engine(m.target, TableDrafter(), chain(0))
    one = generate(engine, m.weights._replace(drafter=m.table), requests)
    assert_same_text(one, generate_plain(engine, m.weights, requests))
    assert total_tau(one) == 1


@pytest.mark.parametrize("batch", ["mixed", "truncated"])
def test_a_rows_text_does_not_depend_on_its_neighbours(batch: str):
    engine, weights = pair("table", "dynamic")
    together = generate(engine, weights, batches()[batch])
    for row in range(4):
        alone = generate(engine, weights, rows_of(batches()[batch], row))
        assert_same_text(alone, [together[row]])
    turned = generate(engine, weights, rows_of(batches()[batch], 2, 0, 3, 1))
    assert_same_text(turned, [together[i] for i in (2, 0, 3, 1)])


@pytest.mark.parametrize(
    ("drafter", "tree"),
    [
        ("eagle", "chain"),
        ("eagle", "dynamic"),
        ("eagle", "adaptive"),
    ],
)
def test_finished_rows_stay_as_they_were(drafter: str, tree: str):
    engine, weights = pair(drafter, tree)
    state, before = start(engine, weights, batches()["mixed"]), {}
    for _ in range(60):
        now = jax.device_get(state)
        for row in np.flatnonzero(now.finish_B):
            view = (
                now.output_BO[row, : now.produced_B[row]].tolist(), int(now.produced_B[row]), int(now.length_B[row]),
                int(now.root_B[row]), int(now.calls_B[row]), now.accepted_BP[row].tolist(),
                int(now.draft.length_B[row]), now.draft.hidden_BD[row].tolist(),
            )  # fmt: skip
            assert before.setdefault(row, view) == view
        if len(before) == 4:
            return
        state = run_rounds(engine, weights, state, jnp.int32(1))
    raise AssertionError("some row never finished")


@pytest.mark.parametrize("tree", ["chain", "dynamic", "adaptive"])
def test_every_token_has_the_number_of_the_call_that_gave_it(tree: str):
    engine, weights = pair("eagle", tree)
    for answer in generate(engine, weights, batches()["mixed"]):
        emitted = np.bincount(answer.call_of, minlength=answer.calls + 1)
        assert len(answer.call_of) == len(answer.tokens) and np.all(np.diff(answer.call_of) >= 0)
        assert emitted[0] == 1 and np.all(emitted[1:] >= 1) and len(emitted) == answer.calls + 1
        kept = np.repeat(np.arange(len(answer.accepted)), answer.accepted)
        # All rounds but the last emit what they accepted and one token more; the last may be cut.
        assert 0 <= np.sum(kept + 1) - np.sum(emitted[1:]) < len(answer.accepted)
    assert all(a.call_of.tolist() == list(range(len(a.tokens))) for a in plain("mixed"))


@pytest.mark.parametrize("rounds", [1, 4])
def test_streamed_answers_grow_to_the_whole_text(rounds: int):
    engine, weights = pair("table", "dynamic")
    steps = list(stream(engine, weights, batches()["mixed"], rounds=rounds))
    assert_same_text(steps[-1], plain("mixed"))
    for answers in steps:
        for row, answer in enumerate(answers):
            assert answer.tokens.tolist() == plain("mixed")[row].tokens[: len(answer.tokens)].tolist()
    assert [len(answer.tokens) for answer in steps[0]] == [1] * 4 and len(steps) > 2
    assert steps[0][0].finish == "running"


def test_a_second_batch_of_the_same_shape_compiles_nothing():
    engine, weights = pair("table", "dynamic")
    generate(engine, weights, batches()["greedy"])
    programs = run_rounds._cache_size()  # type: ignore[attr-defined]
    generate(engine, weights, batches()["truncated"])
    generate(engine, weights, batches()["stops"])
    list(stream(engine, weights, batches()["stops"], rounds=3))
    assert run_rounds._cache_size() == programs  # type: ignore[attr-defined]


def test_the_rounds_move_nothing_between_host_and_device():
    engine, weights = pair("table", "dynamic")
    state, limit = start(engine, weights, batches()["mixed"]), jnp.int32(NO_LIMIT)
    with jax.transfer_guard("disallow"):
        state = run_rounds(engine, weights, state, limit)
    assert state.finish_B.all()


def test_requests_survive_their_generation():
    """The state is donated; the caller's arrays are not."""
    engine, weights = pair("table", "dynamic")
    requests = batches()["mixed"]
    assert_same_text(generate(engine, weights, requests), generate(engine, weights, requests))
    assert requests.length_B.tolist() == [3, 17, 64, 1]


def test_a_batch_that_fills_its_cache_to_the_last_slot_is_unharmed():
    """A prompt of the whole bucket, and a budget that leaves exactly one path: late rounds run against the edge."""
    engine, weights = pair("eagle", "chain")
    assert sizes(engine, 128, BUDGET) == (192, 64) and sizes(engine, 128, BUDGET + 1) != (192, 64)
    requests = batch_of(
        prompts(8, (128, 128, 5, 128)), max_new_tokens=[BUDGET, BUDGET - 9, BUDGET, BUDGET], stop_ids=[VOCAB, VOCAB + 1]
    )
    text = generate(engine, weights, requests)
    assert_same_text(text, generate_plain(engine, weights, requests, rows=ROWS))


def test_bf16_text_diverges_only_at_near_ties():
    m = models("bfloat16")
    requests = batch_of(prompts(), max_new_tokens=BUDGET, stop_ids=[(VOCAB + 1, VOCAB + 2)] * 4)
    engine = Engine(m.target, m.eagle, TREES["chain"])
    a, b = generate(engine, m.weights, requests), generate_plain(engine, m.weights, requests)
    for row, prompt in enumerate(prompts()):
        x, y = a[row].tokens, b[row].tokens
        assert len(x) == len(y) == BUDGET and (x < VOCAB).all() and (x >= 0).all()
        differ = np.flatnonzero(x != y)
        if not differ.size:
            continue
        text = np.concatenate([prompt, x[: differ[0]]])
        tokens, positions = jnp.asarray(text)[None], jnp.arange(len(text))[None]
        out = m.target.forward(m.weights.target, tokens, positions, jnp.tril(jnp.ones((1, len(text), len(text)), bool)))
        logits = np.asarray(m.target.logits(m.weights.target, out.features_BLD))[0, -1]
        assert abs(logits[x[differ[0]]] - logits[y[differ[0]]]) < 0.03 * np.abs(logits).max()
    assert total_tau(a) > 1.5


def cache_copies(program: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Lines of compiled HLO that copy a whole cache."""
    lines = re.findall(r"^\s*(?:ROOT )?\S+ = \w+\[([\d,]+)\]\S* copy(?:-start)?\(.*$", program, re.MULTILINE)
    return [line for line in lines if tuple(int(n) for n in line.split(",")) in shapes]


@pytest.mark.usefixtures("compile_afresh", "compile_fully")
@pytest.mark.parametrize("ordered", [True, False])
def test_the_search_for_cache_copies_finds_the_one_of_an_unordered_write(ordered: bool):
    cache = kv.empty(1, 2, 2, 4, 64, jnp.dtype("float32"))

    def round_(_, carry):
        cache, q_BKC, start_B = carry
        seen_BKS = jnp.einsum("BKC,BKCS->BKS", q_BKC, cache.k_YBKCS[0])
        rows = KVCache(q_BKC[None, ..., None], q_BKC[None, :, :, None])
        cache = kv.commit(cache, rows, start_B, jnp.argmax(seen_BKS[:, 0], axis=-1) if ordered else None)
        return cache, q_BKC + seen_BKS[..., :1], start_B + 1

    carry = cache, jnp.ones((2, 2, 4)), jnp.zeros(2, jnp.int32)
    loop = jax.jit(lambda carry: jax.lax.fori_loop(0, 9, round_, carry), donate_argnums=0)
    program = loop.lower(carry).compile().as_text()
    assert program is not None
    assert bool(cache_copies(program, {cache[0].shape})) != ordered


@pytest.mark.usefixtures("compile_afresh", "compile_fully")
@pytest.mark.parametrize(
    ("tree", "batch", "mode", "rule"),
    [
        (None, 1, "topk", "target-draw"), ("dynamic", 4, "topk", "target-draw"), ("both", 2, "topk", "target-draw"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("chain", 9, "topk", "target-draw"), ("dynamic", 2, "swor", "recursive-rejection"),
            ("static", 2, "sample", "traversal"), ("adaptive", 2, "topk", "target-draw"),
        )),
    ],
)  # fmt: skip
def test_the_compiled_rounds_are_one_loop_that_writes_the_caches_in_place(tree: str | None, batch: int, mode, rule):
    """XLA copies a whole cache every round where a write is not ordered behind the reads (see `cache.commit`)."""
    m = models()
    drafter = PromptLookup(m.eagle) if tree in LOOKED_UP else m.eagle
    engine = Engine(m.target, drafter, TREES[tree], mode=mode, rule=RULES[rule]) if tree else Engine(m.target)
    weights = m.weights if tree else Weights(m.weights.target)
    state = start(engine, weights, batch_of(prompts(0, (3,) * batch), max_new_tokens=BUDGET))
    draft = state.draft.head if tree in LOOKED_UP else state.draft
    caches = [state.cache, *([draft.cache] if tree else [])]
    program = run_rounds.lower(engine, weights, state, NO_LIMIT).compile().as_text()
    assert program is not None and "copy(" in program
    assert not cache_copies(program, {a.shape for c in caches for a in c})
    assert program[program.index("\nENTRY") :].count(" while(") == 1
    assert not re.search(r"callback|infeed|outfeed| send\(| recv\(", program)


def test_a_drafter_without_a_tree_is_refused():
    with pytest.raises(ValueError, match="together"):
        Engine(models().target, drafter=TableDrafter())


def remembered(tokens: list[int], prompt: int, table: np.ndarray) -> int:
    """Rounds that a `RememberingDrafter` of two drafts takes to write a text, if it forgets nothing."""
    rounds, at = 0, prompt + 1
    while at < len(tokens):
        draft = table[sum((t + 1) * (slot + 1) for slot, t in enumerate(tokens[:at])) % len(table)].argmax()
        wrong = [token != draft for token in tokens[at : at + 2]]
        rounds, at = rounds + 1, at + 1 + (wrong.index(True) if True in wrong else 2)
    return rounds


def test_every_batch_has_the_slot_more_that_a_drafter_needs_which_reads_the_first_token():
    """Prompts as wide as their padding, in the least cache that is right for a budget and not for one token more."""
    width, budget, vocab, rows = 16, 11, 3, 8
    engine = Engine(TableTarget(), RememberingDrafter(), chain(2))
    rng = np.random.default_rng(0)
    weights = Weights(*rng.standard_normal((2, vocab, vocab)).astype(np.float32))
    drawn = list(rng.integers(0, vocab, (2 * rows, width)))
    budgets = [budget] * rows + [budget + 1] * rows
    requests = batch_of(drawn, max_new_tokens=budgets, temperature=1.0, seed=range(2 * rows))

    # What is held when the last path is read whose drafts matter: a round of one token is to come, then one of two.
    def least(budget: int) -> int:
        return 1 + width + max(budget - 4, 0) + engine.path

    done = collect(run_rounds(engine, weights, run_prefill(engine, weights, requests, least(budget), 64), NO_LIMIT))
    texts = [[*prompt, *answer.tokens] for prompt, answer in zip(drawn, done, strict=True)]
    right = [remembered(t, width, weights.drafter) == answer.calls for t, answer in zip(texts, done, strict=True)]
    assert all(right[:rows]) and not all(right[rows:])
    for longest in range(1, 200):
        capacity, slots = sizes(engine, width, longest)
        assert capacity > least(longest) and slots >= longest + engine.path
