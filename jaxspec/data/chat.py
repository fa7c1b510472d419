"""Chat tokenizers: a HuggingFace tokenizer with its Jinja template, loss masks of turns, and streamed decoding."""

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

from jaxspec.data.sentencepiece_model import build_tokenizer, read_piece_model
from jaxspec.data.templates import TEMPLATES

Message = dict[str, str]
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files of a folder that may hold its tokenizer; the first that exists is read."""
NO_TEMPLATE = "none"
"""Name that stands for no template, when no conversation is rendered."""
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_PROBE = "The 3 quick foxes' d\u00e9j\u00e0 vu:\n\tx  = 1234.5;\u4e2d\u6587 \U0001f98a"  # split in many ways
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the decoding of an unfinished UTF-8 sequence


class EncodedConversation(NamedTuple):
    """A conversation as tokens."""

    tokens: np.ndarray  # int32 [L]
    assistant_mask: np.ndarray  # bool [L], True on every token the assistant writes, its end-of-turn token included


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer, its chat template and its special ids."""

    tokenizer: Tokenizer
    template: str | None
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]  # ids that end an answer; `eos_id` is one of them
    special_tokens: tuple[tuple[str, str], ...]  # names a template may use, such as ("bos_token", "<s>")

    @classmethod
    def load(cls, folder: str | Path, template: str | None = None) -> "ChatTokenizer":
        """Returns the tokenizer of a HuggingFace folder, with the chat template that `template` names.

        The tokenizer is `tokenizer.json` or, if there is none, SentencePiece's `tokenizer.model`, with
        `tokenizer_config.json`; further stop ids come from `generation_config.json`. If `template` is None, the
        template is the folder's own (`chat_template.jinja`, or the config's `chat_template`); otherwise it is one of
        `TEMPLATES`, a file of Jinja, or NO_TEMPLATE. Raises ValueError naming the file or field that is missing or
        wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give that of a HuggingFace model or tokenizer")
        config_path, config = folder / "tokenizer_config.json", _read_config(folder)
        tokenizer = _read_tokenizer(folder, config)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        names = {
            name: _token_text(config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name)
        }
        lacking = "{}: field `{}` is {!r}, which the tokenizer does not contain"
        ids = {n: _token_id(tokenizer, text, lacking.format(config_path, n, text)) for n, text in names.items()}
        if "eos_token" not in ids:
            raise ValueError(f"{config_path}: field `eos_token` is missing")
        eos_id = ids["eos_token"]
        text, ending = _choose_template(folder, config, tokenizer, template)
        return cls(
            tokenizer=tokenizer,
            template=text,
            bos_id=ids.get("bos_token"),
            eos_id=eos_id,
            pad_id=ids.get("pad_token", eos_id),
            stop_ids=tuple(sorted({*_stop_ids(folder, eos_id), *ending})),
            special_tokens=tuple(names.items()),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Short hashes of the `tokenizer` and of the `template`, which decide the tokens of a conversation."""
        vocab = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
        known = json.dumps([vocab, self.special_tokens, self.encode(_PROBE).tolist()])
        return {"tokenizer": _digest(known), "template": _digest(self.template or NO_TEMPLATE)}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the conversation as text with special tokens. Raises ValueError if the template refuses it."""
        if self.template is None:
            raise ValueError(f"there is no chat template (template {NO_TEMPLATE!r}), so only raw text can be encoded")
        try:
            return _compile_template(self.template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **dict(self.special_tokens)
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [L]: the ids of `text`. Special tokens in the text are recognised, and none is added."""
        # Control tokens in a user's text count as such: transformers tokenizes the rendered text as a whole, too.
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_text(self, text: str) -> EncodedConversation:
        """Returns a plain text as a model is pretrained on it: between `bos_id`, if there is one, and `eos_id`."""
        first = [] if self.bos_id is None else [self.bos_id]
        tokens = np.concatenate([first, self.encode(text), [self.eos_id]]).astype(np.int32)
        return EncodedConversation(tokens, np.zeros(len(tokens), bool))

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns int32 [L]: the conversation followed by the generation prompt, which the model answers."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedConversation:
        """Returns the conversation's tokens and assistant mask; see `encode_conversations`."""
        return self.encode_conversations([messages])[0]

    def encode_conversations(
        self, conversations: Sequence[Sequence[Message]], *, unfinished: Sequence[bool] | None = None
    ) -> list[EncodedConversation]:
        """Returns each conversation's tokens and assistant mask.

        An assistant turn is the text between the prompt before it (generation prompt included) and the end of the
        turn, including its end-of-turn token but not the white space after that. A token is masked if its characters
        lie inside a turn, so several tokens that share one character are masked alike.
        A conversation that is `unfinished` ends with the words of its last answer, without an end-of-turn token.
        Raises ValueError if the template rewrites earlier turns, because then a turn has no span.
        """
        cut = unfinished or [False] * len(conversations)
        rendered = [self._render_with_turns(messages, c) for messages, c in zip(conversations, cut, strict=True)]
        encodings = self.tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            EncodedConversation(np.asarray(encoding.ids, np.int32), _mask_turns(encoding, turns))
            for encoding, (_, turns) in zip(encodings, rendered, strict=True)
        ]

    def _render_with_turns(self, messages: Sequence[Message], cut: bool) -> tuple[str, list[tuple[int, int]]]:
        """Returns the rendered conversation and the character span of each assistant turn."""
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
        """Returns the length of `text` without the white space after a final special token."""
        trimmed = text.rstrip()
        return len(trimmed) if trimmed.endswith(self._special_contents) else len(text)

    @functools.cached_property
    def _special_contents(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special)


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


