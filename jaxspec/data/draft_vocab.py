"""The draft vocabulary: the tokens that a drafter scores, ranked by how often a target's answers use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxspec.data.corpus import Documents

_TOGETHER = 1024  # documents of a corpus that are read together, an even number


class Frequencies(NamedTuple):
    """Counts of each token in assistant turns."""

    times_V: np.ndarray

    def commonest(self, count: int) -> np.ndarray:
        """Returns the `count` ids used most, ascending, or all used ids if they are fewer. The lower id wins a tie."""
        used = int(np.sum(self.times_V > 0))
        ranked = np.argsort(-self.times_V, kind="stable")
        return np.sort(ranked[: min(count, used)]).astype(np.int32)

    def coverage(self, tokens: np.ndarray) -> float:
        """Returns the share of all uses that these tokens make up."""
        return float(self.times_V[tokens].sum() / max(1, self.times_V.sum()))


def count_tokens(corpus: Documents, vocab: int) -> Frequencies:
    """Returns the frequencies of the assistant's tokens in a corpus."""
    return together(count_halves(corpus, vocab))


def together(halves: Sequence[Frequencies]) -> Frequencies:
    """Returns the frequencies of several parts of a corpus as one."""
    return Frequencies(np.sum([half.times_V for half in halves], axis=0))


def count_halves(corpus: Documents, vocab: int) -> tuple[Frequencies, Frequencies]:
    """Returns the frequencies of the assistant's tokens in every other document, and in the others."""
    halves, count = np.zeros((2, vocab), np.int64), len(corpus.lengths)
    for first in range(0, count, _TOGETHER):
        some = corpus.read(range(first, min(first + _TOGETHER, count)))
        for half, times_V in enumerate(halves):
            mine = [tokens[mask] for tokens, mask in some[half::2]]  # _TOGETHER is even
            times_V += np.bincount(np.concatenate([*mine, np.zeros(0, np.int64)]), minlength=vocab)
    return Frequencies(halves[0]), Frequencies(halves[1])


def unseen_coverage(halves: tuple[Frequencies, Frequencies], count: int) -> float | None:
    """Returns the share of uses that the `count` commonest tokens of other documents make up, both halves in turn.

    It says what to expect of answers to come, a little low, for half of the documents choose. None where one half has
    no answer.
    """
    one, other = halves
    if not one.times_V.any() or not other.times_V.any():
        return None
    found = [(of, by.commonest(count)) for of, by in ((one, other), (other, one))]
    uses = sum(int(of.times_V.sum()) for of, _ in found)
    return sum(int(of.times_V[tokens].sum()) for of, tokens in found) / uses


def save_maps(path: str | Path, tokens: np.ndarray, vocab: int) -> None:
    """Writes ascending ids as EAGLE-3 checkpoints hold them: `d2t`, offsets (id minus index), and `t2d`, a mask."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(vocab, bool)
    mask[tokens] = True
    draft = path.with_name(f"{path.name}.draft")
    save_file({"d2t": tokens.astype(np.int64) - np.arange(len(tokens)), "t2d": mask}, str(draft))
    draft.replace(path)


def load_maps(path: str | Path, vocab: int) -> np.ndarray:
    """Returns the ascending ids of a file with `d2t` and `t2d`, for a target of `vocab` tokens.

    Raises ValueError if there is no such file, the maps contradict each other, or they were made for another target.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `jaxspec draft-vocab` makes one")
    try:
        maps = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    missing = [name for name in ("d2t", "t2d") if name not in maps]
    if missing:
        raise ValueError(f"{path}: has no tensor {missing[0]!r}; a draft vocabulary has d2t and t2d")
    tokens, mask = maps["d2t"] + np.arange(len(maps["d2t"])), maps["t2d"].astype(bool)
    if mask.shape != (vocab,):
        raise ValueError(
            f"{path}: t2d is for {mask.size:,} tokens, and the target has {vocab:,}: it is for another target"
        )
    if not np.array_equal(np.flatnonzero(mask), tokens) or not len(tokens):
        raise ValueError(f"{path}: d2t and t2d do not name the same tokens; make the file again")
    return tokens.astype(np.int32)
