"""Requests of OpenAI's API, read field by field: each is used, known to change nothing, or refused.

A field that would change the text and is not supported is refused unless it has a value that changes nothing. Fields
that no one knows are ignored, as OpenAI's own server does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxspec.serving.api_errors import ApiError, wrong
from jaxspec.serving.strict_json import check_text, shown

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, LONGEST_STOP = 4, 16, 4, 256
DEFAULT_COMPLETION = 16
"""Tokens of a completion whose request names no number, as OpenAI has it."""
SEEDS = 2**32
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
}
"""Fields that would change the text, with the values that do not; null never does."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_CALLS = ("tool_calls", "function_call", "audio")


class ServedLimits(NamedTuple):
    """The model that is served, and how much of it a request may ask for."""

    model: str
    longest: int
    """Most tokens of a prompt."""
    most_new: int
    """Most tokens of an answer."""
    positions: int
    """Of the target: prompt and answer together."""
    vocab: int
    most_answers: int = MOST_CHOICES * MOST_PROMPTS
    """Of one request: more would never find a place to wait."""


class VendorFields(NamedTuple):
    """The vendor field `jaxspec` of a request."""

    wanted: bool = False
    """Whether chunks say what their round did."""
    plain: bool = False
    """Whether to decode without drafts."""
    tree: bool = False
    """Whether chunks hold the round's tree and time as well."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request whose fields are of the right types and ranges."""

    prompts: tuple[Any, ...]
    """Of a chat its messages, as one; of completions texts and tuples of token ids."""
    chat: bool
    variables: Mapping[str, Any]
    """Of the chat template."""
    choices: int
    """Answers a prompt."""
    most_new: int | None
    temperature: float
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a last chunk has the usage."""
    ids: bool
    """Whether the answer's token ids are returned, as vLLM does."""
    report: VendorFields


def read_chat(fields: Mapping[str, Any], limits: ServedLimits) -> Asked:
    """Returns a request of chat completions. Raises ApiError naming the field that is at fault."""
    _check_model(fields, limits)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages must be a list of at least one message")
    prompt = tuple(_message(message, i) for i, message in enumerate(messages))
    variables = fields.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise wrong("chat_template_kwargs", "chat_template_kwargs must be an object")
    return _asked(fields, limits, (prompt,), chat=True, variables=variables)


def read_completion(fields: Mapping[str, Any], limits: ServedLimits) -> Asked:
    """Returns a request of completions. Raises ApiError naming the field that is at fault."""
    _check_model(fields, limits)
    prompt = fields.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_integer(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= MOST_PROMPTS:
        raise wrong("prompt", f"prompt must be a text, a list of token ids, or a list of up to {MOST_PROMPTS} of these")
    return _asked(fields, limits, tuple(_prompt(one, limits.vocab) for one in prompt), chat=False, variables={})


def _asked(
    fields: Mapping[str, Any],
    limits: ServedLimits,
    prompts: tuple[Any, ...],
    *,
    chat: bool,
    variables: Mapping[str, Any],
) -> Asked:
    stream = _boolean(fields, "stream")
    for name, values in NEUTRAL.items():
        value = fields.get(name)
        # 0 equals False, and says something else.
        same = (value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)
        if value is not None and not any(same):
            sentence = f"{name} is {shown(value)}, which this server does not support: leave it out"
            raise wrong(name, sentence, "unsupported_value")
    choices = _integer(fields, "n", 1, MOST_CHOICES) or 1
    if choices * len(prompts) > limits.most_answers:
        raise wrong("n", f"n asks for {choices * len(prompts)} answers; this server lets {limits.most_answers} wait")
    seed = _integer(fields, "seed", -(2**63), 2**63 - 1)
    temperature = _number(fields, "temperature", 0.0, 2.0)
    return Asked(
        prompts=prompts,
        chat=chat,
        variables=variables,
        choices=choices,
        most_new=_most_new(fields, limits, chat),
        temperature=1.0 if temperature is None else temperature,
        seed=None if seed is None else seed % SEEDS,
        stops=_stops(fields.get("stop")),
        stream=stream,
        usage=_usage(fields.get("stream_options"), stream),
        ids=_boolean(fields, "return_token_ids"),
        report=_report(fields.get("jaxspec")),
    )


def _check_model(fields: Mapping[str, Any], limits: ServedLimits) -> None:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise wrong("model", f"model must be the name of a model: {limits.model}")
    if model != limits.model:
        sentence = f"the model {shown(model)} does not exist: this server has {limits.model}"
        raise ApiError(404, sentence, param="model", code="model_not_found")


def _message(given: object, index: int) -> dict[str, str]:
    place = f"messages[{index}]"
    if not isinstance(given, dict):
        raise wrong(place, f"{place} must be an object")
    for name in _MESSAGE_CALLS:
        if given.get(name):
            raise wrong(f"{place}.{name}", f"{place} has {name}, which this server does not support")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{place}.role", f"{place}.role is {shown(role)}; it must be one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _content(given.get("content"), f"{place}.content")}


