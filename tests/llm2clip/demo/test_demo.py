"""The demo command: its settings, and errors before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio_client import Client

from llm2clip import cli
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as run_index
from modeling_llm2clip import LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.builders.early_errors import assert_found_early
from tests.llm2clip.demo.conftest import bundled_images
from tests.llm2clip.encoders import models


@pytest.mark.parametrize(
    "options", [("--model",), ("--model", "MODEL", "--compare"), ("--write-space", "space", "--model")]
)
def test_models_of_one_side_are_refused(
    options: tuple[str, ...],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_vision(tmp_path / "plain")
    LLM2CLIPVisionModelWithProjection.from_pretrained(model_folder).save_pretrained(tmp_path / "half")
    given = [str(model_folder) if option == "MODEL" else option for option in options]
    plain = "contains model_type '" if "--write-space" in options else "is not a model of images and texts"
    for name, message in (("plain", plain), ("half", "contains a vision half of an LLM2CLIP model")):
        assert cli.main(["demo", *given, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_uploads_are_limited(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int] = []

    def visit(page: gr.Blocks) -> None:
        for size in (10_000, 1_000_001):
            answers.append(httpx.post(f"{page.local_url}gradio_api/upload", files={"files": bytes(size)}).status_code)

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    for number in range(2):
        bundled_images(2).decode(number).save(tmp_path / f"{number}.png")
    options = ["--data", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), "--max-upload-mb", "1"]
    assert cli.main(["demo", "--model", str(model_folder), *options]) == 0
    assert answers == [200, 413]


def test_an_index_is_served_beside_a_model_that_embeds_its_images(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []

    def visit(page: gr.Blocks) -> None:
        client = Client(page.local_url, download_files=tmp_path / "downloads", verbose=False)
        answers = client.predict("a camera", api_name="/search")
        found.extend([shown["caption"].partition(" · ")[2] for shown in answer["value"]] for answer in answers)

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    models.save_transformers("clip", tmp_path / "clip")
    data = str(bundled_images(6).source["path"])
    index = {"output_dir": str(tmp_path / "index"), "model": str(model_folder), "num_workers": 0, "split": "test[:6]"}
    run_index(IndexConfig(folder=data, **index))
    options = ["--compare", str(tmp_path / "clip"), "--cache-dir", str(tmp_path / "cache")]
    assert cli.main(["demo", "--index", index["output_dir"], *options]) == 0
    captions = next(bundled_images(6).batches())["caption"].to_pylist()
    assert [sorted(names) for names in found] == [sorted(captions)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1, "that of the model to compare"


def test_mistakes_are_found_before_libraries_are_imported(tmp_path: Path) -> None:
    mistakes = {
        "there is no model in runs/quickstart/llm2clip": [],
        "there is no model ./no/such": ["--model", "./no/such"],
        "there is no model /no/such": ["--model", str(tmp_path), "--compare", "/no/such"],
        "there is no index in /no/such": ["--index", "/no/such"],
        "index is a and data is b": ["--index", "a", "--data", "b"],
        "compare is a, but a Space has one model": ["--write-space", "space", "--compare", "a"],
        "max_upload_mb must be at least 1": ["--max-upload-mb", "0"],
    }
    commands = {message: ["demo", *options] for message, options in mistakes.items()}
    assert_found_early(commands, tmp_path)
