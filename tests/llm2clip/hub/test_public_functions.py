"""`convert_checkpoint`, `build_folder` and `push_folder`: the commands as functions of the public API."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm2clip
from llm2clip.hub.source_model import SourceModel
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import OPENAI
from tests.loopback_hub import TOKEN, LoopbackHub


def test_checkpoint_is_converted_built_and_pushed_by_functions_alone(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # test_build.py covers the process that loads the built folder.
    monkeypatch.setattr(SourceModel, "compare", lambda *_: 0.0)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    converted = llm2clip.convert_checkpoint(
        Path(checkpoints.original_pt(OPENAI, tmp_path / "model.pt")),
        tmp_path / "converted",
        model_config=checkpoints.model_config(OPENAI, tmp_path),
        text_model=checkpoints.llm_of(OPENAI, tmp_path / "llm"),
    )
    assert converted["written"] == str(tmp_path / "converted")
    built = llm2clip.build_folder(tmp_path / "converted", tmp_path / "built", license="mit")
    assert built["written"] == str(tmp_path / "built")
    pushed = llm2clip.push_folder(tmp_path / "built", "tester/tiny", check=False)
    assert pushed["repo"] == f"{hub.url}/tester/tiny"
    arrived = hub.repo("tester/tiny").files()
    assert arrived["model.safetensors"] == (tmp_path / "built" / "model.safetensors").read_bytes()


def test_unknown_setting_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no field 'text_modle'; did you mean 'text_model'"):
        llm2clip.convert_checkpoint("model.pt", tmp_path / "out", text_modle="llm")
    with pytest.raises(ValueError, match="has no field 'licence'; did you mean 'license'"):
        llm2clip.build_folder(tmp_path, tmp_path / "out", licence="mit")
    with pytest.raises(ValueError, match="has no field 'privat'; did you mean 'private'"):
        llm2clip.push_folder(tmp_path, "tester/tiny", privat=True)
