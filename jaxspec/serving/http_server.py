"""Uvicorn with a clean end: no more requests, answers finished or cancelled within seconds, every stream ended."""

from __future__ import annotations

import socket

import uvicorn
from starlette.types import ASGIApp

from jaxspec.serving.scheduler import Scheduler

GRACE_SECONDS, LAST_SECONDS = 3.0, 4
"""In which answers may finish after a signal, and after which connections are cut."""
MOST_CONNECTIONS = 256


class DemoServer(uvicorn.Server):
    """Serves an application in front of a scheduler."""

    def __init__(self, app: ASGIApp, scheduler: Scheduler, *, host: str, port: int) -> None:
        # Everything is said, so that packages which happen to be installed change nothing.
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the answers before the connections: uvicorn waits for these."""
        self._scheduler.close(GRACE_SECONDS)
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The port that is listened at, once it is."""
        return self.servers[0].sockets[0].getsockname()[1]