def _content(given: object, place: str) -> str:
    """Returns the text of a content: a string, or parts of text one behind the other."""
    if isinstance(given, str):
        return check_text(given, place)
    if not isinstance(given, list) or not given:
        raise wrong(place, f"{place} must be a text, or a list of parts of type text")
    texts = []
    for i, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{place}[{i}]", f"{place}[{i}] is of type {shown(kind)}; this server takes parts of type text")
        texts.append(check_text(part["text"], f"{place}[{i}].text"))
    return "".join(texts)


def _prompt(given: object, vocab: int) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return check_text(given, "prompt")
    if not isinstance(given, list) or not given or not all(map(_is_integer, given)):
        raise wrong("prompt", "prompt must be a text, a list of token ids, or a list of these")
    outside = next((token for token in given if not 0 <= token < vocab), None)
    if outside is not None:
        raise wrong("prompt", f"prompt has the token {shown(outside)}; the vocabulary ends at {vocab - 1}")
    return tuple(given)


def _most_new(fields: Mapping[str, Any], limits: ServedLimits, chat: bool) -> int | None:
    """Returns the most tokens of an answer; None where as many as there is room for."""
    names = ("max_tokens", "max_completion_tokens")
    found = {name: _integer(fields, name, 1, 2**63 - 1, told=limits.most_new) for name in names}
    given = {value for value in found.values() if value is not None}
    if len(given) > 1:
        raise wrong(names[0], f"{names[0]} and {names[1]} differ: give one of them")
    if given and max(given) > limits.most_new:
        name = next(name for name in names if found[name] is not None)
        raise wrong(name, f"{name} is {max(given)}; this server writes at most {limits.most_new} tokens an answer")
    return max(given) if given else None if chat else min(DEFAULT_COMPLETION, limits.most_new)


def _stops(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise wrong("stop", f"stop must be a text, or a list of at most {MOST_STOPS} texts")
    for stop in stops:
        if not 1 <= len(check_text(stop, "stop")) <= LONGEST_STOP:
            raise wrong("stop", f"each stop must have 1 to {LONGEST_STOP} characters")
    return tuple(stops)


def _usage(given: object, stream: bool) -> bool:
    if given is None:
        return False
    if not stream or not isinstance(given, dict):
        raise wrong("stream_options", "stream_options must be an object, and needs stream to be true")
    return _boolean(given, "include_usage", "stream_options.include_usage")


def _report(given: object) -> VendorFields:
    """Returns the vendor field: true, or an object that asks for more."""
    if given is None or isinstance(given, bool):
        return VendorFields(bool(given))
    if not isinstance(given, dict) or not given.keys() <= {"plain", "tree"}:
        raise wrong("jaxspec", "jaxspec must be true, or an object of `plain` and `tree`")
    return VendorFields(True, _boolean(given, "plain", "jaxspec.plain"), _boolean(given, "tree", "jaxspec.tree"))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(fields: Mapping[str, Any], name: str, least: int, most: int, told: int | None = None) -> int | None:
    """Returns an integer field; `told` is the most that a client is told, where one above it has a sentence of its
    own."""
    value = fields.get(name)
    if value is None:
        return None
    if not _is_integer(value) or not least <= value <= most:
        raise wrong(name, f"{name} is {shown(value)}; it must be an integer from {least} to {told or most}")
    return value


def _number(fields: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(name, f"{name} is {shown(value)}; it must be a number from {least:g} to {most:g}")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str, place: str | None = None) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(place or name, f"{place or name} is {shown(value)}; it must be true or false")
    return bool(value)


def check_room(length: int, most_new: int | None, limits: ServedLimits) -> int:
    """Returns the tokens that an answer to a prompt of `length` may have. Raises ApiError where there is no room."""
    code = "context_length_exceeded"
    if length > limits.longest or length >= limits.positions:
        most = min(limits.longest, limits.positions - 1)
        raise ApiError(400, f"the prompt has {length} tokens, and this server reads at most {most}", code=code)
    room = limits.positions - length
    if most_new is not None and most_new > room:
        sentence = f"{length} tokens of prompt and {most_new} of answer exceed the {limits.positions} of the context"
        raise ApiError(400, sentence, code=code)
    return min(limits.most_new, room) if most_new is None else most_new
