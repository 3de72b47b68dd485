"""uvicorn, with an end for clients that do not send, or do not read."""

from __future__ import annotations

import logging
import math
import socket
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llm2clip.serving.limits import Limits

logger = logging.getLogger(__name__)

# Longer than clients and load balancers keep an idle connection: they would send into one that is being closed.
KEEP_ALIVE_SECONDS = 75
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Server(uvicorn.Server):
    """A server of uvicorn that closes connections which stand still, and whose end by a signal is no error."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        config = uvicorn.Config(
            app, http="h11", lifespan="on", ws="none", access_log=False, log_config=None, log_level="error",
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(limits.timeout + limits.read_timeout),
        )  # fmt: skip
        super().__init__(config)
        self.read_timeout = limits.read_timeout
        self._stalled: dict[Any, float] = {}

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self.close_stalled()
        return await super().on_tick(counter)

    def close_stalled(self) -> None:
        """Close connections that have sent a part of their headers, or not read an answer, for `read_timeout`."""
        now = time.monotonic()
        stalled = {}
        connections: Any = self.server_state.connections
        for connection in connections:
            cycle, transport = connection.cycle, connection.transport
            unread = transport.get_write_buffer_size()
            is_idle = connection.timeout_keep_alive_task is not None
            is_answering = cycle is not None and not cycle.response_complete
            if not unread and (is_idle or is_answering):
                continue
            key = (connection, cycle, unread)
            stalled[key] = self._stalled.get(key, now)
            if now - stalled[key] > self.read_timeout and unread:
                transport.abort()
            elif now - stalled[key] > self.read_timeout and not transport.is_closing():
                transport.write(TOO_SLOW)
                transport.close()
        self._stalled = stalled

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("Stopping: finishing %d requests", len(self.server_state.tasks))
        await super().shutdown(sockets)
        # uvicorn raises the signal again, which would end the process as if it had not stopped in order.
        self._captured_signals.clear()
