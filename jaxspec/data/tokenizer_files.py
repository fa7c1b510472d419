"""The files of a HuggingFace tokenizer folder: vocabulary, added tokens wherever they stand, ids that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxspec.data.sentencepiece_model import build_tokenizer, read_piece_model

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files of a folder that may hold its tokenizer; the first that exists is read."""
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a tokenizer folder needs it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json`, completed by `special_tokens_map.json` in older folders.

    A folder with only a `tokenizer.model` has Llama's special tokens by default.
    """
    config, path = _read_json(folder / "tokenizer_config.json"), folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and path.is_file():
        config |= _read_json(path)
    return config if (folder / TOKENIZERS[0]).is_file() else _LLAMA_TOKENS | config


def read_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Returns a folder's tokenizer, with the added tokens that stand in its other files.

    Raises ValueError naming the file that is missing, unreadable, or of another model.
    """
    path, pieces = (folder / name for name in TOKENIZERS)
    # tokenizer.json is used as it is; transformers 5 rebuilds its rules for spaces for the class LlamaTokenizer.
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    elif pieces.is_file():
        path, tokenizer = pieces, _of_pieces(pieces, config)
    else:
        raise ValueError(f"{path}: no such file, nor a {pieces.name} beside it; a tokenizer folder needs one of them")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, path, config)
    return tokenizer


def _of_pieces(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Returns the SentencePiece tokenizer at `path`, whose rules for spaces are in `config`."""
    model, prefix = read_piece_model(path), config.get("add_prefix_space")
    # As in transformers 5, text after a special token gets a space only with an explicit `"legacy": true`.
    return build_tokenizer(
        model, prefix=model.dummy_prefix if prefix is None else prefix, legacy=bool(config.get("legacy"))
    )


def _add_tokens(tokenizer: Tokenizer, path: Path, config: dict[str, Any]) -> None:
    """Adds the tokens that the files beside `path` list, at their ids; behind them those that are listed without."""
    known = {index: repr(token) for index, token in tokenizer.get_added_tokens_decoder().items()}
    for index, token in sorted(_added_tokens(path.parent, config).items()):
        if known.get(index) != repr(token):
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"{path}: {token.content!r} would get the id {tokenizer.token_to_id(token.content)}, and the added "
                f"tokens beside it say {index}; this file, or their list, is of another model"
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for token in extra.values() if isinstance(extra, dict) else extra:
        tokenizer.add_special_tokens([AddedToken(token_text(token), special=True, normalized=False)])


def begins_with(tokenizer: Tokenizer, folder: Path, config: dict[str, Any], bos_id: int | None) -> bool:
    """Returns whether the tokenizer puts `bos_id` before a raw text, as transformers encodes it."""
    # A tokenizer.json says it itself, and then the config does not count; Llama's SentencePiece files always do.
    if (folder / TOKENIZERS[0]).is_file():
        return bos_id is not None and tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos_id]
    return bos_id is not None and bool(config.get("add_bos_token", True))


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Returns by id the tokens that the config, or `added_tokens.json` in older folders, adds to those of the file."""
    listed, path = config.get("added_tokens_decoder"), folder / "added_tokens.json"
    added = _read_json(path) if listed is None and path.is_file() else {}
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        if listed is None:
            return {int(index): AddedToken(text, normalized=False) for text, index in added.items()}
        return {
            int(index): AddedToken(token["content"], **{name: token[name] for name in fields if name in token})
            for index, token in listed.items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its list of added tokens is not one of tokens with their ids ({error})") from error


def token_text(token: str | dict[str, Any]) -> str:
    """Returns the text of a token as a config names it."""
    return token["content"] if isinstance(token, dict) else token


def token_id(tokenizer: Tokenizer, text: str, lacking: str) -> int:
    """Returns the id of a control token, and makes the tokenizer recognise it in rendered text.

    Raises ValueError with the message `lacking` if the tokenizer does not contain it.
    """
    index = tokenizer.token_to_id(text)
    if index is None:
        raise ValueError(lacking)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return index


def read_stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    """Returns `eos_id` and the further ids that end a text by the folder's `generation_config.json`."""
    path = folder / "generation_config.json"
    listed = _read_json(path).get("eos_token_id") if path.is_file() else None
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in more):
        raise ValueError(f"{path}: eos_token_id={listed!r} must be a token id or a list of them")
    return tuple(sorted({eos_id, *more}))
