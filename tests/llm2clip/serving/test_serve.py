"""The command: whom it lets in, what it refuses to start with, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from llm2clip import cli
from llm2clip.encoders import Encoder
from llm2clip.models.places import model_name
from llm2clip.serving.addresses import is_loopback, listen
from llm2clip.serving.serve import ServeConfig, read_token
from tests.builders.early_errors import assert_found_early
from tests.documents.reading import ROOT, blocks
from tests.llm2clip.serving.conftest import data_url, png, serving

JSON = {"Content-Type": "application/json"}

# A model of another library that takes its time for every batch.
SLOW_MODEL = """
import time
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

class Slow(torch.nn.Module):
    def encode_text(self, tokens):
        time.sleep(0.1 * (len(tokens) > 1))
        return torch.nn.functional.one_hot(tokens[:, 0], 100).float() + 0.1

    def encode_image(self, pixels):
        return pixels.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 100)

def preprocess(image):
    return pil_to_tensor(image.resize((8, 8)))

def tokenizer(texts):
    return torch.tensor([[len(text) % 100] + [0] * 99 for text in texts])

def load():
    return Slow(), preprocess, tokenizer
"""


@contextmanager
def command(folder: Path, *arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `llm2clip serve` on a free port; yields the process and the address that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "training", ROOT))), **variables}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm2clip", "serve", *arguments, "--port", "0"],
            cwd=folder, env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"Listening on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The line is printed when the model is loaded, a moment before connections are accepted.
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            client.get(f"{found[1]}/health")
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def slow_model(tmp_path: Path) -> str:
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    return "slow.py:load"


def test_sigterm_finishes_what_was_accepted_and_ends_without_an_error(tmp_path: Path, slow_model: str) -> None:
    headers = {"Authorization": "Bearer my-token"}
    with (
        command(tmp_path, slow_model, "--token-env", "TOKEN", TOKEN="my-token") as (process, address),
        httpx.Client(base_url=address, timeout=60, headers=headers) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def embed(length: int) -> httpx.Response:
            return client.post("/v1/embeddings", json={"input": ["x" * length] * 40})

        answers = [pool.submit(embed, length) for length in range(1, 9)]
        while "llm2clip_waiting 320.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for length, answer in enumerate(answers, 1):
            assert answer.result().status_code == 200
            rows = [row["embedding"] for row in answer.result().json()["data"]]
            assert np.argmax(rows, axis=1).tolist() == [length] * 40
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            embed(1)
    assert "my-token" not in (tmp_path / "server.log").read_text()


LARGEST = {
    "texts": ["a red bus " * 19] * 2048,
    "images": [{"image": data_url(png(Image.new("L", (5000, 5000))))}] * 10,
    "body": ["a red bus" + " " * 15_600] * 2040,
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_198_clients_are_answered_beside_the_largest_requests_of_two_others(tmp_path: Path, saved_model: Path) -> None:
    async def ask(address: str, process: psutil.Process) -> tuple[int, int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            image = data_url(png(Image.new("RGB", (300, 200), "red")))

            async def small(number: int) -> list[int]:
                found = []
                for turn in range(5):
                    inputs: Any = f"client {number}, text {turn}" if number % 10 or turn else {"image": image}
                    found.append((await client.post("/v1/embeddings", json={"input": inputs})).status_code)
                return found

            async def large() -> list[int]:
                return [
                    (await client.post("/v1/embeddings", content=body, headers=JSON)).status_code for body in bodies
                ]

            health: set[int] = set()
            peak, is_over = 0, False

            async def watch() -> None:
                nonlocal peak
                while not is_over:
                    peak = max(peak, process.memory_info().rss)
                    health.add((await client.get("/health")).status_code)
                    await asyncio.sleep(0.05)

            await asyncio.gather(*map(small, range(20)))
            idle, bodies = process.memory_info().rss, [json.dumps({"input": one}) for one in LARGEST.values()]
            assert 31e6 < max(map(len, bodies)) < 32e6
            watching = asyncio.create_task(watch())
            found = await asyncio.gather(*(large() for _ in range(2)), *map(small, range(198)))
            is_over = True
            await watching
            assert health == {200}
            assert {status for several in found for status in several} == {200}
            return idle, peak

    # Other programs may run on this machine: what counts is that all is answered. R20 measures how fast.
    with command(tmp_path, str(saved_model), "--timeout", "300") as (process, address):
        idle, peak = asyncio.run(ask(address, psutil.Process(process.pid)))
    assert peak < 2 * idle


def test_the_code_of_the_page_gets_the_scores_of_the_model(
    encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(encoder, name="llm2clip") as address:
        (code,) = [content for language, content in blocks("docs/serve.md") if "OpenAI(" in content]
        code = code.replace("http://127.0.0.1:8000", address).replace("photo.jpg", str(ROOT / "docs/demo.png"))
        exec(code, {})
    printed = [float(score) for score in capsys.readouterr().out.split()[-2:]]
    texts = encoder.encode_text(["a red squirrel", "a steam train"])
    scores = texts @ encoder.encode_image(str(ROOT / "docs/demo.png"))[0]
    np.testing.assert_allclose(printed, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: model"),
        (["MODEL", "--host", "0.0.0.0"], "others could use the server: give them a token"),
        (["MODEL", "--token-env", "NO_TOKEN"], "the environment variable NO_TOKEN has no token"),
        (["MODEL", "--token-file", "spaces"], "spaces has no token"),
        (["MODEL", "--token-file", "missing"], "missing"),
        (["MODEL", "--token-env", "A", "--token-file", "b"], "choose one"),
        (["MODEL", "--port", "70000"], "port must be from 0 to 65535"),
        (["MODEL", "--timeout", "0"], "timeout is 0.0, which is too small"),
        (["MODEL", "--max-request-pixels", "5"], "max_pixels (25,000,000) exceeds max_request_pixels (5)"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], reason: str, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spaces").write_text("two words\n")
    port = [] if "--port" in arguments else ["--port", "0"]
    model = [str(saved_model) if argument == "MODEL" else argument for argument in arguments]
    assert cli.main(["serve", *model, *port]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llm2clip serve: error: ")
    assert reason in error
    assert "Traceback" not in error


def test_mistakes_in_names_are_found_before_anything_large_is_imported(tmp_path: Path) -> None:
    mistakes = {
        "there is no model ./no/such": ["serve", "./no/such"],
        "there is no index in nowhere": ["serve", str(tmp_path), "--index", "nowhere"],
    }
    assert_found_early(mistakes, tmp_path, "numpy", "fastapi")


def test_taken_port_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm2clip.encoders.load_encoder", lambda *arguments: pytest.fail("it was loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve", "no-model", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_two_servers_that_start_at_once_cannot_have_one_port() -> None:
    with listen("127.0.0.1", 0) as first:  # which has not begun to accept connections
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            listen("127.0.0.1", port)


def test_token_is_read_without_the_line_that_it_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("abc-123\n")
    assert read_token(ServeConfig(model="m", token_file=str(tmp_path / "token"))) == "abc-123"
    monkeypatch.setenv("MY_TOKEN", "abc-456")
    assert read_token(ServeConfig(model="m", token_env="MY_TOKEN")) == "abc-456"
    assert read_token(ServeConfig(model="m")) is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "", "10.0.0.1", "my-host", "127.0.0.1.example.org")],
)
def test_only_loopback_addresses_are_private(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("/home/me/my.py:load", "my.py:load"),
        ("open_clip:ViT-B-32//home/me/a.pt", "open_clip:ViT-B-32"),
        (str(ROOT / "docs"), "docs"),
    ],
)
def test_name_for_clients_has_no_folders(place: str, name: str) -> None:
    assert model_name(place) == name
