"""What stands before the endpoints: token, size and time of a request, its end, and errors that nobody expected."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2clip.serving.limits import MAX_INPUTS, Limits
from llm2clip.serving.metrics import Metrics
from llm2clip.serving.requests import ApiError
from llm2clip.serving.worker import log_error

CLIENT_GONE = 499
OPEN_PATHS = ("/health",)
PATHS = ("/v1/embeddings", "/v1/models", "/search", "/health", "/metrics")


class Guard:
    """An ASGI application that protects another one.

    Args:
        app: The endpoints.
        token: What clients have to send as `Authorization: Bearer TOKEN`; None for nothing.
        hosts: Names of this server that requests may have as `Host`, in lower case; None for any. A page in a browser
            can give its own name this machine's address, and would then read what only this machine may.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        hosts: Collection[str] | None,
    ) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self._token = None if token is None else token.encode()
        self._max_body = int(limits.max_body_mb * 1e6)
        self._open_requests, self._open_bytes = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), CLIENT_GONE
        body, size, is_read = bytearray(), 0, False
        # A server that has enough to do is alive.
        is_counted = scope["path"] not in OPEN_PATHS

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._open_requests += is_counted
        try:
            self._check(scope, is_counted)
            async with asyncio.timeout(self.limits.timeout):
                is_read = await self._read(receive, body)
                if is_read:
                    content, size = bytes(body), len(body)
                    body.clear()
                    await self._answer(scope, receive, counted, content)
        except (ApiError, TimeoutError) as error:
            if status == CLIENT_GONE:
                refusal = error if isinstance(error, ApiError) else self._too_slow(is_read)
                await refusal.response()(scope, receive, counted)
        except Exception as error:
            log_error(error)
            if status == CLIENT_GONE:
                await ApiError(500, "The server failed.", "internal_error").response()(scope, receive, counted)
        finally:
            self._open_requests -= is_counted
            self._open_bytes -= size + len(body)
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - start)

    def _check(self, scope: Scope, is_counted: bool) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower().rsplit(":", 1)
            if (":".join(host) if host[-1].endswith("]") else host[0]) not in self.hosts:
                raise ApiError(403, "The Host of the request is not this server.", "wrong_host")
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._token):
                challenge = {"WWW-Authenticate": "Bearer"}
                message = "The token is missing or wrong; send it as `Authorization: Bearer TOKEN`."
                raise ApiError(401, message, "invalid_api_key", headers=challenge)
        if is_counted and self._open_requests > self.limits.max_connections:
            raise _busy("The server has too many requests at the same time.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise self._too_large(int(length[:20]))

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Read the whole request, so that its end and its size are known; returns whether the client is still there.

        Raises:
            ApiError: It is too large (413), or all together are (503).
        """
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            body += part
            self._open_bytes += len(part)
            if len(body) > self._max_body:
                raise self._too_large(len(body))
            if self._open_bytes > self.limits.max_waiting * self._max_body:
                raise _busy("The server has too much to read at the same time.")
            more = message.get("more_body", False)
        # Millions of values, which no allowed request has, would be read for a second, in which nobody is answered.
        if (commas := body.count(b",")) > self.limits.max_request_tokens + 2 * MAX_INPUTS:
            most = f"a request of {self.limits.max_request_tokens:,} tokens has (max_request_tokens)."
            raise ApiError(413, f"The body has {commas:,} commas, more than {most}", "too_large")
        return True

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Call the endpoint, as long as the client waits."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else {"type": "http.disconnect"}

        answer: asyncio.Future[Any] = asyncio.ensure_future(self.app(scope, replay, send))
        gone: asyncio.Future[Any] = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    def _too_large(self, size: int) -> ApiError:
        most = f"at most {self.limits.max_body_mb:g} are allowed (max_body_mb); send fewer inputs."
        message = f"The body has at least {size / 1e6:.1f} MB, but {most}"
        return ApiError(413, message, "too_large", headers={"Connection": "close"})

    def _too_slow(self, is_read: bool) -> ApiError:
        seconds = f"{self.limits.timeout:g} seconds"
        if is_read:
            return ApiError(504, f"The request took more than {seconds}; send fewer inputs.", "timeout")
        message = f"The request took more than {seconds} to arrive."
        return ApiError(408, message, "too_slow", headers={"Connection": "close"})


def _busy(message: str) -> ApiError:
    return ApiError(503, f"{message} Try again later.", "overloaded", headers={"Retry-After": "1"})
