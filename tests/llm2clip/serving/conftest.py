"""A server in this process, on a free port, and the model behind it."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from llm2clip import create_app, load_encoder
from llm2clip.encoders import Encoder
from llm2clip.serving.addresses import listen
from llm2clip.serving.limits import Limits
from llm2clip.serving.server import Server

Serve = Callable[..., httpx.Client]
SECRET = "my secret diary"


@contextmanager
def serving(encoder: Encoder, index: Any = None, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """Serve a model in a thread of this process; yields the address."""
    limits = limits or Limits()
    with listen("127.0.0.1", 0) as listener:
        server = Server(create_app(encoder, index, limits=limits, **options), limits)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def encoder(saved_model: Path) -> Encoder:
    return load_encoder(str(saved_model))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a model until the test ends; returns a client."""
    with ExitStack() as stack:

        def start(encoder: Encoder, *arguments: Any, **options: Any) -> httpx.Client:
            address = stack.enter_context(serving(encoder, *arguments, **options))
            return stack.enter_context(httpx.Client(base_url=address, timeout=60))

        yield start


@pytest.fixture(scope="module")
def client(encoder: Encoder) -> Iterator[httpx.Client]:
    with serving(encoder, name="tiny") as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def embed(client: httpx.Client, texts: Any, **options: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"input": texts}, **options)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith(("llm2clip", "uvicorn"))]


def raw(client: httpx.Client, content: bytes) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(content)
    return connection
