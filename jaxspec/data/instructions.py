"""Instructions made from plain text: continue, summarize or rewrite a passage, for the target to answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from jaxspec.data.messages import Conversation

WORDINGS: dict[str, tuple[str, ...]] = {
    "continue": (
        "Continue this text:\n\n{passage}",
        "Write the next paragraph of this story.\n\n{passage}",
        "{passage}\n\nWhat comes next? Go on in the same style.",
    ),
    "summarize": (
        "Summarize the following passage in a few sentences.\n\n{passage}",
        "{passage}\n\nSum up the text above.",
        "What are the main points of this text?\n\n{passage}",
    ),
    "rewrite": (
        "Rewrite this passage in plain modern English:\n\n{passage}",
        "Explain the following text to a child.\n\n{passage}",
        "Turn this passage into a short dialogue.\n\n{passage}",
    ),
}
"""Kind of instruction -> the ways in which it is put."""
WORDS = (40, 160)
"""Fewest and most words of a passage."""
_SENTENCE_ENDS = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]”’]))\s+")


def write_instructions(texts: Sequence[str], count: int, *, seed: int) -> Iterator[Conversation]:
    """Yields `count` conversations of one user turn, each about a passage of whole sentences from one of `texts`.

    Kinds take turns; text, passage, its length and the wording are drawn. Texts are drawn in proportion to their
    length. The same seed gives the same instructions. Raises ValueError where no text has a passage of 40 words.
    """
    sentences = [split_sentences(text) for text in texts]
    starts = [(text, at) for text, found in enumerate(sentences) for at in range(len(found))]
    rng = np.random.default_rng(seed)
    kinds, misses = list(WORDINGS), 0
    made = 0
    while made < count:
        passage = ""
        if starts:
            text, at = starts[rng.integers(len(starts))]
            passage = take_passage(sentences[text][at:], int(rng.integers(*WORDS)))
        if not passage:
            misses += 1
            if misses > 1000 * (made + 1):
                raise ValueError(f"the texts hold no passage of {WORDS[0]} words in whole sentences: give longer texts")
            continue
        kind = kinds[made % len(kinds)]
        wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
        turn = {"role": "user", "content": wording.format(passage=passage)}
        yield Conversation(f"{kind}-{made}", kind, (turn,))
        made += 1


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text in order, each on one line."""
    # Books break lines within sentences.
    return [sentence for each in _SENTENCE_ENDS.split(text) if (sentence := " ".join(each.split()))]


def take_passage(sentences: Sequence[str], words: int) -> str:
    """Returns the first sentences with together at least `words` words; empty where they are too few or too long."""
    taken: list[str] = []
    total = 0
    for sentence in sentences:
        taken.append(sentence)
        total += len(sentence.split())
        if total >= words:
            break
    return " ".join(taken) if WORDS[0] <= total <= WORDS[1] else ""
