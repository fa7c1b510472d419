"""The draft vocabulary: the tokens that a drafter scores, ranked by how often a target's answers use them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxspec.data.corpus import Corpus, Documents

_TOGETHER = 1024  # documents of a corpus on disk that are counted together


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
    if isinstance(corpus, Corpus):
        return Frequencies(np.bincount(corpus.tokens[corpus.assistant_mask], minlength=vocab))
    times_V, count = np.zeros(vocab, np.int64), len(corpus.lengths)
    for first in range(0, count, _TOGETHER):
        some = corpus.read(range(first, min(first + _TOGETHER, count)))
        times_V += np.bincount(np.concatenate([tokens[mask] for tokens, mask in some]), minlength=vocab)
    return Frequencies(times_V)


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
