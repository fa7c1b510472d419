"""Uvicorn with a clean end: no more requests, answers finished or cancelled within seconds, every stream ended."""

from __future__ import annotations

import logging
import socket

import uvicorn
from starlette.types import ASGIApp

from jaxspec.serving.scheduler import Scheduler

GRACE_SECONDS, LAST_SECONDS = 3.0, 4
"""In which answers may finish after a signal, and after which connections are cut."""
MOST_CONNECTIONS = 256
log = logging.getLogger("jaxspec.serve")


class DemoServer(uvicorn.Server):
    """Serves an application in front of a scheduler, at a socket that it is given."""

    def __init__(self, app: ASGIApp, scheduler: Scheduler, *, name: str) -> None:
        # Everything is said, so that packages which happen to be installed change nothing.
        super().__init__(
            uvicorn.Config(
                app,
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
        self._scheduler, self._name = scheduler, name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and tells where."""
        await super().startup(sockets)
        host = self.servers[0].sockets[0].getsockname()[0]
        place = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        log.info(
            "%s is served for demonstration and evaluation: a page at %s, clients at %sv1", self._name, place, place
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the answers before the connections: uvicorn waits for these."""
        self._scheduler.close(GRACE_SECONDS)
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The port that is listened at, once it is."""
        return self.servers[0].sockets[0].getsockname()[1]