def _mask_turns(encoding: Encoding, turns: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns bool [L]: True where a token's characters lie inside one of `turns`."""
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
    """Returns `template` in the environment that transformers compiles it in."""
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


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json`, completed by `special_tokens_map.json` in older folders.

    A folder with only a `tokenizer.model` has Llama's special tokens by default.
    """
    config, path = _read_json(folder / "tokenizer_config.json"), folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and path.is_file():
        config |= _read_json(path)
    return config if (folder / TOKENIZERS[0]).is_file() else _LLAMA_TOKENS | config


def _read_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    path, pieces = (folder / name for name in TOKENIZERS)
    # tokenizer.json is used as it is; transformers 5 rebuilds its rules for spaces for the class LlamaTokenizer.
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    if not pieces.is_file():
        raise ValueError(f"{path}: no such file, nor a {pieces.name} beside it; a tokenizer folder needs one of them")
    return _of_pieces(pieces, config)


def _of_pieces(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Returns the SentencePiece tokenizer at `path`, completed by `config` and `added_tokens.json`."""
    model, prefix = read_piece_model(path), config.get("add_prefix_space")
    # As in transformers 5, text after a special token gets a space only with an explicit `"legacy": true`.
    tokenizer = build_tokenizer(
        model, prefix=model.dummy_prefix if prefix is None else prefix, legacy=bool(config.get("legacy"))
    )
    for index, token in sorted(_added_tokens(path.parent, config).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"{path}: {token.content!r} would get the id {tokenizer.token_to_id(token.content)}, and the added "
                f"tokens beside it say {index}; this file, or their list, is of another model"
            )
    return tokenizer


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


def _token_text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _token_id(tokenizer: Tokenizer, text: str, lacking: str) -> int:
    """Returns the id of a control token, and makes the tokenizer recognise it in rendered text.

    Raises ValueError with the message `lacking` if the tokenizer does not contain it.
    """
    index = tokenizer.token_to_id(text)
    if index is None:
        raise ValueError(lacking)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return index


def _choose_template(
    folder: Path, config: dict[str, Any], tokenizer: Tokenizer, name: str | None
) -> tuple[str | None, tuple[int, ...]]:
    """Returns the template that `name` stands for (see `ChatTokenizer.load`), and the ids that end its answers."""
    if name == NO_TEMPLATE:
        return None, ()
    if name in TEMPLATES:
        lacking = "{}: has no token {}, which the template {} needs; choose another"
        ids = [_token_id(tokenizer, t, lacking.format(folder, t, name)) for t in TEMPLATES[name].tokens]
        return TEMPLATES[name].text, tuple(ids[-1:])
    place = folder if name is None else Path(name)
    text = _own_template(folder, config) if name is None else _template_file(place)
    try:
        _compile_template(text)
    except jinja2.TemplateError as error:
        raise ValueError(f"{place}: the chat template does not parse ({error})") from error
    return text, ()


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
            f"{', '.join(TEMPLATES)}, or a file of Jinja"
        )
    return template


def _template_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"template {str(path)!r} is neither one of {', '.join(TEMPLATES)} nor a file of Jinja")
    return path.read_text(encoding="utf-8")


def _stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    listed = _read_json(path).get("eos_token_id") if path.is_file() else None
    more = listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    return tuple(sorted({eos_id, *more}))
