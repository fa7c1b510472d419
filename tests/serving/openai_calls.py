"""Calls by the package `openai`, of whatever version is installed: prints what came back as JSON.

Run as a program with the server's address, so that another version can be asked in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": [{"type": "text", "text": "3 and "}, {"type": "text", "text": "4 make"}]}]
SETTINGS: dict[str, Any] = {"model": "target", "temperature": 0.8, "seed": 11, "max_tokens": 40}


def told(response: Any) -> dict[str, Any]:
    """The fields of a whole response, read as a client reads them."""
    choices = [
        {
            "index": c.index,
            "text": c.message.content if hasattr(c, "message") else c.text,
            "role": c.message.role if hasattr(c, "message") else None,
            "finish": c.finish_reason,
            "logprobs": c.logprobs,
        }
        for c in response.choices
    ]
    usage = response.usage.model_dump()
    about = {"id": response.id, "object": response.object, "created": response.created, "model": response.model}
    return about | {"fingerprint": response.system_fingerprint, "choices": choices, "usage": usage}


class Gathered:
    """Chunks put together."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.finishes: dict[int, str] = {}
        self.ids: set[Any] = set()
        self.usage: Any = None
        self.chunks = self.with_usage = 0
        self.reports: list[Any] = []

    def take(self, chunk: Any) -> None:
        self.ids.add((chunk.id, chunk.object, chunk.created, chunk.model, chunk.system_fingerprint))
        self.chunks += 1
        report = getattr(chunk, "jaxspec", None)
        if report is not None:
            self.reports.append(report)
        if chunk.usage is not None:
            self.with_usage += 1
            self.usage = chunk.usage.model_dump()
        for c in chunk.choices:
            assert c.index not in self.finishes, "text behind the finish"
            text = c.delta.content if hasattr(c, "delta") else c.text
            self.texts[c.index] = self.texts.get(c.index, "") + (text or "")
            if c.finish_reason is not None:
                self.finishes[c.index] = c.finish_reason

    def told(self) -> dict[str, Any]:
        order = sorted(self.texts)
        return {
            "texts": [self.texts[i] for i in order],
            "finishes": [self.finishes[i] for i in order],
            "ids": len(self.ids),
            "usage": self.usage,
            "with_usage": self.with_usage,
            "chunks": self.chunks,
            "reports": self.reports,
        }


def read(stream: Any) -> dict[str, Any]:
    gathered = Gathered()
    for chunk in stream:
        gathered.take(chunk)
    return gathered.told()


async def read_async(stream: Any) -> dict[str, Any]:
    gathered = Gathered()
    async for chunk in stream:
        gathered.take(chunk)
    return gathered.told()


def refused(client: openai.OpenAI) -> dict[str, Any]:
    """The client's own exceptions for errors of the server."""
    found = {}
    for name, fields in {"range": {"temperature": 3}, "model": {"model": "other"}, "tools": {"logprobs": True}}.items():
        try:
            create: Any = client.chat.completions.create
            create(messages=MESSAGES, **(SETTINGS | fields))
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.code, error.param, error.type]
    return found


def calls(url: str) -> dict[str, Any]:
    """Everything that a client of one thread asks."""
    streamed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        chat: Any = client.chat.completions.create
        text: Any = client.completions.create
        return {
            "models": [m.id for m in client.models.list()],
            "model": client.models.retrieve("target").owned_by,
            "chat": told(chat(messages=MESSAGES, **SETTINGS)),
            "chat stream": read(chat(messages=MESSAGES, **SETTINGS, **streamed)),
            "text": told(text(prompt="3 and 4 make", **SETTINGS)),
            "text stream": read(text(prompt="3 and 4 make", **SETTINGS, **streamed)),
            "several": told(text(prompt=["3 and", "5 and"], n=2, **SETTINGS)),
            "several stream": read(text(prompt=["3 and", "5 and"], n=2, stream=True, **SETTINGS)),
            "reports": read(chat(messages=MESSAGES, stream=True, extra_body={"jaxspec": True}, **SETTINGS)),
            "bare": told(text(prompt="3 and 4 make", model="target", seed=1)),
            "refused": refused(client),
        }


async def calls_async(url: str) -> dict[str, Any]:
    """The same by the asynchronous client, several at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        chat: Any = client.chat.completions.create

        async def stream(seed: int) -> dict[str, Any]:
            return await read_async(await chat(messages=MESSAGES, stream=True, **(SETTINGS | {"seed": seed})))

        whole, *streams = await asyncio.gather(chat(messages=MESSAGES, **SETTINGS), *map(stream, (11, 12, 13, 11)))
        return {"chat": told(whole), "streams": streams}


if __name__ == "__main__":
    found = {"version": openai.VERSION, **calls(sys.argv[1]), "async": asyncio.run(calls_async(sys.argv[1]))}
    json.dump(found, sys.stdout)
