"""Chat tokenizers: a HuggingFace tokenizer with its chat template, prompts, and streamed decoding."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxspec.data.chat_template import ChatTemplate
from jaxspec.data.messages import Message
from jaxspec.data.templates import BARE, TEMPLATES
from jaxspec.data.tokenizer_files import (
    begins_with,
    read_config,
    read_stop_ids,
    read_tokenizer,
    token_id,
    token_text,
)

NO_TEMPLATE = "none"
"""Name that stands for no template: a conversation is one user turn as raw text, and its answer."""
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_PROBE = "The 3 quick foxes' d\u00e9j\u00e0 vu:\n\tx  = 1234.5;\u4e2d\u6587 \U0001f98a"  # split in many ways
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the decoding of an unfinished UTF-8 sequence


class TemplateChoice(NamedTuple):
    """A chat template as a user chooses it."""

    name: str | None = None
    """One of `TEMPLATES`, a file of Jinja, or NO_TEMPLATE; None: the folder's own."""
    variables: tuple[tuple[str, Any], ...] = ()
    """Values of the template's own variables."""
    date: str | None = None
    """The day that it is told, `YYYY-MM-DD`; None: today."""


class EncodedConversation(NamedTuple):
    """A row of a conversation as tokens."""

    tokens: np.ndarray
    """int32 `[L]`."""
    assistant_mask: np.ndarray
    """bool `[L]`, True on every token the assistant emits, its stop token included."""


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer, its chat template and its special ids."""

    tokenizer: Tokenizer
    template: ChatTemplate
    """The bare one, which shows a single user turn as it stands, where there is no template."""
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    """Ids that end an answer; `eos_id` is one of them."""
    special_tokens: tuple[tuple[str, str], ...]
    """Names a template may use, such as ("bos_token", "<s>")."""
    adds_bos: bool = False
    """Whether `bos_id` stands before a raw text."""
    name: str = ""
    """Where it was read from, for messages."""

    @classmethod
    def load(cls, folder: str | Path, template: str | TemplateChoice | None = None) -> ChatTokenizer:
        """Returns the tokenizer of a HuggingFace folder, with the chat template that `template` names or chooses.

        The tokenizer is `tokenizer.json` or, if there is none, SentencePiece's `tokenizer.model`, with
        `tokenizer_config.json`; further stop ids come from `generation_config.json`. If `template` is None, the
        template is the folder's own (`chat_template.jinja`, or the config's `chat_template`); otherwise it is one of
        `TEMPLATES`, a file of Jinja, or NO_TEMPLATE. Raises ValueError naming the file or field that is missing or
        wrong.
        """
        folder = Path(folder)
        choice = template if isinstance(template, TemplateChoice) else TemplateChoice(template)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give that of a HuggingFace model or tokenizer")
        config_path, config = folder / "tokenizer_config.json", read_config(folder)
        tokenizer = read_tokenizer(folder, config)
        names = {name: token_text(config[name]) for name in _NAMED_TOKENS if config.get(name)}
        lacking = "{}: field `{}` is {!r}, which the tokenizer does not contain"
        ids = {n: token_id(tokenizer, text, lacking.format(config_path, n, text)) for n, text in names.items()}
        if "eos_token" not in ids:
            raise ValueError(f"{config_path}: field `eos_token` is missing")
        eos_id, bos_id = ids["eos_token"], ids.get("bos_token")
        text, place, ending = _choose_template(folder, config, tokenizer, choice.name)
        try:
            rendered = ChatTemplate(text, tuple(names.items()), choice.variables, choice.date)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return cls(
            tokenizer=tokenizer,
            template=rendered,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=ids.get("pad_token", eos_id),
            stop_ids=tuple(sorted({*read_stop_ids(folder, eos_id), *ending})),
            special_tokens=tuple(names.items()),
            adds_bos=begins_with(tokenizer, folder, config, bos_id),
            name=str(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def check_ids(self, rows: int) -> None:
        """Raises ValueError if an id has no row in an embedding of `rows`."""
        worst = max(self.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if worst[1] >= rows:
            raise ValueError(
                f"{self.name}: its token {worst[0]!r} has the id {worst[1]:,}, and the target's embedding has "
                f"{rows:,} rows: the tokenizer is of another model, or the token was added without a row for it"
            )

    @property
    def is_bare(self) -> bool:
        """Returns whether there is no chat template."""
        return self.template.text == BARE

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Short hashes of the `tokenizer` and of the `template`, which decide the tokens of a conversation."""
        vocab = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
        known = json.dumps([vocab, self.special_tokens, self.encode(_PROBE).tolist()])
        text = NO_TEMPLATE if self.is_bare else self.template.text
        # Left out where there are none, so that folders of versions without variables stay what they are.
        if self.template.variables:
            text += json.dumps(self.template.variables)
        if self.template.dated:
            text += str(self.template.date)
        return {"tokenizer": _digest(known), "template": _digest(text)}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any) -> str:
        """Returns the conversation as text with special tokens; `options` are `ChatTemplate.render`'s.

        Raises ValueError if the template refuses it.
        """
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, **options)

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [L]: the ids of `text`. Special tokens in the text are recognised, and none is added."""
        # Control tokens in a user's text count as such: transformers tokenizes the rendered text as a whole, too.
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_raw(self, text: str) -> np.ndarray:
        """Returns int32 [L]: the ids of a raw text, behind `bos_id` where the tokenizer puts it there."""
        begin = [self.bos_id] if self.adds_bos else []
        return np.concatenate([np.asarray(begin, np.int32), self.encode(text)])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_text(self, text: str) -> EncodedConversation:
        """Returns a plain text as a model is pretrained on it: raw, and `eos_id` behind it."""
        tokens = np.append(self.encode_raw(text), np.int32(self.eos_id))
        return EncodedConversation(tokens, np.zeros(len(tokens), bool))

    def encode_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns int32 [L]: the conversation followed by the generation prompt, which the model answers."""
        text = self.render(messages, add_generation_prompt=True, tools=tools, variables=variables)
        return self.encode_raw(text) if self.is_bare else self.encode(text)


