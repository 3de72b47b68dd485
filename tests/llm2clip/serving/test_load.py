"""Many clients, slow clients, and clients that go: none is lost, mixed up, or harmed by another."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import httpx
import numpy as np
import psutil
import pytest
import torch

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import encode_texts
from llm2clip.models.embeddings import require_finite_rows
from llm2clip.serving import server as server_module
from llm2clip.serving.limits import Limits
from llm2clip.serving.worker import BatchWorker
from tests.llm2clip.serving.conftest import SECRET, Serve, data_url, embed, logged, png, raw
from tests.modeling_llm2clip.awkward_images import picture

CLIENTS = 60


class Gate:
    """What embeds the texts of a batch, but when the test lets it; it remembers its batches.

    Args:
        change: Changes the rows of texts.
    """

    def __init__(self, change: Callable[[Sequence[str], torch.Tensor], torch.Tensor]) -> None:
        self.change, self.permits, self.entered = change, threading.Semaphore(0), threading.Event()
        self.batches: list[list[str]] = []

    def open(self, batches: int = 10**6) -> None:
        """Let so many batches through."""
        self.permits.release(batches)

    def __call__(self, tokenized: Any, texts: Sequence[str], width: int) -> torch.Tensor:
        self.batches.append(list(texts))
        self.entered.set()
        assert self.permits.acquire(timeout=30)
        return self.change(texts, encode_texts(tokenized, texts, width))


@contextmanager
def gated(
    serve: Serve,
    encoder: Encoder,
    change: Callable[[Sequence[str], torch.Tensor], torch.Tensor] = lambda texts, rows: rows,
    **limits: Any,
) -> Iterator[tuple[httpx.Client, Gate, Callable[..., Future[httpx.Response]]]]:
    """Serve behind a closed gate; yields a client, the gate, and a function that sends in the background.

    The model counts as fast, although its batches wait for the gate.
    """
    gate = Gate(change)
    with (
        mock.patch("llm2clip.serving.worker.encode_texts", gate),
        mock.patch("llm2clip.serving.turns.TURN_SECONDS", math.inf),
        ThreadPoolExecutor() as pool,
    ):
        client = serve(encoder, limits=Limits(**limits))
        try:
            yield client, gate, partial(pool.submit, embed, client)
        finally:
            gate.open()


LONG = [f"a text of a long list, number {row}" for row in range(400)]


def waiting(client: httpx.Client) -> int:
    return int(float(re.findall(r"^llm2clip_waiting (\S+)", client.get("/metrics").text, re.MULTILINE)[0]))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def _many(address: httpx.URL, inputs: list[list[Any]]) -> list[list[np.ndarray]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def one(mine: list[Any]) -> list[np.ndarray]:
            found = []
            for value in mine:
                answer = await client.post("/v1/embeddings", json={"input": value})
                assert answer.status_code == 200, answer.text
                found.append(np.array([row["embedding"] for row in answer.json()["data"]]))
            return found

        return await asyncio.gather(*map(one, inputs))


def test_60_clients_at_the_same_time_get_their_own_embeddings(serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder)
    # They have different lengths, and some with an image among them.
    inputs = [
        [
            [f"text {number} of client {one}" + " and more" * (one % 7) for number in range(1 + one % 4)],
            f"client {one}",
        ]
        for one in range(CLIENTS)
    ]
    pictures = {one: picture(30 + one, 40) for one in range(0, CLIENTS, 20)}
    for one, image in pictures.items():
        inputs[one].append({"image": data_url(png(image))})  # type: ignore[arg-type]
    found = asyncio.run(_many(client.base_url, inputs))
    texts = encoder.encode_text([text for several, alone, *_ in inputs for text in (*several, alone)])
    answered = np.concatenate([rows for answers in found for rows in answers[:2]])
    np.testing.assert_allclose(answered, texts, rtol=0, atol=1e-5)
    images = encoder.encode_image([*pictures.values()])
    np.testing.assert_allclose(np.concatenate([found[one][2] for one in pictures]), images, rtol=0, atol=1e-5)
    page = client.get("/metrics").text
    batches = float(re.findall(r'^llm2clip_batch_size_count{kind="text"} (\S+)', page, re.MULTILINE)[0])
    assert batches < 2 * CLIENTS, "requests share batches"


def test_a_small_request_after_a_huge_one_is_answered_after_two_batches(serve: Serve, encoder: Encoder) -> None:
    with gated(serve, encoder) as (client, gate, send):
        long = send(LONG)
        assert gate.entered.wait(20)
        short = send("short")
        until(lambda: waiting(client) == 401)
        gate.open(3)  # one is computed, and one is tokenized
        assert short.result().status_code == 200
        assert not long.done()
        gate.open()
        assert long.result().status_code == 200
    assert len(gate.batches) > 5
    assert [place for place, batch in enumerate(gate.batches) if "short" in batch] == [2]
    assert [text for batch in gate.batches for text in batch if text != "short"] == LONG


def test_texts_are_tokenized_a_part_at_a_time_in_a_thread_of_their_own(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, int]] = []

    def recorded(name: str) -> Callable[[Sequence[str]], Any]:
        original = getattr(encoder, name)

        def call(texts: Sequence[str]) -> Any:
            seen.append((name, threading.current_thread().name, sum(map(len, texts))))
            return original(texts)

        return call

    for name in ("text_lengths", "tokenized"):
        monkeypatch.setattr(encoder, name, recorded(name))
    client = serve(encoder)
    seen.clear()  # of the warm-up
    assert embed(client, ["a red bus " * 300] * 30).status_code == 200
    assert {thread.rpartition("_")[0] for _, thread, _ in seen} == {"llm2clip-tokens"}
    assert max(characters for *_, characters in seen) <= 16_384
    assert sum(characters for name, _, characters in seen if name == "tokenized") == 90_000


class SlowImages:
    """An encoder's `prepare` and `forward_images` that wait for the test, and remember what they did."""

    def __init__(self, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepared, self.embedded = list[str](), 0
        self.may_prepare, self.may_embed = threading.Event(), threading.Event()
        self.prepare, self.forward = encoder.prepare, encoder.forward_images
        monkeypatch.setattr(encoder, "prepare", self._prepare)
        monkeypatch.setattr(encoder, "forward_images", self._forward)

    def _prepare(self, image: Any, key: str) -> Any:
        self.prepared.append(key)
        assert self.may_prepare.wait(30)
        return self.prepare(image, key)

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self.may_embed.wait(30)
        self.embedded += len(inputs["pixel_values"])
        return self.forward(inputs)


def test_an_image_after_a_request_of_many_is_decoded_after_a_part_of_them(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, slow, image = serve(encoder), SlowImages(encoder, monkeypatch), {"image": data_url(png(picture()))}
    slow.may_embed.set()
    with ThreadPoolExecutor() as pool:
        many = pool.submit(embed, client, [image] * 40)
        until(lambda: len(slow.prepared) == 4)
        one = pool.submit(embed, client, image)
        until(lambda: waiting(client) == 41)
        slow.may_prepare.set()
        assert one.result().status_code == many.result().status_code == 200
    assert slow.prepared.index("input") <= 8
    assert len(slow.prepared) == 41


def test_images_are_decoded_as_the_model_takes_them(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, slow, image = serve(encoder), SlowImages(encoder, monkeypatch), {"image": data_url(png(picture()))}
    slow.may_prepare.set()
    with ThreadPoolExecutor() as pool:
        many = pool.submit(embed, client, [image] * 40)
        until(lambda: len(slow.prepared) == 16)
        time.sleep(0.1)
        assert len(slow.prepared) == 16, "one part waits for the model, and one behind it"
        slow.may_embed.set()
        assert many.result().status_code == 200
    assert (len(slow.prepared), slow.embedded) == (40, 40)


def test_full_queue_refuses_with_the_time_to_wait_and_answers_what_it_accepted(serve: Serve, encoder: Encoder) -> None:
    pixels = picture().width * picture().height
    limits = {"max_request_tokens": 60, "max_pixels": pixels, "max_request_pixels": pixels, "max_waiting": 2}
    with gated(serve, encoder, **limits) as (client, gate, send):
        image = {"image": data_url(png(picture()))}
        accepted = [send([f"{one} {row}" for row in range(10)]) for one in range(4)]
        until(lambda: waiting(client) == 40)
        accepted += [send(image), send(image)]
        until(lambda: waiting(client) == 42)
        for refused in (embed(client, "one more"), embed(client, image)):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
        assert client.get("/health").status_code == 200
        gate.open()
        assert [one.result().status_code for one in accepted] == [200] * 6
        until(lambda: waiting(client) == 0)
        assert embed(client, "one more").status_code == 200


def test_request_beyond_its_time_and_of_a_client_that_has_gone_are_dropped(serve: Serve, encoder: Encoder) -> None:
    with gated(serve, encoder, timeout=1) as (client, gate, _):
        answer = embed(client, LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(httpx.ReadTimeout):
            embed(client, LONG, timeout=0.5)
        until(lambda: waiting(client) == 0)
        assert len(gate.batches) == 1
        gate.open()
        assert embed(client, "next").status_code == 200
        assert gate.batches[1:] == [["next"]]


def test_a_text_without_an_embedding_is_an_error_of_its_client_alone(serve: Serve, encoder: Encoder) -> None:
    def change(texts: Sequence[str], rows: torch.Tensor) -> torch.Tensor:
        rows[[text == SECRET for text in texts]] = torch.nan
        require_finite_rows(rows, lambda row: texts[row], "texts")
        return rows

    with gated(serve, encoder, change) as (client, gate, send):
        first = send("first")
        until(lambda: waiting(client) == 1)
        answers = [send(text) for text in ("before", SECRET, "after")]
        until(lambda: waiting(client) == 4)
        gate.open()
        found = [answer.result() for answer in answers]
        assert any(len(batch) == 3 for batch in gate.batches), "they shared a batch"
    assert [answer.status_code for answer in (first.result(), *found)] == [200, 200, 400, 200]
    assert SECRET not in found[0].text + found[2].text
    assert "NaN" in found[1].json()["error"]["message"]


def test_too_many_requests_at_the_same_time_are_refused_and_the_server_is_alive(
    serve: Serve, encoder: Encoder
) -> None:
    with gated(serve, encoder, max_connections=3) as (client, gate, send):
        accepted = [send(f"{one}") for one in range(2)]
        until(lambda: waiting(client) == 2)
        third = send("third")

        def is_full() -> bool:
            nonlocal third
            if third.done():  # refused, since a question as the one below was being answered
                third = send("third")
            return client.get("/v1/models").status_code == 503

        until(is_full)
        assert embed(client, "fourth").json()["error"]["code"] == "overloaded"
        assert client.get("/health").status_code == 200
        gate.open()
        assert [one.result().status_code for one in (*accepted, third)] == [200] * 3


def test_connections_that_stand_still_are_counted(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 20)
    client = serve(encoder, limits=Limits(max_connections=1))
    assert embed(client, "a").status_code == 200
    still = [raw(client, b"POST /v1") for _ in range(25)]
    until(lambda: embed(client, "a").status_code == 503)
    for connection in still:
        connection.close()
    until(lambda: embed(client, "a").status_code == 200)


def test_failure_of_the_model_quotes_no_client_and_is_seen_by_health_until_the_model_works(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_broken, original = False, encoder.encode_text

    def change(texts: Sequence[str], rows: torch.Tensor) -> torch.Tensor:
        if SECRET in texts or is_broken:
            raise RuntimeError(f"out of memory: {texts}")
        return rows

    with caplog.at_level(logging.DEBUG), gated(serve, encoder, change) as (client, gate, _):
        # The server's own questions go this way.
        monkeypatch.setattr(encoder, "encode_text", lambda texts: change(texts, original(texts)))
        gate.open()
        answer = embed(client, SECRET)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "The model failed.")
        until(lambda: client.get("/health").status_code == 200)  # it was of one input
        is_broken = True
        assert embed(client, "another").status_code == 500
        time.sleep(0.1)
        assert client.get("/health").status_code == 503
        is_broken = False
        until(lambda: client.get("/health").status_code == 200)  # without a request
    lines = logged(caplog)
    assert any("RuntimeError" in line and "encode_texts" in line for line in lines)
    assert SECRET not in "".join(lines)


def test_a_model_that_does_not_come_back_is_seen_by_health(serve: Serve, encoder: Encoder) -> None:
    with gated(serve, encoder, timeout=1) as (client, gate, _):
        assert client.get("/health").status_code == 200
        assert embed(client, "a").status_code == 504
        until(lambda: client.get("/health").status_code == 503)
        gate.open()
        until(lambda: client.get("/health").status_code == 200)
        assert embed(client, "a").status_code == 200


def test_a_thread_that_has_ended_is_seen_by_health_and_by_clients(
    serve: Serve, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(encoder, limits=Limits(timeout=1))
    assert client.get("/health").status_code == 200
    monkeypatch.setattr(BatchWorker, "_measure", lambda *_: 1 / 0)
    assert embed(client, SECRET).status_code == 504
    assert [client.get("/health").status_code, embed(client, "a").status_code] == [503, 503]
    assert any("ZeroDivisionError" in line for line in logged(caplog))
    assert SECRET not in "".join(logged(caplog))


def test_an_input_without_a_direction_is_named(serve: Serve, encoder: Encoder) -> None:
    def change(texts: Sequence[str], rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.tensor([[float(text != SECRET)] for text in texts])

    with gated(serve, encoder, change) as (client, gate, _):
        gate.open()
        error = embed(client, [*"abc", SECRET, "d"]).json()["error"]
        assert (error["param"], error["code"]) == ("input[3]", "not_embeddable")
        assert "zero" in error["message"]
        assert client.get("/health").status_code == 200


def memory_after(client: httpx.Client, requests: int) -> int:
    image = data_url(png(picture(300, 300)))
    for number in range(requests):
        if number % 50 == 0:
            client.post("/v1/embeddings", json={"input": [{"image": image}, "b", {"image": "AAAA"}]})
            client.get(f"/{number}")
        answer = client.post("/v1/embeddings", json={"input": [f"text {number}", "x" * (1 + number % 500)]})
        assert answer.status_code == 200
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_memory_is_flat_over_10_000_requests(serve: Serve, encoder: Encoder) -> None:
    client = serve(encoder)
    before = memory_after(client, 500)
    assert memory_after(client, 10_000) - before < 32 << 20
