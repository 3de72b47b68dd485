"""The Space of the demo runs from its own folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError

from llm2clip.demo.space import write_space
from tests.builders import tiny
from tests.examples.server import open_page, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_space_serves_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "model")
    space = tmp_path / "space"
    write_space(space, str(tmp_path / "model"))
    # The packages of the Space come before the installed ones, as on a machine without them.
    where = subprocess.run(
        [sys.executable, "-c", "import llm2clip.demo.demo as demo; print(demo.__file__)"],
        env={**os.environ, "PYTHONPATH": str(space)}, cwd=space, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(space))
    with served(space / "app.py", folder=space, path=space) as (address, _):
        client = open_page(address, tmp_path, monkeypatch)
        found = client.predict("a camera", api_name="/search")["value"]
        assert len(found) == 12
        picture = handle_file(found[3]["image"])
        again = client.predict(picture, api_name="/search_by_image")["value"]
        assert float(again[0]["caption"].split(" · ")[0]) > 0.99
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
        with pytest.raises(AppError, match=r"broken\.jpg"):
            client.predict(handle_file(broken), api_name="/search_by_image")
        result = client.predict(picture, "a camera\na penguin", "{}", api_name="/classify")
        assert sum(entry["confidence"] for entry in result["confidences"]) == pytest.approx(1)
        with pytest.raises(AppError, match="There is no caption yet"):
            client.predict("  ", api_name="/search")
