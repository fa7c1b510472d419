"""Tokenizers of GGUF files, rebuilt as `tokenizer.json`: byte-level BPE with the pre-tokenizer that the file names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jaxspec.interchange.tensors import write_atomically

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Values of `tokenizer.ggml.token_type` that matter here."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of the ids that end an answer."""

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_first() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> Any:
    pattern = Regex(f"{LETTERS}|{digits}|{REST}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "olmo": _gpt2,
    "smollm": _digits_first,
    "starcoder": _digits_first,
    "refact": _digits_first,
    "command-r": _digits_first,
    "qwen2": lambda: _split(r"\p{N}"),
    "stablelm2": lambda: _split(r"\p{N}"),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
}
"""Splitters by `tokenizer.ggml.pre`, as llama.cpp's `llama-vocab.cpp` splits for that name."""
NORMALIZED = ("qwen2",)
"""Those whose models compose characters (NFC) first."""
WHOLE_WORDS = ("llama-bpe",)
"""Those that take a word that is a token as that token, whatever its merges."""


def write_tokenizer(folder: Path, source: Path, fields: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template of a GGUF file's metadata into a folder.

    Returns the special ids as `generation_config.json` names them. Raises ValueError, in one sentence, for tokenizers
    that are not byte-level BPE, or split text in a way that is not known.
    """
    tokens = _strings(source, fields, "tokens")
    if len(tokens) != vocab:
        raise ValueError(f"{source}: lists {len(tokens):,} tokens and embeds {vocab:,}: download it again")
    tokenizer = build_tokenizer(source, fields)
    write_atomically(folder / "tokenizer.json", [tokenizer.to_str(pretty=True).encode()])
    ids = {name: _special_id(source, fields, f"{name}_id", vocab) for name in ("bos_token", "eos_token")}
    ids["unk_token"] = _special_id(source, fields, "unknown_token_id", vocab)
    ids["pad_token"] = _special_id(source, fields, "padding_token_id", vocab)
    if ids["eos_token"] is None:
        raise ValueError(f"{source}: has no key tokenizer.ggml.eos_token_id, so no answer would end")
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    write_atomically(folder / "tokenizer_config.json", [json.dumps(about, indent=2).encode() + b"\n"])
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{source}: tokenizer.chat_template={template!r} is not a text: download it again")
    if template:
        write_atomically(folder / "chat_template.jinja", [template.encode()])
    ends = dict.fromkeys(_special_id(source, fields, key, vocab) for key in ENDS)
    found = {
        "bos_token_id": ids["bos_token"],
        "eos_token_id": [index for index in ends if index is not None],
        "pad_token_id": ids["pad_token"],
    }
    return {name: value for name, value in found.items() if value is not None}


def build_tokenizer(source: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer that a GGUF file's metadata describes; raises ValueError as `write_tokenizer`."""
    model, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model != "gpt2":
        raise ValueError(
            f"{source}: tokenizer.ggml.model={model!r} is not rebuilt from GGUF, only 'gpt2' (byte-level BPE) is: "
            "import the HuggingFace folder of this model instead"
        )
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"{source}: tokenizer.ggml.pre={pre!r} does not say in a known way how text is split; known: {known}; "
            "import the HuggingFace folder of this model instead"
        )
    tokens, merges = _strings(source, fields, "tokens"), _strings(source, fields, "merges")
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError(f"{source}: lists a token twice: download it again")
    kinds = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{source}: tokenizer.ggml.token_type does not list a type of each token: download it again")
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(
            BPE(ids, pairs, fuse_unk=False, byte_fallback=False, ignore_merges=pre in WHOLE_WORDS)  # type: ignore[arg-type]
        )
    except Exception as error:
        raise ValueError(
            f"{source}: tokenizer.ggml.merges does not fit its tokens ({str(error)!r}): download again"
        ) from error
    if pre in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add(
            [
                AddedToken(t, special=kind == CONTROL, normalized=False)
                for t, k in zip(tokens, kinds, strict=True)
                if k == kind
            ]
        )
    first = _special_id(source, fields, "bos_token_id", len(tokens))
    # llama.cpp puts the first token before raw text by default for this one splitter.
    if first is not None and fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        token = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, first)])
    return tokenizer


def _strings(source: Path, fields: Mapping[str, Any], name: str) -> list[str]:
    found = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{source}: has no list tokenizer.ggml.{name}, so its tokenizer cannot be rebuilt")
    return found


def _special_id(source: Path, fields: Mapping[str, Any], name: str, vocab: int) -> int | None:
    """Returns a special token's id; None where the file names none."""
    found = fields.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    if not isinstance(found, int) or not 0 <= found < vocab:
        raise ValueError(f"{source}: tokenizer.ggml.{name}={found!r} is not the id of one of its {vocab:,} tokens")
    return found
