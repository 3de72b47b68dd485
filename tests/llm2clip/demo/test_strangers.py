"""What strangers may send to the demo, through the addresses that its page uses."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from llm2clip.command_line.logs import CONTROL_CHARACTERS
from llm2clip.demo.gallery import Gallery
from tests.llm2clip.demo.conftest import Serve, bundled_images

# Each request by `httpx` alone would read all certificates first.
HTTP = httpx.Client(timeout=60)
ESCAPES = "/\x1b]0;title\x07\x1b[31m"
NOT_UPLOADED = "nothing but an uploaded picture is opened"
TEXTS_OF: dict[str, tuple[str, ...]] = {"heat_map": ("a",), "classify": ("a\nb", "{}"), "search_by_image": ()}


def file(path: str | None) -> dict[str, Any]:
    """A file, as the page sends it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def ask(address: str, name: str, *data: Any) -> str:
    """Send a request as programs do; returns what the demo answers, which is an event with JSON."""
    begun = HTTP.post(f"{address}gradio_api/call/{name}", json={"data": data}).json()
    return HTTP.get(f"{address}gradio_api/call/{name}/{begun['event_id']}").text


def ask_event(address: str, event: int, *data: Any) -> str:
    """Send a request as the page does, to events that have no name too; returns the stream of answers."""
    session = {"session_hash": os.urandom(8).hex()}
    HTTP.post(f"{address}gradio_api/queue/join", json={"fn_index": event, "data": data, **session})
    return HTTP.get(f"{address}gradio_api/queue/data", params=session).text


def upload(address: str, name: str, content: bytes) -> str:
    """Upload a file; returns its path on the server."""
    answer = HTTP.post(f"{address}gradio_api/upload", files={"files": (name, content)})
    return str(answer.json()[0])


