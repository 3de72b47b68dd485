"""A served demo that answers request after request holds what it held before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import handle_file

from tests.examples.server import open_page, served
from tests.modeling_llm2clip import tiny
from tests.soak.measure import Soak, cycle

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

REQUESTS, WARM_UP = 500, 100
CAPTIONS = [f"picture {number} of a dog" for number in range(7)]


def test_five_hundred_requests_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tiny.save(tmp_path / "model")
    pictures = [tmp_path / "pictures" / f"{number}.png" for number in range(5)]
    pictures[0].parent.mkdir()
    for number, path in enumerate(pictures):
        tiny.IMAGES[number % 2].rotate(33 * number, expand=True).save(path)
    lines = [json.dumps({"file_name": path.name, "caption": CAPTIONS[number]}) for number, path in enumerate(pictures)]
    (pictures[0].parent / "metadata.jsonl").write_text("\n".join(lines))
    arguments = ("demo", "--model", tmp_path / "model", "--data", pictures[0].parent, "--split", "train")
    with served("-m", "llm2clip", *arguments, folder=tmp_path) as (address, process):
        page = open_page(address, tmp_path, monkeypatch)
        files = [handle_file(str(path)) for path in pictures]

        def request(number: int) -> Any:
            caption, file = cycle(CAPTIONS)(number), cycle(files)(number)
            if number % 5 < 3:
                return page.predict(caption, api_name="/search")
            if number % 5 == 3:
                return page.predict(file, "\n".join(CAPTIONS), "{}", api_name="/classify")
            return page.predict(file, api_name="/search_by_image")

        found = Soak.of(request, REQUESTS, WARM_UP, process)
    print(found.report("demo"))
    assert found.faults() == []
