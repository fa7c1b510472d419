"""Instructions quote whole sentences of the texts, and the same seed gives the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxspec.__main__ import main
from jaxspec.data.instructions import WORDINGS, WORDS, split_sentences, take_passage, write_instructions

TEXT = " ".join(f"Sentence number {i} has\nexactly eight words here." for i in range(60))


def test_kinds_take_turns_and_passages_are_whole_sentences_of_bounded_length():
    made = list(write_instructions([TEXT], 30, seed=1))
    assert [c.source for c in made] == list(WORDINGS) * 10
    assert len({c.id for c in made}) == 30
    joined = " ".join(TEXT.split())
    for each in made:
        (turn,) = each.messages
        fitting = [w.partition("{passage}") for w in WORDINGS[each.source]]
        passages = [
            turn["content"][len(a) : len(turn["content"]) - len(b)]
            for a, _, b in fitting
            if turn["content"].startswith(a) and turn["content"].endswith(b)
        ]
        passage = min(passages, key=len)
        assert passage in joined and passage.endswith(".")
        assert WORDS[0] <= len(passage.split()) <= WORDS[1]


def test_the_same_seed_gives_the_same_instructions_and_another_seed_others():
    first, same, other = (list(write_instructions([TEXT], 12, seed=s)) for s in (1, 1, 2))
    assert first == same != other


def test_sentences_are_split_at_their_ends_and_lines_are_joined():
    found = split_sentences('He said "Go!" And\nwent. Why?  Nobody knows')
    assert found == ['He said "Go!"', "And went.", "Why?", "Nobody knows"]


def test_a_passage_stops_at_the_sentence_that_reaches_its_words():
    ten = ["one two three four five six seven eight nine ten."] * 9
    assert len(take_passage(ten, 45).split()) == 50
    assert take_passage(ten[:3], 45) == "" and take_passage(["word " * 200 + "."], 45) == ""


def test_texts_without_a_passage_are_refused():
    with pytest.raises(ValueError, match="no passage of 40 words"):
        list(write_instructions(["Too short."], 3, seed=0))
    with pytest.raises(ValueError, match="no passage of 40 words"):
        list(write_instructions([], 3, seed=0))


def test_the_verb_writes_prompts_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "book.txt").write_text(f"{TEXT}\f{TEXT}")
    out, result = tmp_path / "made.jsonl", tmp_path / "result.json"
    argv = ["instructions", str(tmp_path / "book.txt"), "--out", str(out), "--count", "6", "--json", str(result)]
    assert main(argv) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in lines] == list(WORDINGS) * 2
    assert json.loads(result.read_text())["count"] == 6 and json.loads(result.read_text())["texts"] == 2
    assert main(argv) == 1 and "exists" in capsys.readouterr().err
