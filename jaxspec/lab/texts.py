"""Texts that a target wrote itself: answers to prompts, noted as they are decoded, or those of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import Record, parse_records, read_records
from jaxspec.data.corpus import tokenize_conversations
from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts
from jaxspec.lab.ranks import Text, read_target
from jaxspec.parallel.agreement import say
from jaxspec.sampling import argmax
from jaxspec.serving.loading import Models

LEAST_AGREEMENT = 0.9
"""Share of a greedy text's tokens that are its target's likeliest; rounding moves a near tie now and then."""
PROBED = 4
"""Texts whose tokens are compared with the target's likeliest."""


class Sourced(NamedTuple):
    """Texts, or prompts alone, with the source of each."""

    texts: list[Text]
    sources: list[str]


def read_prompt_file(path: str, tokenizer: ChatTokenizer, limit: int | None) -> tuple[list[np.ndarray], list[str]]:
    """Returns the prompts of a file as tokens, and their sources: those their lines name, or the file's name.

    Raises ValueError naming a prompt that cannot be read.
    """
    prompts = read_prompts(path, limit=limit)
    own = sum(bool(prompt.settings) for prompt in prompts)
    if own:
        say(f"note: {path}: {own} prompts have settings of their own, which are not used: all are answered alike")
    return [_encode(prompt, tokenizer) for prompt in prompts], [p.source or Path(path).stem for p in prompts]


def _encode(prompt: Prompt, tokenizer: ChatTokenizer) -> np.ndarray:
    try:
        return encode_prompt(prompt, tokenizer)
    except ValueError as error:
        raise ValueError(f"{prompt.name} {error}; mend it or take it out") from error


def read_answers(
    path: str, tokenizer: ChatTokenizer, *, temperature: float, longest: int, limit: int | None
) -> Sourced:
    """Returns the answers of a file of conversations that the target wrote at a temperature, each with its prompt.

    Lines that say another temperature, as `jaxspec regenerate` notes it, are left out and counted; those that say none
    are taken. Conversations are cut behind `longest` tokens. Raises ValueError where nothing is left, or the tokenizer
    or template refuses one.
    """
    records = [record for record in read_records(path) if record.text.strip()]
    chosen = [record for record in records if _temperature(record) in (None, temperature)]
    if not chosen:
        others = sorted({t for record in records if (t := _temperature(record)) is not None})
        named = ", ".join(f"{t:g}" for t in others) or "none"
        raise ValueError(
            f"{path}: holds no answer of temperature {temperature:g}, but of {named}: give that as --temperature"
        )
    if len(chosen) < len(records):
        others = len(records) - len(chosen)
        say(f"{path}: {others:,} conversations of another temperature than {temperature:g} left out")
    account = Account()
    corpus = tokenize_conversations(parse_records(chosen[:limit], account), tokenizer, length=longest, account=account)
    for line in account.sentences():
        say(f"{path}: {line}")
    found = Sourced([], [])
    for row in range(len(corpus.ids)):
        at = slice(corpus.offsets[row], corpus.offsets[row + 1])
        texts = split_answers(corpus.tokens[at], corpus.assistant_mask[at])
        found.texts.extend(texts)
        found.sources.extend([corpus.sources[corpus.source[row]]] * len(texts))
    if not any(text.starts for text in found.texts):
        raise ValueError(f"{path}: holds no answer of two tokens or more: give conversations that the target answered")
    return found


def _temperature(record: Record) -> float | None:
    """Returns the temperature that a conversation says it was written at; None where it says none."""
    try:
        line = json.loads(record.text)
    except ValueError:
        return None  # told when it is parsed
    return line.get("temperature") if isinstance(line, dict) else None


def split_answers(tokens_L: np.ndarray, assistant_L: np.ndarray) -> list[Text]:
    """Returns each run of the assistant's tokens as an answer, with all that stands before it as its prompt."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], assistant_L, [False]]).astype(int)))
    return [Text(tokens_L[:begin], tokens_L[begin:end]) for begin, end in edges.reshape(-1, 2) if begin]


def check_greedy(models: Models, texts: Sequence[Text], path: str) -> None:
    """Raises ValueError where a text is hardly the target's at temperature 0; the first few are compared."""
    plain, some = models.plain(), [text for text in texts if text.starts][:PROBED]
    features_BLD = read_target(plain, some)
    for row, text in enumerate(some):
        behind = features_BLD[row : row + 1, len(text.prompt) - 1 : text.length - 1]
        likely = np.asarray(argmax(plain.engine.target.logits(plain.weights.target, behind)))[0]
        share = float(np.mean(likely == text.answer))
        if share < LEAST_AGREEMENT:
            raise ValueError(
                f"{path}: {share:.0%} of the tokens of an answer are what the target writes at temperature 0: give the "
                "target that wrote them, or the temperature that they were written at"
            )


def digest_of(texts: Sequence[Text]) -> str:
    """Returns a digest of some texts' tokens."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.array([len(text.prompt), len(text.answer)], np.int64).tobytes())
        digest.update(np.concatenate([text.prompt, text.answer]).astype(np.int32).tobytes())
    return digest.hexdigest()[:16]
