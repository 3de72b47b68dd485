"""Errors of the demo command before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import httpx
import pytest

from llm2clip import cli
from llm2clip.demo.gallery import Gallery
from modeling_llm2clip import LLM2CLIPVisionModelWithProjection
from tests.llm2clip.demo.conftest import bundled_images
from tests.modeling_llm2clip import tiny


@pytest.mark.parametrize(
    "options", [("--model",), ("--model", "MODEL", "--compare"), ("--write-space", "space", "--model")]
)
def test_other_models_are_refused_before_loading(
    options: tuple[str, ...],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Gallery, "open", refuse)
    monkeypatch.chdir(tmp_path)
    tiny.save_vision(tmp_path / "plain")
    LLM2CLIPVisionModelWithProjection.from_pretrained(model_folder).save_pretrained(tmp_path / "half")
    given = [str(model_folder) if option == "MODEL" else option for option in options]
    for name, message in (("plain", "contains model_type '"), ("half", "contains a vision half of an LLM2CLIP model")):
        assert cli.main(["demo", *given, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_uploads_are_limited(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert cli.main(["demo", "--model", str(model_folder), "--max-upload-mb", "0"]) == 2
    assert "max_upload_mb must be at least 1, not 0" in capsys.readouterr().err
