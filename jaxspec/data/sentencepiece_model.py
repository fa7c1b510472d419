"""Llama's SentencePiece file, `tokenizer.model`, as a `tokenizers.Tokenizer` with the same tokens as transformers'.

The file is a protocol buffer (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto). The
few fields that are needed are read here, so that no further package has to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in pieces
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of pieces; 1 is a normal one
_BPE = 2  # the kind of model; 1, the default, is Unigram
_CONVERT = (
    "load the folder with transformers' AutoTokenizer and save it with save_pretrained, which writes a tokenizer.json"
)


class PieceModel(NamedTuple):
    """The BPE tokenizer in a `tokenizer.model`."""

    pieces: tuple[str, ...]
    """By id."""
    kinds: tuple[int, ...]
    """By id, as the format numbers them."""
    dummy_prefix: bool
    """Whether text gets a space in front, unless the tokenizer's config says otherwise."""


def read_piece_model(path: str | Path) -> PieceModel:
    """Returns the pieces of the file at `path`.

    Raises ValueError if it is not a SentencePiece model, or one that needs more than Llama's: Unigram, characters
    without byte fallback, or normalization.
    """
    try:
        model = _group(Path(path).read_bytes())
        pieces = [_group(data) for data in model[1]]
        texts = tuple(piece[1][-1].decode() for piece in pieces)
        kinds = tuple(piece.get(3, [1])[-1] for piece in pieces)
        trainer, normalizer = (_group(model.get(number, [b""])[-1]) for number in (2, 3))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole SentencePiece model; if it is of another kind, {_CONVERT}") from error
    lacks = _beyond_llama(trainer, normalizer, kinds)
    if lacks:
        raise ValueError(f"{path}: {lacks}, which is not read here: {_CONVERT}")
    return PieceModel(texts, kinds, bool(normalizer.get(3, [1])[-1]))


def build_tokenizer(model: PieceModel, *, prefix: bool, legacy: bool) -> Tokenizer:
    """Returns the tokenizer of `model`; its control pieces are special tokens.

    Two pieces are merged if they make a piece, the one of the lowest id first. With `prefix` text gets a space in
    front, and with `legacy` so does text after a special token, unless it begins with one.
    """
    mergeable = {
        piece: i
        for i, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in mergeable  # in the order of their ids
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    scheme = ("always" if legacy else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(content=" ", left=1)] if prefix else undo)
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == _CONTROL)
            for piece, kind in zip(model.pieces, model.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _beyond_llama(trainer: dict[int, list], normalizer: dict[int, list], kinds: tuple[int, ...]) -> str | None:
    """Returns a feature of the model that Llama's do not have, as a verb phrase; None if there is none."""
    if trainer.get(3, [1])[-1] != _BPE:
        return "holds a model that is not BPE"
    if kinds.count(_BYTE) != 256:
        return "holds pieces for bytes that are not 256"
    if normalizer.get(2, [b""])[-1]:
        return "normalizes characters"
    if normalizer.get(4, [1])[-1]:
        return "drops spaces"
    if trainer.get(24, [0])[-1] or not normalizer.get(5, [1])[-1]:
        return "marks spaces in another way"
    return None


def _group(data: bytes) -> dict[int, list]:
    """Returns the fields of a message by number: integers, and bytes for texts, messages and fixed-width numbers."""
    found: dict[int, list] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the fields of a message (https://protobuf.dev/programming-guides/encoding).

    Raises ValueError if it is cut off.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind not in (1, 2, 5):
                raise ValueError(f"wire type {kind} is not in use")
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("ends inside a field")
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the varint at `at` and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]  # IndexError if the message is cut off
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")
