"""Answers as text: whole whatever the pieces, cut before a stop string wherever it stands."""

import pytest

from jaxspec.data.chat import ChatTokenizer
from jaxspec.interchange.target_folders import target_folder
from jaxspec.serving.answer_text import AnswerText

TEXT = "Naïve café — 12 × 3 = 36; 中文, 🦊! stop here? No: stops here."


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(target_folder("tiny"))


def said(tokenizer: ChatTokenizer, size: int, stops: tuple[str, ...]) -> tuple[str, int, bool]:
    """The text of TEXT's tokens pushed `size` at a time, the tokens used, and whether a stop string ended it."""
    ids, text, used = tokenizer.encode(TEXT).tolist(), AnswerText(tokenizer, stops), 0
    told = ""
    for part in (ids[at : at + size] for at in range(0, len(ids), size)):
        piece = text.push(part, last=used + len(part) == len(ids))
        told, used = told + piece.text, used + piece.used
        assert "\N{REPLACEMENT CHARACTER}" not in piece.text
        if piece.stopped:
            return told, used, True
    return told, used, False


STOPS = [
    (),
    ("stop",),
    ("stops",),
    ("zzz",),
    (".",),
    ("🦊",),
    ("文, 🦊! s", "36; "),
    ("here?", "stop here? No"),
    ("N", TEXT),
    (TEXT[-3:],),
    ("here..",),
]


@pytest.mark.parametrize("stops", STOPS, ids=repr)
def test_a_text_ends_before_its_first_stop_string_whatever_tokens_come_together(tokenizer: ChatTokenizer, stops):
    found = [said(tokenizer, size, stops) for size in (1, 2, 3, 7, 1000)]
    assert len(set(found)) == 1
    text, used, stopped = found[0]
    assert stopped == any(stop in TEXT for stop in stops)
    if not stopped:
        assert text == TEXT and used == len(tokenizer.encode(TEXT))
    else:
        assert TEXT.startswith(text) and any(TEXT[len(text) :].startswith(stop) for stop in stops)
        assert not any(stop in text for stop in stops)
        # The last token that is used completes the stop string.
        before = tokenizer.decode(tokenizer.encode(TEXT)[: used - 1]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert not any(stop in before for stop in stops)


def test_an_end_that_may_begin_a_stop_string_is_held_back_and_told_when_it_does_not(tokenizer: ChatTokenizer):
    text = AnswerText(tokenizer, ("cd!",))
    ids = tokenizer.encode("ab cd e").tolist()
    told = [text.push([token], last=token is ids[-1]) for token in ids]
    assert "".join(piece.text for piece in told) == "ab cd e"
    for at in range(len(ids)):
        so_far = "".join(piece.text for piece in told[: at + 1])
        assert at == len(ids) - 1 or not so_far.endswith(("c", "cd"))


def test_unfinished_utf_8_is_told_at_the_end(tokenizer: ChatTokenizer):
    ids = tokenizer.encode("ok 🦊").tolist()
    whole = AnswerText(tokenizer)
    pieces = [whole.push([token], last=i == len(ids) - 2) for i, token in enumerate(ids[:-1])]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids[:-1])
    assert len(ids) > 3 and all("\N{REPLACEMENT CHARACTER}" not in piece.text for piece in pieces[:-1])
