"""The server's routes: OpenAI's models, completions and chat completions, and the page of the demonstration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxspec import __version__
from jaxspec.data.prompts import Prompt, encode_prompt
from jaxspec.decoding.requests import Settings
from jaxspec.serving.answer_text import AnswerText
from jaxspec.serving.api_errors import FAILED, LIMITED, ApiError
from jaxspec.serving.api_reply import ApiReply
from jaxspec.serving.api_request import SEEDS, Asked, ServedLimits, check_room, read_chat, read_completion
from jaxspec.serving.demo_page import page_files
from jaxspec.serving.http_answers import EventStream, Inbox, answer_events, answer_whole, while_connected
from jaxspec.serving.http_guard import error_response, read_body
from jaxspec.serving.loading import Models
from jaxspec.serving.scheduler import AnswerJob, QueueFull, Scheduler, Stopping
from jaxspec.serving.served_acceptance import ACCEPTED, BY_POSITION, DRAFTED_TOKENS, DRAFTS
from jaxspec.serving.strict_json import read_object

RETRY_SECONDS = 2
"""After which a request may be sent again that found the queue full."""
DRAFTED, PLAIN = "speculative", "plain"
"""The lanes of the scheduler; without a drafter there is `PLAIN` alone."""
log = logging.getLogger("jaxspec.serve")
Read = Callable[[Mapping[str, Any], ServedLimits], Asked]


@dataclasses.dataclass(frozen=True)
class Service:
    """The models that are served, with the thread that decodes."""

    models: Models
    scheduler: Scheduler
    limits: ServedLimits
    fingerprint: str
    """Names the build: the same seed gives the same text under it."""
    keyed: bool = False
    """Whether clients need a key."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def encode(self, asked: Asked) -> list[np.ndarray]:
        """Returns the tokens of the prompts. Raises ApiError where the target cannot read one."""
        return [self._encode(prompt, asked) for prompt in asked.prompts]

    def _encode(self, prompt: Any, asked: Asked) -> np.ndarray:
        tokenizer = self.models.tokenizer
        if not asked.chat:
            return np.asarray(prompt, np.int32) if isinstance(prompt, tuple) else tokenizer.encode_raw(prompt)
        try:
            return encode_prompt(Prompt("", prompt, variables=asked.variables), tokenizer)
        except ValueError as error:
            raise ApiError(400, f"the conversation {error}", param="messages") from error

    def jobs(self, asked: Asked, prompts: Sequence[np.ndarray], inbox: Inbox) -> list[AnswerJob]:
        """Returns the jobs of a request: `asked.choices` a prompt. Raises ApiError where there is no room for one."""
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
        log.info("%d prompts, %s tokens, seed %d", len(prompts), "+".join(str(len(p)) for p in prompts), seed)
        found = []
        for tokens in prompts:
            most_new = check_room(len(tokens), asked.most_new, self.limits)
            for choice in range(asked.choices):
                # The draws depend on seed and choice alone, as those of `jaxspec generate` on seed and prompt.
                settings = Settings(most_new, asked.temperature, seed=seed).for_row(choice)
                try:
                    request = self.models.request(tokens, settings)
                except ValueError as error:
                    raise ApiError(400, f"the prompt {error}", param="prompt") from error
                text = AnswerText(self.models.tokenizer, asked.stops)
                found.append(AnswerJob(request, text, inbox.outbox(), watched=asked.report.tree))
        return found

    def submit(self, asked: Asked, jobs: Sequence[AnswerJob]) -> None:
        """Lets jobs wait for rows. Raises ApiError where too many wait."""
        lane = PLAIN if asked.report.plain or DRAFTED not in self.scheduler.lanes else DRAFTED
        try:
            self.scheduler.submit(lane, jobs)
        except QueueFull as error:
            headers = {"retry-after": str(RETRY_SECONDS)}
            raise ApiError(429, f"{error}: try again", code="queue_full", type=LIMITED, headers=headers) from error
        except Stopping as error:
            raise ApiError(503, str(error), type=FAILED, headers={"x-should-retry": "false"}) from error


