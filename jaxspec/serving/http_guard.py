"""The door of the server: which requests come in, their bodies, and the headers that every response carries."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxspec.serving.api_errors import DENIED, ApiError

MOST_BYTES = 2**20
"""Of a body."""
MOST_DISCARDED = 8 * MOST_BYTES
"""Of a longer body, read and dropped: a client that still sends does not see a refusal, but a broken connection."""
BODY_SECONDS = 10.0
"""In which a body arrives."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WILDCARDS = ("0.0.0.0", "::", "")
KEYED = ("/v1", "/tokenize")
"""Beginnings of the addresses that need the key; the page, and counters for who watches the server, do not."""
SECURE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
API_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy of responses that are no page."""
CLOSE = {"connection": "close"}


def is_loopback(host: str) -> bool:
    """Returns whether a server bound to this host is reached from its own machine alone."""
    return host in LOOPBACK


def error_response(error: ApiError) -> Response:
    """Returns the response of an error."""
    return Response(json.dumps(error.body), error.status, error.headers, media_type="application/json")


class Guard:
    """An ASGI application in front of another. It refuses other hosts' names, other pages, and clients without the key.

    A page that a browser has loaded from elsewhere cannot reach the server: its `Origin` is foreign, and a name that
    was made to point here (DNS rebinding) is no allowed host.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], key: str | None = None) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers with the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ({"content-security-policy": API_POLICY} | SECURE).items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        if not self._is_ours(host):
            raise ApiError(403, "this server does not answer under that host name: see --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "pages of other origins may not use this server")
        if self._key is not None and path.startswith(KEYED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the time of a refusal says nothing about the key.
            same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key)
            if scheme.lower() != "bearer" or not same:
                asked = {"www-authenticate": "Bearer"}
                raise ApiError(401, "give the server's key", code="invalid_api_key", type=DENIED, headers=asked)

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isdecimal() else host
        name = name.removeprefix("[").removesuffix("]")
        if name in self._hosts:
            return True
        # Bound to all addresses, it is reached by any of them; an address, unlike a name, points nowhere else.
        return bool(self._hosts & set(WILDCARDS)) and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(request: Request) -> bytes:
    """Returns the body of a request. Raises ApiError for one of another type, too long, or too slow."""
    kind, *parameters = [word.strip().lower() for word in request.headers.get("content-type", "").split(";")]
    charsets = {word for word in parameters if word.startswith("charset=")}
    if kind != "application/json" or charsets - {"charset=utf-8", 'charset="utf-8"'}:
        # A form of another page can be posted without asking, with types of forms alone.
        raise ApiError(415, "the content type must be application/json, in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed")
    too_long = ApiError(413, f"the body is longer than {MOST_BYTES} bytes", headers=CLOSE)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > MOST_DISCARDED:
        raise too_long
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_DISCARDED:
                    break
                body += part if size <= MOST_BYTES else b""
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", headers=CLOSE) from None
    if size > MOST_BYTES:
        raise too_long
    return bytes(body)