class IncrementalDecoder:
    """Decodes ids as they arrive. The pieces together are the text, and none ends inside a UTF-8 sequence."""

    def __init__(self, tokenizer: ChatTokenizer, *, skip_special: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._ids: list[int] = []  # the last emitted piece, kept as context, and the ids not yet emitted
        self._emitted = 0  # how many of `_ids` are already emitted

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete, which may be empty."""
        self._ids.extend(int(i) for i in ids)
        text = self._pending()
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        """Returns the rest of the text; an unfinished sequence becomes the replacement character."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._emitted])) :]

    def _emit(self, text: str) -> str:
        if text:
            self._ids = self._ids[self._emitted :]
            self._emitted = len(self._ids)
        return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _choose_template(
    folder: Path, config: dict[str, Any], tokenizer: Tokenizer, name: str | None
) -> tuple[str, Path, tuple[int, ...]]:
    """Returns the template that `name` stands for (see `ChatTokenizer.load`), its place, and ids that end answers."""
    if name == NO_TEMPLATE:
        return BARE, folder, ()
    if name in TEMPLATES:
        lacking = "{}: has no token {}, which the template {} needs; choose another"
        ids = [token_id(tokenizer, t, lacking.format(folder, t, name)) for t in TEMPLATES[name].tokens]
        return TEMPLATES[name].text, folder, tuple(ids[-1:])
    place = folder if name is None else Path(name)
    return (_own_template(folder, config) if name is None else _template_file(place)), place, ()


def _own_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{folder}: has no chat template; name one with --template (data.template in a config): "
            f"{', '.join(TEMPLATES)}, a file of Jinja, or {NO_TEMPLATE} for a base model"
        )
    return template


def _template_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"template {str(path)!r} is neither one of {', '.join(TEMPLATES)}, {NO_TEMPLATE} nor a file of Jinja"
        )
    return path.read_text(encoding="utf-8")
