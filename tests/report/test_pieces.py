"""Answers in pieces: the origin of every token, whole characters, byte fallback, and tokenizers that do not fit."""

import dataclasses
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_toys import answer_rows, some_tokens, tiny_tokenizer
from tokenizer_toys import piece_model, train_pieces, write_piece_folder

from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer
from jaxspec.evaluation.rows import Row
from jaxspec.report.pieces import (
    BONUS,
    DRAFTED,
    PREFILL,
    TokenOrigin,
    choose_answers,
    load_tokenizer,
    origins,
    pieces_of,
    rejected_texts,
)


def row_of(tokens: list[int], emitted: list[int], accepted: list[int]) -> Row:
    return Row(id="q", task="x", tokens=tuple(tokens), emitted=tuple(emitted), accepted=tuple(accepted))


def cut_in_rounds(tokens: list[int], seed: int) -> Row:
    """A row of these tokens in rounds of one to four, the last cut."""
    rng, emitted, left = random.Random(seed), [], len(tokens) - 1
    while left:
        emitted.append(min(rng.randint(1, 4), left))
        left -= emitted[-1]
    return row_of(tokens, emitted, [e - 1 for e in emitted[:-1]] + emitted[-1:])


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A SentencePiece tokenizer whose rare letters are bytes."""
    folder = write_piece_folder(tmp_path_factory.mktemp("pieces"), piece_model(train_pieces(120)))
    return ChatTokenizer.load(folder, NO_TEMPLATE)


def test_every_token_comes_from_prefill_a_depth_or_a_bonus():
    found = origins(row_of([5] * 8, [3, 1, 2, 1], [2, 0, 1, 3]))
    assert found == [
        TokenOrigin(0, PREFILL, 0),
        TokenOrigin(1, DRAFTED, 1),
        TokenOrigin(1, DRAFTED, 2),
        TokenOrigin(1, BONUS, 0),
        TokenOrigin(2, BONUS, 0),
        TokenOrigin(3, DRAFTED, 1),
        TokenOrigin(3, BONUS, 0),
        TokenOrigin(4, DRAFTED, 1),  # three were accepted, and the budget kept one
    ]
    assert origins(row_of([5], [], [])) == [TokenOrigin(0, PREFILL, 0)] and origins(row_of([], [], [])) == []


def test_a_piece_tells_its_round_and_depth():
    row = cut_in_rounds(some_tokens()[:40], 1)
    told = [piece.told for piece in pieces_of(row, tiny_tokenizer()) if len(piece.tokens) == 1]
    assert told[0] == "prefill token" and "round 1, drafted depth 1" in told and "round 2, bonus token" in told


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=40), st.integers(0, 99))
def test_pieces_are_the_whole_text_and_no_character_is_torn(text: str, seed: int):
    tokenizer = tiny_tokenizer()
    tokens = [int(i) for i in tokenizer.encode(text)]
    if not tokens:
        return
    found = pieces_of(cut_in_rounds(tokens, seed), tokenizer)
    assert "".join(piece.text for piece in found) == tokenizer.decode(tokens, skip_special=False)
    assert sum(len(piece.tokens) for piece in found) == len(tokens)


def test_bytes_of_a_character_are_one_piece_of_the_round_that_completes_it(byte_fallback: ChatTokenizer):
    tokens = [int(i) for i in byte_fallback.encode("on 鬱 mat 🦉 it")]
    spoken = [str(byte_fallback.tokenizer.id_to_token(i)) for i in tokens]
    assert sum(piece.startswith("<0x") for piece in spoken) == 7
    # Every round gives one token, so that every byte is of another round.
    row = row_of(tokens, [1] * (len(tokens) - 1), [0] * (len(tokens) - 1))
    found = pieces_of(row, byte_fallback)
    assert "".join(piece.text for piece in found) == "on 鬱 mat 🦉 it"
    owl = next(piece for piece in found if "🦉" in piece.text)
    at = spoken.index("<0xF0>")
    assert len(owl.tokens) == 4 and owl.last.round == at + 3
    assert owl.told.startswith("4 tokens") and f"round {at}, bonus token" in owl.told


def test_an_unfinished_character_is_shown_at_the_end(byte_fallback: ChatTokenizer):
    tokens = [int(i) for i in byte_fallback.encode("on 🦉")][:-1]
    found = pieces_of(cut_in_rounds(tokens, 0), byte_fallback)
    assert "\ufffd" in found[-1].text and sum(len(piece.tokens) for piece in found) == len(tokens)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(0, 99))
def test_no_sequence_of_ids_loses_a_token(tokens: list[int], seed: int):
    found = pieces_of(cut_in_rounds(tokens, seed), tiny_tokenizer())
    assert sum(len(piece.tokens) for piece in found) == len(tokens)


def test_ids_of_another_tokenizer_and_rounds_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="q: token 999999 is none of the tokenizer's"):
        pieces_of(row_of([1, 999999], [1], [0]), tiny_tokenizer())
    with pytest.raises(ValueError, match="its rounds give 3 tokens, and it has 2"):
        pieces_of(row_of([1, 2], [2], [1]), tiny_tokenizer())


def test_the_tokenizer_is_the_one_that_the_rows_were_made_with(tmp_path: Path):
    known = tiny_tokenizer().fingerprint
    assert load_tokenizer({"target": "tiny", **known}, None).fingerprint == known
    assert load_tokenizer({"target": "gone", **known}, "tiny").fingerprint == known
    with pytest.raises(ValueError, match="gone: no such folder"):
        load_tokenizer({"target": str(tmp_path / "gone"), **known}, None)
    with pytest.raises(ValueError, match="is not the one of the run's target"):
        load_tokenizer({"target": "tiny", **known, "tokenizer": "other"}, None)


def test_a_question_of_each_task_is_chosen_or_those_that_are_named():
    chances = {"plain": 0.0, "chain:3": 0.5, "wide": 0.5}
    rows = [answer_rows(f"q{i}", f"t{i % 6}", chances)[1] for i in range(12)]
    second = dataclasses.replace(rows[7], turn=1)
    assert [row.id for row in choose_answers([second, *rows], [])] == ["q0", "q1", "q2", "q3"]
    assert [row.id for row in choose_answers([second, *rows], ["q9", "t1/q7"])] == ["q9", "q7"]
    assert choose_answers([second, *rows], ["q7"])[0].turn == 0 and choose_answers([], []) == []
    with pytest.raises(ValueError, match="--text q99: no answer of this question"):
        choose_answers(rows, ["q99"])


def test_rejected_drafts_are_texts_of_their_rounds_and_their_answers_are_chosen():
    row = row_of(some_tokens()[:4], [1, 2], [0, 1])
    assert rejected_texts(row, tiny_tokenizer()) == {}
    word = [int(i) for i in tiny_tokenizer().encode("naïve")]
    kept = dataclasses.replace(row, rejected=((), tuple(word)))
    assert rejected_texts(kept, tiny_tokenizer()) == {2: tiny_tokenizer().decode(word)}
    assert choose_answers([row, kept], ()) == [kept] and choose_answers([row], ()) == [row]
