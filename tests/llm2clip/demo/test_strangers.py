"""What strangers may send to the demo, through the addresses that its page uses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from llm2clip.utils.logs import OBEYED
from tests.llm2clip.demo.conftest import Serve, bundled_images

ESCAPES = "/\x1b]0;title\x07\x1b[31m"


def file(path: str | None) -> dict[str, Any]:
    """A file, as the page sends it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def ask(address: str, name: str, *data: Any) -> str:
    """Send a request as the page does; returns what the demo answers, which is an event with JSON."""
    begun = httpx.post(f"{address}gradio_api/call/{name}", json={"data": data}).json()
    return httpx.get(f"{address}gradio_api/call/{name}/{begun['event_id']}", timeout=60).text


def upload(address: str, name: str, content: bytes) -> str:
    """Upload a file; returns its path on the server."""
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)})
    return str(answer.json()[0])


@pytest.fixture
def serve_picture(serve: Serve, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve a demo of one picture, beside whose folder there is another one."""
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    (tmp_path / "pictures").mkdir()
    for path in ("pictures/a.png", "secret.png"):
        bundled_images(1).decode(0).save(tmp_path / path)
    return lambda visit: serve(visit, "--model", str(saved_model), "--data", str(tmp_path / "pictures"))


def test_no_file_or_address_is_read_and_no_escape_is_printed(
    serve_picture: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fetched, answers = [], []

    async def fetch(url: str, cache_dir: str) -> str:
        fetched.append(url)
        return str(tmp_path / "secret.png")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    secret = str(tmp_path / "secret.png")

    def visit(address: str) -> None:
        for url in ("http://127.0.0.1:9/a.png", "https://example.invalid/a.png"):
            for name, data in (("heat_map", ("a",)), ("search_by_image", ()), ("classify", ("a\nb", "{}"))):
                answers.append(ask(address, name, file(url), *data))
            answers.append(ask(address, "search", file(url)))
        answers.append(ask(address, "heat_map", {**file(None), "url": "http://127.0.0.1:9/a.png"}, "a"))
        assert ["addresses are not fetched" in answer for answer in answers] == [True] * 9
        for path in (secret, f"file://{secret}", os.path.relpath(secret), "/etc/passwd", ESCAPES, "/no/such"):
            answers.append(ask(address, "heat_map", file(path), "a"))
            answers.append(ask(address, "search", file(path)))
            assert httpx.get(f"{address}gradio_api/file={quote(path)}").status_code in (403, 404)
        traversal = upload(address, "../../../secret.png", (tmp_path / "secret.png").read_bytes())
        assert "complete" in ask(address, "heat_map", file(traversal), "a"), "an upload is what the others are not"
        answers.append(ask(address, "heat_map", file(f"{Path(traversal).parent}/../../{Path(secret).name}"), "a"))

    serve_picture(visit)
    assert fetched == []
    assert [answer for answer in answers if not answer.startswith("event: error")] == []
    shown = "".join(capfd.readouterr())
    assert "\\u001b]0;title" in shown, "the traceback that quotes it"
    assert not OBEYED.search(shown)


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
