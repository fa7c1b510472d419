"""Answers of a server that speaks OpenAI's API, streamed: text, token ids where it gives them, and when they came."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.serving.endpoint import TOKEN_IDS, Client, RequestFailed, ServerRefused
from jaxspec.serving.served_acceptance import AnswerAcceptance, Counters, MetricsPage, of_answer, parse_page

END = "[DONE]"
EXTRAS = (TOKEN_IDS, "return_spec_tokens_details")
"""Fields beyond OpenAI's: token ids (vLLM), and the rounds of the answer (SGLang)."""

CUT_OFF = ("", "abort", "error")
"""Reasons to end that are the server's own: it was stopped, or it failed."""


class StreamedAnswer(NamedTuple):
    """An answer and the time it took."""

    text: str
    tokens: tuple[int, ...]
    """Ids, where the server gives them."""
    count: int
    """New tokens by the server's own count; 0 where it does not say."""
    prompt_tokens: int
    finish: str
    ttft_seconds: float
    """From the request to the first chunk with text or thoughts."""
    seconds: float
    chunk_seconds: tuple[float, ...]
    """When each of these chunks came."""
    acceptance: AnswerAcceptance | None
    """The rounds of the answer, where the server tells them."""


@dataclasses.dataclass
class _Heard:
    """The chunks of a stream taken together so far."""

    began: float
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    finish: str = ""
    usage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    acceptance: AnswerAcceptance | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Takes up a chunk. Raises RequestFailed where it is an error."""
        if chunk.get("error"):
            raise RequestFailed(_kind(chunk["error"]), f"the stream broke off: {json.dumps(chunk['error'])[:200]}")
        self.acceptance = of_answer(chunk) or self.acceptance
        if isinstance(usage := chunk.get("usage"), Mapping):
            self.usage = usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            said = choice.get("text") or delta.get("content") or ""
            ids = choice.get("token_ids")
            self.tokens += ids if isinstance(ids, list) else []
            # Thoughts are no part of the text, and the server counts their tokens.
            if said or ids or delta.get("reasoning_content") or delta.get("reasoning"):
                self.times.append(time.perf_counter() - self.began)
            self.text += said
            self.finish = choice.get("finish_reason") or self.finish

    def answer(self) -> StreamedAnswer:
        """Returns the whole answer. Raises RequestFailed where the stream ended without a reason to end."""
        if self.finish not in ("stop", "length"):
            kind = "stream" if self.finish in CUT_OFF else f"finish {self.finish}"
            raise RequestFailed(kind, f"the stream ended with finish_reason {self.finish!r}")
        counts = [self.usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
        count, prompt = (c if isinstance(c, int) else 0 for c in counts)
        seconds = time.perf_counter() - self.began
        first = self.times[0] if self.times else seconds
        return StreamedAnswer(
            self.text, tuple(self.tokens), count or len(self.tokens), prompt, self.finish, first, seconds,
            tuple(self.times), self.acceptance,
        )  # fmt: skip


def _kind(error: object) -> str:
    """Returns how an error within a stream is counted: by its status where it has one."""
    code = error.get("code") if isinstance(error, Mapping) else None
    return f"status {code}" if isinstance(code, int) and 400 <= code < 600 else "stream"


def stream(client: Client, path: str, body: Mapping[str, Any]) -> StreamedAnswer:
    """Returns a server's answer to a request body; a server that refuses one of `EXTRAS` is asked without it.

    Raises RequestFailed naming what is wrong. A request is answered once: a second one would be timed with a warm
    cache.
    """
    asked = {**body, "model": client.model, "stream": True, "stream_options": {"include_usage": True}}
    extras = [name for name in EXTRAS if name not in client.refused]
    while True:
        try:
            found = _stream_once(client, path, asked | dict.fromkeys(extras, True))
        except RequestFailed as error:
            left = _left_of(extras, error, client.settled)
            if left == extras:
                raise
            extras = left
        else:
            client.refused |= {name for name in EXTRAS if name not in extras}
            client.settled = True
            return found


def _left_of(extras: Sequence[str], error: RequestFailed, settled: bool) -> list[str]:
    """Returns the fields to ask with after a failure; all of them where it is not about them.

    A refusal that names none of them may be about the last, as long as the server has answered no request with them.
    """
    if error.kind not in ("status 400", "status 422"):
        return list(extras)
    if any(name in str(error) for name in extras):
        return [name for name in extras if name not in str(error)]
    return list(extras if settled else extras[:-1])


def _stream_once(client: Client, path: str, body: Mapping[str, Any]) -> StreamedAnswer:
    heard = _Heard(time.perf_counter())
    with client.open_stream(path, body) as lines:
        for chunk in read_events(lines):
            heard.add(chunk)
    return heard.answer()


def read_events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the objects of a stream of server-sent events until it ends. Raises RequestFailed for one that is none."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == END:
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise RequestFailed("unreadable", f"a chunk is not JSON: {data[:100]}") from None
        if not isinstance(chunk, dict):
            raise RequestFailed("unreadable", f"a chunk is no object: {data[:100]}")
        yield chunk


def read_page(client: Client) -> MetricsPage:
    """Returns what a server's metrics page says of speculative decoding; nothing where there is no page."""
    return parse_page(client.read_text("/metrics") or "")


def read_counters(client: Client) -> Counters | None:
    """Returns a server's counters of speculative decoding; None where it shows none."""
    return read_page(client).counters


def read_version(client: Client) -> str | None:
    """Returns the server's version, as vLLM and SGLang tell it; None where it does not.

    Raises ServerRefused where it does not answer at all.
    """
    for path in ("/version", "/server_info", "/get_server_info"):
        try:
            found = json.loads(client.read_text(path) or "")
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("version"), str):
            return found["version"]
    if not client.is_up():
        raise ServerRefused(f"{client.endpoint.base} does not answer: is the server up? The same command goes on then")
    return None
