"""Strangers: what is neither answered, read nor logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from llm2clip.encoders import Encoder
from llm2clip.serving.limits import Limits
from tests.llm2clip.serving.conftest import SECRET, Serve, embed, logged, raw


def test_successful_requests_leave_no_line_in_the_log(
    serve: Serve, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llm2clip"), caplog.at_level(logging.INFO, "uvicorn"):
        client = serve(encoder, token="my-token")
        headers = {"Authorization": "Bearer my-token"}
        assert embed(client, SECRET, headers=headers).status_code == 200
        assert embed(client, {"image": SECRET}, headers=headers).status_code == 400
        assert client.get(f"/{SECRET}", headers=headers).status_code == 404
    assert not [line for line in logged(caplog) if SECRET in line or "my-token" in line]


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic my-token", "Bearer my-token2"])
def test_without_the_token_only_health_answers(given: str | None, serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder, token="my-token")
    headers = {} if given is None else {"Authorization": given}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert embed(client, "a", headers=headers).status_code == 401
    assert client.get("/health").status_code == 200
    assert embed(client, "a", headers={"Authorization": "bearer my-token"}).status_code == 200


def test_page_of_another_site_cannot_read_by_a_name_of_its_own(serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder, hosts={"127.0.0.1", "localhost", "[::1]"})
    cases = {"evil.example": 403, "evil.example:8000": 403, "": 403, "[::1]:8000": 200, "LOCALHOST:8000": 200}
    for host, status in cases.items():
        assert embed(client, "a", headers={"Host": host}).status_code == status, host
    assert embed(client, "a").status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_body_is_refused_before_it_is_read(is_chunked: bool, serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder, limits=Limits(max_body_mb=1))
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100_000
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"} | ({} if is_chunked else {"Content-Length": str(10**8)})
    try:
        answer = client.post("/v1/embeddings", content=body(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    except (httpx.WriteError, httpx.ReadError):
        pass  # the connection is closed while the client still sends
    assert sent < 10**8 / 2
    assert embed(client, "a").status_code == 200


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_slow_client_is_told_and_does_not_stay(serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder, limits=Limits(timeout=1))
    slow = [raw(client, HEAD + b"Content-Length: 100\r\n\r\n{") for _ in range(20)]
    assert embed(client, "a").status_code == 200, "others need not wait for it"
    for connection in slow:
        with connection:
            answer = b"".join(iter(partial(connection.recv, 65536), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
