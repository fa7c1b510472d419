"""Answers from a server that speaks OpenAI's chat completions (vLLM, SGLang, sglang-jax), for many conversations."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import email.utils
import importlib
import itertools
import json
import queue
import random
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from jaxspec.data.messages import Arguments, BadRecord, Message, parse_conversation
from jaxspec.decoding.requests import Settings
from jaxspec.serving.dialogue import NO_TURN, UNFIT, Dialogue, Reply, Rewritten

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again."""
FATAL = {401: "the key", 403: "the key", 404: "the address or the model"}
"""Statuses that no other request would change."""
OWN_FAULT = (400, 413, 422, 451)
"""Statuses by which a server refuses one request for what it asks, and would again."""
TOKEN_IDS = "return_token_ids"
"""Field that asks for token ids, beyond OpenAI's (vLLM)."""
_LONGEST_WAIT = 60.0
_TOO_LONG = ("maximum context length", "context length", "too long", "max_model_len", "longer than")
"""Words by which servers say that a prompt has no room."""
NO_VARIABLES: Mapping[str, Any] = types.MappingProxyType({})
Item = TypeVar("Item")
Made = TypeVar("Made")


class RequestFailed(Exception):
    """A request that has no answer; `kind` is how failures are counted."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind

    @property
    def passes(self) -> bool:
        """Returns whether the same request may have an answer later: the server failed, or the way to it."""
        status = self.kind.removeprefix("status ")
        if status.isdigit():
            return int(status) not in OWN_FAULT
        return self.kind in ("connection", "stream", "timeout", "unreadable")


class ServerRefused(ValueError):
    """A refusal that concerns every request."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server, and how patiently it is asked. Raises ValueError for a number out of range."""

    url: str
    """Of the API, such as `http://host:8000/v1`; `/v1` is added to an address without a path."""
    model: str | None = None
    """The model's name; None: the first that the server lists."""
    key: str | None = None
    """Bearer token."""
    concurrency: int = 64
    """Requests in flight."""
    tries: int = 8
    """Times that a request is sent before its conversation is given up."""
    timeout: float = 600.0
    """Seconds to wait for an answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint is {self.url!r}; it must be an address such as http://localhost:8000/v1")
        for name in ("concurrency", "tries", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")

    @property
    def base(self) -> str:
        """The address that paths are joined to."""
        scheme, _, rest = self.url.rstrip("/").partition("://")
        return f"{scheme}://{rest}" if "/" in rest else f"{scheme}://{rest}/v1"


class Client:
    """Sends requests to an endpoint from several threads, again where a failure may pass."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self._httpx = endpoint, _httpx()
        headers = {} if endpoint.key is None else {"Authorization": f"Bearer {endpoint.key}"}
        limits = self._httpx.Limits(
            max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency
        )
        timeout = self._httpx.Timeout(endpoint.timeout, connect=30.0, pool=None)
        try:
            self._http = self._httpx.Client(base_url=endpoint.base, headers=headers, limits=limits, timeout=timeout)
        except self._httpx.InvalidURL as error:
            raise ValueError(f"--endpoint is {endpoint.url!r}, which is no address: {error}") from error
        self.retries: collections.Counter[str] = collections.Counter()
        """Requests that were sent again, by what was wrong."""
        self.refused: set[str] = set()
        """Fields beyond OpenAI's that the server has refused."""
        self.settled = False
        """Whether it has answered a request with those that are left."""
        self._lock = threading.Lock()
        self.model = endpoint.model or self._first_model()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def is_up(self) -> bool:
        """Returns whether the server answers at all."""
        try:
            return self._http.get("/models").status_code < 500
        except self._httpx.TransportError:
            return False

    def _first_model(self) -> str:
        try:
            found = self._send("GET", "/models", None).get("data")
        except RequestFailed as error:
            self.close()
            raise ServerRefused(f"{error}; is the server up, and is this its address?") from error
        first = found[0] if isinstance(found, list) and found else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str):
            raise ServerRefused(f"{self.endpoint.base} lists no model; name one with --model")
        return name

    def complete(self, dialogue: Dialogue, settings: Settings) -> Reply:
        """Returns the server's answer to what a dialogue asks. Raises RequestFailed, and ServerRefused."""
        context = context_fields(dialogue.ask(), dialogue.original.tools, dialogue.variables)
        body = {"model": self.model, **context, **sampling_fields(settings)}
        if TOKEN_IDS not in self.refused:
            try:
                return read_reply(self._send("POST", "/chat/completions", body | {TOKEN_IDS: True}))
            except RequestFailed as error:
                if TOKEN_IDS not in str(error):
                    raise
                self.refused.add(TOKEN_IDS)  # a server that refuses what it does not know
        return read_reply(self._send("POST", "/chat/completions", body))

    @contextlib.contextmanager
    def open_stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """Yields the lines of a streamed response, asked for once. Raises RequestFailed, and ServerRefused."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._refuse(response.status_code, response.text)
                yield _lines(response.iter_bytes())
        except self._httpx.TimeoutException as error:
            raise RequestFailed("timeout", f"no answer within {self.endpoint.timeout:g} s") from error
        except self._httpx.RequestError as error:
            raise RequestFailed("connection", str(error) or type(error).__name__) from error

    def tokenize(self, context: Mapping[str, Any]) -> list[int] | None:
        """Returns the ids that the server makes of `context_fields`, as vLLM tells them; None where it does not."""
        body = {"model": self.model, **context, "add_generation_prompt": True}
        try:
            response = self._http.post(self.endpoint.base.removesuffix("/v1") + "/tokenize", json=body)
            found = response.json().get("tokens") if response.status_code == 200 else None
        except (self._httpx.RequestError, ValueError, AttributeError):
            return None
        return None if (ids := _ids(found)) is None else list(ids)

    def read_text(self, path: str) -> str | None:
        """Returns the text at a path of the server's root, beside its API; None where there is none."""
        address = self.endpoint.base.removesuffix("/v1") + path
        try:
            response = self._http.get(address)
        except self._httpx.RequestError:
            return None
        return response.text if response.status_code == 200 else None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns the JSON of a response, after as many tries as the endpoint allows."""
        kind, said = "", ""
        for attempt in range(self.endpoint.tries):
            if attempt:
                with self._lock:
                    self.retries[kind] += 1
            wait = min(_LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._http.request(method, path, json=body)
                if response.status_code == 200:
                    found = response.json()
                    if isinstance(found, dict):
                        return found
                    kind, said = "unreadable", "its answer is no JSON object"
                elif response.status_code not in AGAIN:
                    self._refuse(response.status_code, response.text)
                else:
                    kind, said = f"status {response.status_code}", response.text[:200]
                    wait = _asked_wait(response.headers.get("retry-after"), wait)
            except ValueError as error:
                if isinstance(error, ServerRefused):
                    raise
                kind, said = "unreadable", f"its answer is not JSON ({error})"
            except self._httpx.TimeoutException:
                kind, said = "timeout", f"no answer within {self.endpoint.timeout:g} s"
            except self._httpx.RequestError as error:
                kind, said = "connection", str(error) or type(error).__name__
            if attempt + 1 < self.endpoint.tries:
                time.sleep(wait)
        raise RequestFailed(kind, f"{self.endpoint.base}{path}: {said}, {self.endpoint.tries} times")

    def _refuse(self, status: int, text: str) -> None:
        """Raises for a status that stays: ServerRefused where it concerns all requests."""
        if status in FATAL:
            said = f"{self.endpoint.base} answers with status {status}"
            raise ServerRefused(f"{said}: check {FATAL[status]} ({text[:200]})")
        too_long = status in (400, 413, 422) and any(words in text.lower() for words in _TOO_LONG)
        raise RequestFailed(UNFIT if too_long else f"status {status}", f"status {status}: {text[:300]}")


def _httpx() -> Any:
    """Returns the package, which is an extra."""
    try:
        return importlib.import_module("httpx")
    except ImportError:
        raise ValueError("--endpoint needs the package httpx: pip install httpx") from None


def wire_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages as the API takes them: arguments as text, and thoughts behind the last user's turn alone."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    sent = []
    for i, message in enumerate(messages):
        wire = {name: value for name, value in message.items() if name != "reasoning_content"}
        thought = message.get("reasoning_content")
        if thought is not None and i > last:
            wire |= {"reasoning_content": thought, "reasoning": thought}  # servers read one or the other
        if "tool_calls" in message:
            wire["tool_calls"] = [_wire_call(call, n) for n, call in enumerate(message["tool_calls"])]
        sent.append(wire)
    return sent


def context_fields(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), variables: Mapping[str, Any] = NO_VARIABLES
) -> dict[str, Any]:
    """Returns the fields of a request that say what the template renders."""
    found: dict[str, Any] = {"messages": wire_messages(messages)}
    if tools:
        found["tools"] = [dict(tool) for tool in tools]
    if variables:
        found["chat_template_kwargs"] = dict(variables)
    return found


def sampling_fields(settings: Settings) -> dict[str, Any]:
    """Returns the fields of a request that say how long an answer may be, and how its tokens are drawn."""
    found = {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
    }
    return found | ({"top_k": settings.top_k} if settings.top_k else {})


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yields the lines of a stream. They end at line feeds alone: texts in JSON may hold other ends of lines."""
    held = b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")
    if held:
        yield held.decode("utf-8", "replace")