@pytest.fixture
def serve_picture(serve: Serve, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve a demo of one picture, beside whose folder there is another one."""
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    (tmp_path / "pictures").mkdir()
    for path in ("pictures/a.png", "secret.png"):
        bundled_images(1).decode(0).save(tmp_path / path)
    return lambda visit: serve(visit, "--model", str(saved_model), "--data", str(tmp_path / "pictures"))


@pytest.fixture
def unvisited() -> Iterator[int]:
    """A port of this machine to which nothing may connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def not_uploads(folder: Path, visitors: Path, port: int) -> list[Any]:
    """Files of the machine, addresses and other values, in place of an uploaded picture."""
    secret, url = str(folder / "secret.png"), f"http://127.0.0.1:{port}/a.png"
    for place in (folder, visitors):
        (place / "link.png").symlink_to(secret)
        os.mkfifo(place / "fifo.png")
    inline = f"data:image/png;base64,{base64.b64encode(Path(secret).read_bytes()).decode()}"
    paths = [
        secret, os.path.relpath(secret), f"{visitors}/../../{folder.name}/secret.png", f"{folder}/pictures/a.png",
        f"{folder}/link.png", f"{visitors}/link.png", f"{folder}/fifo.png", f"{visitors}/fifo.png", str(visitors),
        f"{visitors}/no.png", "/etc/passwd", "/dev/zero", "/no/such", "", "\0", "a" * 5000, ESCAPES, url,
        url.replace("http", "HTTP"), url.replace("http", "ftp"), "https://example.invalid/a.png",
        f"simplecache::{url}", f"file://{secret}", f"FILE://{secret}", f"local://{secret}", inline,
        inline.replace("data", "DATA", 1),
    ]  # fmt: skip
    others = [
        {"url": url},
        {**file(None), "url": url},
        {"path": [secret]},
        {"a": file(url)},
        secret,
        [file(url)],
        True,
    ]
    return [*({"path": path} for path in paths), *map(file, paths), *others]


def test_only_uploaded_pictures_are_opened(
    serve_picture: Serve, tmp_path: Path, unvisited: int, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.png"

    def visit(address: str) -> None:
        place = upload(address, "../../../secret.png", secret.read_bytes())
        for name, texts in TEXTS_OF.items():
            assert NOT_UPLOADED in ask(address, name, {"path": str(secret)}, *texts)
            assert ask(address, name, file(place), *texts).startswith("event: complete")
        for value in not_uploads(tmp_path, Path(place).parents[1], unvisited):
            assert NOT_UPLOADED in ask(address, "heat_map", value, "a"), value
        for path in (str(secret), os.path.relpath(secret), "/etc/passwd", "/no/such"):
            assert HTTP.get(f"{address}gradio_api/file={quote(path)}").status_code in (403, 404)
        ask(address, "classify", file(place), ESCAPES)  # too few

    serve_picture(visit)
    shown = "".join(capfd.readouterr())
    assert "\\u001b]0;title" in shown, "the traceback that quotes it"
    assert not CONTROL_CHARACTERS.search(shown)


def test_texts_are_texts_and_examples_those_of_the_page(serve_picture: Serve, tmp_path: Path, unvisited: int) -> None:
    secret, url = str(tmp_path / "secret.png"), f"http://127.0.0.1:{unvisited}/a.png"
    values: list[Any] = [
        ["a"],
        [secret],
        [url],
        [file(url)],
        {"path": secret},
        file(secret),
        file(url),
        None,
        99,
        True,
    ]

    def visit(address: str) -> None:
        picture = file(upload(address, "a.png", Path(secret).read_bytes()))
        for value in values:
            for name, data in {
                "search": (value,), "heat_map": (picture, value), "classify": (picture, value, "{}"),
            }.items():  # fmt: skip
                assert "has to be a text" in ask(address, name, *data), value
            assert "has to be a text" in ask(address, "classify", picture, "a\nb", value), value
        events = HTTP.get(f"{address}config").json()["dependencies"]
        choosers = [
            one["id"] for one in events if one["targets"][0][1] == "click" and one["api_visibility"] != "public"
        ]
        assert len(choosers) == 3
        for event in choosers:
            assert '"success":true' in ask_event(address, event, 0)
            for value in (-1, 0.5, "0", *values):
                assert "There is no such example" in ask_event(address, event, value), value

    serve_picture(visit)


def test_the_model_has_one_queue(serve_picture: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, most = threading.Semaphore(0), []
    embed = Gallery._embed

    def slow_embed(gallery: Gallery, query: Any) -> Any:
        busy.release()
        most.append(busy._value)
        time.sleep(0.2)
        busy.acquire()
        return embed(gallery, query)

    def visit(address: str) -> None:
        picture = file(upload(address, "a.png", (tmp_path / "secret.png").read_bytes()))
        monkeypatch.setattr(Gallery, "_embed", slow_embed)
        asked = [(ask, name, picture, *texts) for name, texts in TEXTS_OF.items()] + [(ask, "search", "a")]
        events = HTTP.get(f"{address}config").json()["dependencies"]
        private = [one for one in events if one["api_visibility"] != "public"]
        asked += [(ask_event, one["id"], "a" if one["targets"][0][1] == "load" else 0) for one in private]
        with ThreadPoolExecutor() as threads:
            answers = list(threads.map(lambda request: request[0](address, *request[1:]), asked))
        assert most == [1] * len(answers)
        direct = HTTP.post(f"{address}gradio_api/run/search", json={"data": ["a"]})
        assert direct.status_code == 404, "past the queue"

    serve_picture(visit)


def test_what_visitors_upload_is_private_and_ends_with_the_demo(serve_picture: Serve, tmp_path: Path) -> None:
    places: list[Path] = []

    def visit(address: str) -> None:
        place = Path(upload(address, "a.png", (tmp_path / "secret.png").read_bytes()))
        found = json.loads(ask(address, "search_by_image", file(str(place))).partition("data: ")[2])
        places.extend([place, Path(found[0]["value"][0]["image"]["path"])])
        assert all(path.is_file() for path in places)
        (folder,) = {path.parents[1] for path in places}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    serve_picture(visit)
    assert [path for path in places if path.exists()] == []
    assert "GRADIO_TEMP_DIR" not in os.environ
