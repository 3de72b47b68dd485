"""R20: embeddings over HTTP for 32 and 200 clients, and beside two with the largest requests, from a student."""

from __future__ import annotations

import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.environments import ENVIRONMENTS, python_of
from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

REQUESTS = 512
INFINITY = "infinity-emb"
# What llm2clip serve allows by default.
MAX_INPUTS, MAX_TOKENS, MAX_BYTES = 2048, 262_144, 32_000_000
# Longest that one request in a hundred may take beside the largest ones.
MAX_SECONDS = 2


def _ours(folder: Path, port: int) -> tuple[list[str], str]:
    return [sys.executable, "-m", "llm2clip", "serve", str(folder), "--port", str(port)], "/v1/embeddings"


def _infinity(folder: Path, port: int) -> tuple[list[str], str]:
    program = str(Path(python_of("infinity")).with_name("infinity_emb"))
    options = ["--engine", "torch", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    return [program, "v2", "--model-id", str(folder), *options, "--log-level", "error"], "/embeddings"


def _post(connection: HTTPConnection, path: str, text: str) -> bytes:
    connection.request("POST", path, json.dumps({"input": [text]}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path} answered {answer.status}: {content.decode()[:500]}")
    return content


def _largest_body() -> bytes:
    """Return the largest body that is allowed: of texts as long as the model reads, and of spaces between them."""
    from transformers import AutoTokenizer

    from benchmarks.small_llama import TOKENIZER, WORDS
    from benchmarks.student_inputs import MAX_LENGTH

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rng, texts, tokens = random.Random(1), list[str](), 0
    while len(texts) < MAX_INPUTS and tokens < MAX_TOKENS:
        words = rng.choices(WORDS.split(), k=MAX_LENGTH)
        while (length := len(tokenizer(" ".join(words))["input_ids"])) > MAX_LENGTH:
            words = words[: len(words) * MAX_LENGTH // length - 1]
        texts.append(" ".join(words))
        tokens += length
    body = json.dumps({"input": texts[:-1]}).encode()
    return body[:-2] + b" " * (MAX_BYTES - len(body)) + body[-2:]


@contextmanager
def _flood(port: int, path: str, clients: int, body: bytes) -> Iterator[None]:
    """Send the same request again and again, as so many clients, of which none waits for the end of its last one."""
    connections = [HTTPConnection("127.0.0.1", port, timeout=300) for _ in range(clients)]
    is_over = threading.Event()

    def send(connection: HTTPConnection) -> None:
        while not is_over.is_set():
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                connection.getresponse().read()
            except (HTTPException, OSError):
                connection.close()

    threads = [threading.Thread(target=send, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    time.sleep(2 * bool(threads))  # until their first requests are read
    try:
        yield
    finally:
        is_over.set()
        for connection in connections:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def _served(
    server: Callable[[Path, int], tuple[list[str], str]],
    tokens: int | None,
    requests: int,
    clients: int,
    flooding: int,
) -> Work:
    """Start a server, and send it requests of one text each, of so many tokens or of many lengths.

    Args:
        flooding: Clients beside the others that send the largest requests, over and over.
    """
    import numpy as np

    from benchmarks.small_llama import captions, new_folder
    from benchmarks.student_inputs import queries, write_student

    texts = captions(requests) if tokens is None else queries(requests, tokens)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, body = new_folder(), _largest_body() if flooding else b""
    command, path = server(write_student(folder / "student"), port)
    # Otherwise infinity reports to its makers.
    environment = {**os.environ, "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    def work() -> Outcome:
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers, milliseconds = [b""] * len(texts), [0.0] * len(texts)
        for row in range(len(texts)):
            waiting.put(row)

        def client(_: int) -> None:
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            while True:
                try:
                    row = waiting.get_nowait()
                except queue.Empty:
                    return connection.close()
                start = time.perf_counter()
                answers[row] = _post(connection, path, texts[row])
                milliseconds[row] = 1000 * (time.perf_counter() - start)

        with _flood(port, path, flooding, body), ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            list(pool.map(client, range(clients)))
            seconds = time.perf_counter() - start
        rows = np.array([json.loads(answer)["data"][0]["embedding"] for answer in answers])
        p50, p99 = np.percentile(milliseconds, (50, 99)).tolist()
        if flooding and p99 > 1000 * MAX_SECONDS:
            raise RuntimeError(f"one request in a hundred took {p99:.0f} ms beside the largest requests.")
        return Outcome({"embeddings": rows}, {"ms/request": 1000 * seconds / len(texts), "ms p50": p50, "ms p99": p99})

    weakref.finalize(work, process.kill)
    while True:
        try:
            _post(HTTPConnection("127.0.0.1", port), path, texts[0])
            return work
        except ConnectionRefusedError:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}: {' '.join(command)}") from None
            time.sleep(0.2)


def contests(device: str) -> list[Contest]:
    def contest(title: str, tokens: int | None, note: str, clients: int = 32, requests: int = REQUESTS) -> Contest:
        servers = {"ours": _ours, INFINITY: _infinity}
        fields = {"tokens": tokens, "requests": requests, "clients": clients, "flooding": 0}
        contestants = {name: Contestant(partial(_served, server, **fields)) for name, server in servers.items()}
        goals = (Goal(INFINITY, "ms/request", 1 / 1.2),)
        title = f"{clients} clients, {requests} requests of {title}"
        return Contest(title, contestants, goals, {"embeddings": 1e-3}, note=note)

    note = (
        "A student with 6 layers of width 384; the clients are threads of one process on the same machine. "
        f"{ENVIRONMENTS['infinity'][0]} with its defaults. Milliseconds are those that pass, divided by the requests."
    )
    flooded = partial(_served, _ours, tokens=12, requests=2000, clients=198, flooding=2)
    return [
        contest("12 tokens", 12, note),
        contest("3 to 200 words", None, "The same; texts are cut at 128 tokens, and most are short."),
        contest("12 tokens", 12, "The same, of which p50 and p99 are in docs/serve.md.", clients=200, requests=4000),
        Contest(
            "198 clients, 2000 requests of 12 tokens beside 2 clients with the largest requests",
            {"ours": Contestant(flooded)},
            (),
            rounds=3,
            note=f"The run fails if one request in a hundred takes more than {MAX_SECONDS} s.",
        ),
    ]


ROW = Row("R20", "embeddings over HTTP", contests)