def make_app(service: Service) -> Starlette:
    """Returns the application; it stops the scheduler's thread when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.scheduler.close(0)
        await run_in_threadpool(service.scheduler.join, 2.0)

    routes = [
        Route("/v1/models", functools.partial(_models, service), methods=["GET"]),
        Route("/v1/models/{name:path}", functools.partial(_model, service), methods=["GET"]),
        Route("/v1/completions", functools.partial(_answer, service, read_completion), methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(_answer, service, read_chat), methods=["POST"]),
        Route("/tokenize", functools.partial(_tokenize, service), methods=["POST"]),
        Route("/metrics", functools.partial(_metrics, service), methods=["GET"]),
        Route("/version", _version, methods=["GET"]),
    ]
    for path, file in page_files(service.limits, DRAFTED in service.scheduler.lanes, service.keyed).items():
        shown = Response(file.content, headers=dict(file.headers), media_type=file.kind)
        routes.append(Route(path, functools.partial(_static, shown), methods=["GET"]))
    handlers: dict[Any, Any] = {
        ApiError: _refused, HTTPException: _unknown, ClientDisconnect: _left, Exception: _failed
    }  # fmt: skip
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


async def _answer(service: Service, read: Read, request: Request) -> Response:
    body = await read_body(request)
    # In another thread, so that a long prompt holds no one up.
    asked, prompts = await run_in_threadpool(_read, service, read, body)
    inbox = Inbox()
    inbox.jobs = service.jobs(asked, prompts, inbox)
    model, show = service.limits.model, functools.partial(_shown, service.models)
    reply = ApiReply(asked, [tokens.tolist() for tokens in prompts], model, service.fingerprint, show)
    service.submit(asked, inbox.jobs)
    if asked.stream:
        return EventStream(answer_events(inbox, reply), inbox.cancel)
    try:
        whole = await while_connected(request.receive, answer_whole(inbox, reply))
    finally:
        inbox.cancel()
    return JSONResponse(whole) if whole is not None else Response(status_code=400)  # for no one


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # for no one


def _read(service: Service, read: Read, body: bytes) -> tuple[Asked, list[np.ndarray]]:
    asked = read(read_object(body), service.limits)
    return asked, service.encode(asked)


def _shown(models: Models, token: int) -> str:
    return models.tokenizer.decode([token], skip_special=False)


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.limits.model, "object": "model", "created": service.created, "owned_by": "jaxspec"}


async def _models(service: Service, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def _model(service: Service, request: Request) -> Response:
    if request.path_params["name"] != service.limits.model:
        raise ApiError(404, "the model does not exist", param="model", code="model_not_found")
    return JSONResponse(_card(service))


async def _tokenize(service: Service, request: Request) -> Response:
    """Tells the ids of a conversation, as vLLM's route of this name does."""
    body = await read_body(request)
    _, (tokens, *_) = await run_in_threadpool(_read, service, read_chat, body)
    return JSONResponse({"tokens": tokens.tolist(), "count": len(tokens), "max_model_len": service.limits.positions})


async def _metrics(service: Service, _: Request) -> Response:
    """Tells the counters of drafts in Prometheus' text form, by vLLM's names."""
    tally = service.scheduler.tally
    by_depth = list(tally.accepted_by_depth)
    lines = [
        f"jaxspec:{DRAFTS} {tally.drafts}",
        f"jaxspec:{DRAFTED_TOKENS} {tally.draft_tokens}",
        f"jaxspec:{ACCEPTED} {sum(by_depth)}",
        *(f'jaxspec:{BY_POSITION}{{position="{depth}"}} {count}' for depth, count in enumerate(by_depth)),
    ]
    return Response("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")


async def _version(_: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _static(shown: Response, _: Request) -> Response:
    return shown


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is no such address", 405: f"{request.method} is not for this address"}
    message = said.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _failed(_: Request, error: Exception) -> Response:
    # Its traceback goes to the log, and to no client.
    return error_response(ApiError(500, "the server failed", type=FAILED))