def _wire_call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments.text if isinstance(arguments, Arguments) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": text}
    return {"id": call.get("id", f"call_{number}"), "type": "function", "function": function}


def read_reply(response: Mapping[str, Any]) -> Reply:
    """Returns the answer that a response holds. Raises RequestFailed where it holds none that can be used."""
    try:
        choice = response["choices"][0]
        given = choice["message"]
        finish = choice["finish_reason"]
        known = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
        told = {"role": "assistant"} | {name: given[name] for name in known if given.get(name)}
        message = parse_conversation({"messages": [told]}, id="", source="").messages[0]
    except BadRecord as error:
        raise RequestFailed("unreadable", f"the answer cannot be read: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        said = json.dumps(response)[:200]
        raise RequestFailed("unreadable", f"the answer {said} is not one of chat completions: no message") from error
    if finish not in ("stop", "length", "tool_calls", "function_call"):
        raise RequestFailed(f"finish {finish}", f"the answer ended by {finish!r}")
    ids = _ids(choice.get("token_ids"))
    prompt = _ids(response.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    usage = response.get("usage")
    told = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = len(ids) if ids is not None else told if isinstance(told, int) else 0
    return Reply(message, finish == "length", tokens, ids, prompt)


def _ids(value: object) -> tuple[int, ...] | None:
    ids = value if isinstance(value, list) else []
    return tuple(ids) if ids and all(isinstance(i, int) and 0 <= i < 2**31 for i in ids) else None


def _asked_wait(header: str | None, otherwise: float) -> float:
    """Returns the seconds that `retry-after` asks for: a number, or a date."""
    if header is None:
        return otherwise
    try:
        return min(_LONGEST_WAIT, max(0.0, float(header)))
    except ValueError:
        pass
    try:
        asked = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError):
        return otherwise
    return min(_LONGEST_WAIT, max(0.0, asked))


@dataclasses.dataclass(frozen=True)
class Failure:
    """A conversation that has no answer this time."""

    id: str
    kind: str
    sentence: str


def rewrite_remotely(client: Client, begun: Iterable[tuple[Dialogue, Settings]]) -> Iterator[Rewritten | Failure]:
    """Yields each dialogue when the server has answered all its turns, or when its request has failed for good.

    Closes the client at the end. Raises ServerRefused where no further request makes sense; dialogues in flight are
    then dropped.
    """
    with contextlib.closing(client):
        yield from in_flight(lambda one: _write_all(client, *one), begun, client.endpoint.concurrency)


def in_flight(work: Callable[[Item], Made], items: Iterable[Item], most: int) -> Iterator[Made]:
    """Yields what `work` makes of each item as it is done, of at most `most` at once; raises what it raises.

    Whoever stops asking waits for none of them, and neither does the end of the process.
    """
    made: queue.SimpleQueue[tuple[Made | None, BaseException | None]] = queue.SimpleQueue()

    def run(item: Item) -> None:
        try:
            made.put((work(item), None))
        except BaseException as error:  # raised again by the asker, who would wait for ever otherwise
            made.put((None, error))

    waiting, running = iter(items), 0
    while True:
        for item in itertools.islice(waiting, most - running):
            # A pool's threads would be waited for at the end of the process: for a silent server, minutes.
            threading.Thread(target=run, args=(item,), daemon=True).start()
            running += 1
        if not running:
            return
        found, error = made.get()
        running -= 1
        if error is not None:
            raise error
        yield cast("Made", found)


def _write_all(client: Client, dialogue: Dialogue, settings: Settings) -> Rewritten | Failure:
    """Lets the server write every turn of one dialogue."""
    finish, reason = (UNFIT, NO_TURN) if dialogue.ended else (None, "")
    while finish is None:
        try:
            finish = dialogue.take(client.complete(dialogue, settings))
        except RequestFailed as error:
            if error.kind != UNFIT:
                return Failure(dialogue.original.id, error.kind, str(error))
            finish, reason = UNFIT, str(error)
    return dialogue.finished(finish, reason)
