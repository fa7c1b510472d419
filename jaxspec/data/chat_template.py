"""Chat templates as servers render them: Jinja in a sandbox, with the names and values that transformers gives it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxspec.data.messages import Arguments, Message

DATE = "2026-01-01"
"""The day that templates are told in data: one for all, so that the same text is the same tokens on every day."""
_OURS = ("messages", "tools", "documents", "add_generation_prompt")
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with the values of its variables.

    Raises ValueError for text that does not parse, a variable that it does not read, and a date that is none.
    """

    text: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Names that it may use, such as ("bos_token", "<s>"). Others are undefined, as in transformers."""
    variables: tuple[tuple[str, Any], ...] = ()
    """Values of its own variables, such as ("enable_thinking", False)."""
    date: str | None = None
    """The day that it is told, `YYYY-MM-DD`; None: today."""

    def __post_init__(self) -> None:
        try:
            _compile(self.text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not parse ({error})") from error
        self.check(dict(self.variables))
        if self.date is not None:
            try:
                datetime.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date is {self.date!r}; it must be a day such as {DATE}") from None

    @property
    def reads(self) -> frozenset[str]:
        """Names of the variables that are the template's own."""
        return _undeclared(self.text) - {*_OURS, *_TOKENS}

    @property
    def dated(self) -> bool:
        """Returns whether it asks for the date."""
        return "strftime_now" in self.text

    def check(self, variables: Mapping[str, Any]) -> None:
        """Raises ValueError for a variable that the template does not read; it would change nothing."""
        for name in variables:
            if name not in self.reads:
                known = ", ".join(sorted(self.reads)) or "no variable"
                raise ValueError(f"the chat template does not read {name!r}; it reads {known}")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of messages in the normal form. Raises ValueError where the template refuses them."""
        self.check(variables or {})
        names = dict(self.special_tokens) | dict(self.variables) | dict(variables or {})
        render = functools.partial(
            _compile(self.text).render,
            tools=[dict(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=self._strftime,
            **names,
        )
        try:
            try:
                return render(messages=[_shown(m) for m in messages])
            except Exception:
                # Some templates iterate over the arguments of a call, others concatenate them as text.
                if not any("tool_calls" in m for m in messages):
                    raise
                return render(messages=[_with_texts(_shown(m)) for m in messages])
        except Exception as error:  # a template computes, so it can fail in every way that an expression can
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def _strftime(self, form: str) -> str:
        day = datetime.now() if self.date is None else datetime.fromisoformat(self.date)
        return day.strftime(form)


def parse_variables(text: str | None) -> tuple[tuple[str, Any], ...]:
    """Returns the variables of `enable_thinking=false,reasoning_effort=low`: values are JSON, or else text.

    `False` and `None` are not text either, which a template would take for true.

    Raises ValueError for an item without a name and a value.
    """
    found = {}
    for item in (text or "").split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if not equals or not value or not name.isidentifier():
            raise ValueError(f"template arguments are {text!r}; they must be names and values: enable_thinking=false")
        try:
            found[name] = json.loads(_WORDS.get(value.lower(), value))
        except ValueError:
            found[name] = value
    return tuple(sorted(found.items()))


def _shown(message: Message) -> Message:
    """Returns a message as templates read it: a thought stands under each of the names that one of them uses."""
    thought = message.get("reasoning_content")
    return message if thought is None else message | {"thinking": thought, "reasoning": thought}


def _with_texts(message: Message) -> Message:
    """Returns a message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments.text if isinstance(arguments, Arguments) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


class _GenerationBlock(jinja2.ext.Extension):
    """Lets `{% generation %}...{% endgeneration %}` render as its body; few templates have the tag, none is needed."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Returns the environment that transformers compiles templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=16)
def _undeclared(template: str) -> frozenset[str]:
    """Returns the names that a template reads and does not set."""
    tree = _environment().parse(template)
    found = jinja2.meta.find_undeclared_variables(tree) - set(_environment().globals) - {"strftime_now"}
    # Names that a branch or loop sets count as undeclared elsewhere; what is asked whether it is defined is a variable.
    own = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx in ("store", "param")}
    asked = {
        test.node.name
        for test in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
        if test.name in ("defined", "undefined", "default", "d") and isinstance(test.node, jinja2.nodes.Name)
    }
    return frozenset(found - (own - asked))
