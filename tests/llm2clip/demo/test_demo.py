"""The demo command: its settings, and errors before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from llm2clip import cli
from modeling_llm2clip import LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.builders.early_errors import assert_found_early
from tests.llm2clip.demo.conftest import Serve, bundled_images, index_bundled
from tests.llm2clip.encoders import models


@pytest.mark.parametrize(
    "options", [("--model",), ("--model", "MODEL", "--compare"), ("--write-space", "space", "--model")]
)
def test_models_of_one_side_are_refused(
    options: tuple[str, ...],
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_vision(tmp_path / "plain")
    LLM2CLIPVisionModelWithProjection.from_pretrained(saved_model).save_pretrained(tmp_path / "half")
    given = [str(saved_model) if option == "MODEL" else option for option in options]
    plain = "contains model_type '" if "--write-space" in options else "is not a model of images and texts"
    for name, message in (("plain", plain), ("half", "contains a vision half of an LLM2CLIP model")):
        assert cli.main(["demo", *given, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_uploads_are_limited(serve: Serve, saved_model: Path, tmp_path: Path) -> None:
    answers: list[int] = []

    def visit(address: str) -> None:
        for size in (10_000, 1_000_001):
            answers.append(httpx.post(f"{address}gradio_api/upload", files={"files": bytes(size)}).status_code)

    for number in range(2):
        bundled_images(2).decode(number).save(tmp_path / f"{number}.png")
    serve(visit, "--model", str(saved_model), "--data", str(tmp_path), "--max-upload-mb", "1")
    assert answers == [200, 413]


def test_an_index_is_served_beside_a_model_that_embeds_its_images(
    serve: Serve, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the client makes a folder in it for each picture

    def visit(address: str) -> None:
        client = Client(address, download_files=tmp_path / "downloads", verbose=False)
        answers = client.predict("a camera", api_name="/search")
        found.extend([shown["caption"].partition(" · ")[2] for shown in answer["value"]] for answer in answers)

    models.save_transformers("clip", tmp_path / "clip")
    serve(visit, "--index", index_bundled(tmp_path / "index", saved_model), "--compare", str(tmp_path / "clip"))
    captions = next(bundled_images(6).batches([]))["caption"].to_pylist()
    assert [sorted(names) for names in found] == [sorted(captions)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1, "that of the model to compare"


def test_mistakes_are_found_before_libraries_are_imported(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    mistakes = {
        "there is no model in runs/quickstart/llm2clip": ["demo"],
        "there is no model ./no/such": ["demo", "--model", "./no/such"],
        "there is no model /no/such": ["demo", "--model", str(tmp_path), "--compare", "/no/such"],
        "there is no index in /no/such": ["demo", "--index", "/no/such"],
        "index is a and data is b": ["demo", "--index", "a", "--data", "b"],
        "compare is a, but a Space has one model": ["demo", "--write-space", "space", "--compare", "a"],
        "host is 0.0.0.0, but a Space has": ["demo", "--write-space", "space", "--host", "0.0.0.0"],
        "overwrite is True, but only --write-space": ["demo", "--overwrite"],
        "split is train, but it is for --data": ["demo", "--split", "train"],
        "max_upload_mb must be at least 1": ["demo", "--max-upload-mb", "0"],
        "port must be from 1 to 65535, not 99999": ["demo", "--port", "99999"],
        f"port {port}: Address already in use; choose another": ["demo", "--model", str(tmp_path), "--port", port],
    }
    with taken:
        assert_found_early(mistakes, tmp_path)
