"""Answers on their way to a client: awaited as a whole or sent as events, and given up when the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxspec.serving.api_errors import FAILED, ApiError
from jaxspec.serving.api_reply import DONE, ApiReply, event
from jaxspec.serving.outbox import Delta, Outbox
from jaxspec.serving.scheduler import CLOSING, AnswerJob

DRAIN_SECONDS = 30.0
"""In which a client takes what is sent to it."""
Result = TypeVar("Result")


class Inbox:
    """The answers of one request, as the event loop reads them out of the decode thread's outboxes."""

    def __init__(self) -> None:
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        self.jobs: list[AnswerJob] = []

    def outbox(self) -> Outbox:
        """Returns an outbox whose deltas wake the reader."""
        return Outbox(self._notify)

    def cancel(self) -> None:
        """Gives up all answers; those that have ended stay as they are."""
        for job in self.jobs:
            job.cancelled = True

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields deltas with the number of their answer, until all have ended. Raises ApiError where one fails."""
        left = set(range(len(self.jobs)))
        while left:
            await self._told.wait()
            self._told.clear()
            for index in sorted(left):
                taken, failure = self.jobs[index].outbox.take()
                for delta in taken:
                    yield index, delta
                    if delta.finish is not None:
                        left.discard(index)
                if failure is not None and index in left:
                    # 503 would be tried again, at a server that is gone.
                    headers = {"x-should-retry": "false"} if failure == CLOSING else None
                    raise ApiError(503 if failure == CLOSING else 500, failure, type=FAILED, headers=headers)

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has ended
            self._loop.call_soon_threadsafe(self._told.set)


async def answer_whole(inbox: Inbox, reply: ApiReply) -> dict[str, Any]:
    """Returns the whole response. Raises ApiError where an answer fails."""
    found: list[list[Delta]] = [[] for _ in inbox.jobs]
    async for index, delta in inbox.deltas():
        found[index].append(delta)
    return reply.whole(found)


async def answer_events(inbox: Inbox, reply: ApiReply) -> AsyncIterator[bytes]:
    """Yields server-sent events; a failure is the last one."""
    for chunk in reply.opening():
        yield event(chunk)
    totals: dict[int, Delta] = {}
    try:
        async for index, delta in inbox.deltas():
            for chunk in reply.chunks(index, delta):
                yield event(chunk)
            light = delta._replace(text="", tree=None)
            totals[index] = totals[index].then(light) if index in totals else light
    except ApiError as error:
        yield event(error.body)
        return
    for chunk in reply.closing(list(totals.values())):
        yield event(chunk)
    yield DONE


class EventStream(Response):
    """A response of server-sent events. A client that has gone, or takes nothing, ends it and gives its answers up."""

    def __init__(self, events: AsyncIterator[bytes], give_up: Callable[[], None]) -> None:
        super().__init__(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._give_up = events, give_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await while_connected(receive, self._send(send))
        except TimeoutError:
            pass  # the connection is closed without the end of its body
        finally:
            self._give_up()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            async with asyncio.timeout(DRAIN_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Returns the result of `work`; None where the client goes before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    both: Sequence[asyncio.Future[Any]] = (working, gone)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
