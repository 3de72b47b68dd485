"""uvicorn, with a limit of its connections, and an end by a signal that is no error."""

from __future__ import annotations

import logging
import math
import socket

import uvicorn
from starlette.types import ASGIApp

from llm2clip.serving.limits import Limits

logger = logging.getLogger(__name__)

# Longer than clients and load balancers keep an idle connection: they would send into one that is being closed.
KEEP_ALIVE_SECONDS = 75
# Connections beside those of the requests that are allowed at the same time: idle ones, those of /health, and those of
# clients that do not send their request, or do not read their answer. With more, uvicorn answers 503.
SPARE_CONNECTIONS = 1024


class Server(uvicorn.Server):
    """A server of uvicorn whose end by a signal is no error."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        config = uvicorn.Config(
            app, http="h11", lifespan="on", ws="none", access_log=False, log_config=None, log_level="error",
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(limits.timeout),
            limit_concurrency=limits.max_connections + SPARE_CONNECTIONS,
        )  # fmt: skip
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("Stopping: finishing %d requests", len(self.server_state.tasks))
        await super().shutdown(sockets)
        # uvicorn raises the signal again, which would end the process as if it had not stopped in order.
        self._captured_signals.clear()
