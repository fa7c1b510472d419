"""Chat tokenizers: a HuggingFace tokenizer with its Jinja template, loss masks from token spans, streamed decoding."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Encoding, Tokenizer

Message = dict[str, str]
_PROBE = "The 3 quick foxes' d\u00e9j\u00e0 vu:\n\tx  = 1234.5;\u4e2d\u6587 \U0001f98a"  # is split in many ways
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


class EncodedConversation(NamedTuple):
    """A conversation as tokens."""

    tokens: np.ndarray  # int32 [L]
    assistant_mask: np.ndarray  # bool [L], True on every token the assistant writes, its end-of-turn token included


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer, its chat template and its special ids."""

    tokenizer: Tokenizer
    template: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]  # ids that end an answer; `eos_id` is one of them
    special_tokens: tuple[tuple[str, str], ...]  # names a template may use, such as ("bos_token", "<s>")

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTokenizer":
        """The tokenizer of a HuggingFace folder: `tokenizer.json`, `tokenizer_config.json` and its chat template.

        The template is `chat_template.jinja` or the config's `chat_template`; further stop ids come from
        `generation_config.json`. Raises ValueError naming the file or field that is missing or wrong.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a tokenizer folder needs it")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path)
        names = {
            name: _token_text(config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name)
        }
        ids = {name: _token_id(tokenizer, config_path, name, text) for name, text in names.items()}
        if "eos_token" not in ids:
            raise ValueError(f"{config_path}: field `eos_token` is missing")
        eos_id = ids["eos_token"]
        return cls(
            tokenizer=tokenizer,
            template=_read_template(folder, config),
            bos_id=ids.get("bos_token"),
            eos_id=eos_id,
            pad_id=ids.get("pad_token", eos_id),
            stop_ids=_stop_ids(folder, eos_id),
            special_tokens=tuple(names.items()),
        )

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Short hashes of all that decides the tokens of a conversation: of the `tokenizer`, and of its `template`."""
        vocab = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
        known = json.dumps([vocab, self.special_tokens, self.encode(_PROBE).tolist()])
        return {"tokenizer": _digest(known), "template": _digest(self.template)}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text, special tokens included. ValueError where the template refuses it."""
        try:
            return _compile_template(self.template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **dict(self.special_tokens)
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def encode(self, text: str) -> np.ndarray:
        """int32 [L]: the ids of `text`; special tokens written in it are recognised, none is added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [L]: the conversation followed by the generation prompt, as the model sees it before it answers."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedConversation:
        """The conversation's tokens and which of them the assistant wrote; see `encode_conversations`."""
        return self.encode_conversations([messages])[0]

    def encode_conversations(
        self, conversations: Sequence[Sequence[Message]], *, unfinished: Sequence[bool] | None = None
    ) -> list[EncodedConversation]:
        """Each conversation's tokens and assistant mask.

        An assistant turn is the text between the prompt before it (generation prompt included) and the end of the
        turn, its end-of-turn token included; white space behind that token is not the assistant's. A token is masked
        when its characters lie inside a turn, so each of several tokens that share one character is.
        Where a conversation is `unfinished`, it ends with the words of its last answer, no end-of-turn token behind.
        Raises ValueError if the template rewrites earlier turns, for then a turn has no span.
        """
        cut = unfinished or [False] * len(conversations)
        rendered = [self._render_with_turns(messages, c) for messages, c in zip(conversations, cut, strict=True)]
        encodings = self.tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            EncodedConversation(np.asarray(encoding.ids, np.int32), _mask_turns(encoding, turns))
            for encoding, (_, turns) in zip(encodings, rendered, strict=True)
        ]

    def _render_with_turns(self, messages: Sequence[Message], cut: bool) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character span of each assistant turn."""
        whole, turns = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = whole if i + 1 == len(messages) else self.render(messages[: i + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template renders message {i} differently inside the conversation than as its last turn, "
                    "so its tokens cannot be told apart; split the conversation or use another template"
                )
            turns.append((len(before), self._trim_turn(after)))
        if cut and messages[-1]["role"] == "assistant":
            start, words = turns[-1][0], messages[-1]["content"].strip()
            at = whole.find(words, start)
            if at < 0:
                raise ValueError("the chat template rewrites an unfinished answer, so its end is not found; drop it")
            whole = whole[: at + len(words)]
            turns[-1] = (start, len(whole))
        return whole, turns

    def _trim_turn(self, text: str) -> int:
        """The length of `text` without white space that stands behind a final special token."""
        trimmed = text.rstrip()
        return len(trimmed) if trimmed.endswith(self._special_contents) else len(text)

    @functools.cached_property
    def _special_contents(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special)


class IncrementalDecoder:
    """Decodes ids as they arrive; the pieces joined are the text, and none ends inside a UTF-8 sequence."""

    def __init__(self, tokenizer: ChatTokenizer, *, skip_special: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._ids: list[int] = []  # the last emitted piece, kept as context, and what is not yet emitted
        self._emitted = 0  # how many of `_ids` are already text

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, perhaps none."""
        self._ids.extend(int(i) for i in ids)
        text = self._pending()
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        """What is left at the end, an unfinished sequence as the replacement character."""
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


def _mask_turns(encoding: Encoding, turns: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [L]: True where a token's characters lie inside one of `turns`."""
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    mask = np.zeros(len(offsets), bool)
    for start, end in turns:
        mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 0] < end)
    return mask


class _GenerationBlock(jinja2.ext.Extension):
    """Lets `{% generation %}...{% endgeneration %}` render as its body; masks come from spans, not from this tag."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@functools.lru_cache(maxsize=16)
def _compile_template(template: str) -> jinja2.Template:
    """`template` in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


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


def _token_text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _token_id(tokenizer: Tokenizer, path: Path, name: str, text: str) -> int:
    """The id of a special token, which must be in the vocabulary and be recognised in rendered text."""
    index = tokenizer.token_to_id(text)
    if index is None:
        raise ValueError(f"{path}: field `{name}` is {text!r}, which tokenizer.json does not contain")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return index


def _read_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    else:
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise ValueError(
                f"{folder}: has no chat template; add chat_template.jinja or `chat_template` in tokenizer_config.json"
            )
    try:
        _compile_template(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"{folder}: the chat template does not parse ({error})") from error
    return template


def _stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    listed = _read_json(path).get("eos_token_id") if path.is_file() else None
    more = listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    return tuple(sorted({eos_id, *more}))
