"""What a config writes: no local folders, wherever the program runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from modeling_llm2clip import LLM2CLIPTextModel
from tests.modeling_llm2clip import tiny


def test_a_config_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.joint_config()
    config.text_config.decoder_config._name_or_path = "some/llm"
    expected = config.to_dict()
    assert expected["text_config"]["decoder_config"]["_name_or_path"] == "some/llm"
    (tmp_path / "some" / "llm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert config.to_dict() == expected


def test_folders_that_look_like_hub_ids_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.text_model().decoder.save_pretrained("some/llm")
    LLM2CLIPTextModel.from_decoder("some/llm").save_pretrained("runs/tower")
    configs = [LLM2CLIPTextModel.from_decoder("some/llm").config, AutoConfig.from_pretrained("runs/tower")]
    configs.append(LLM2CLIPTextModel.from_pretrained("runs/tower").config)
    monkeypatch.chdir("/")
    for config in configs:
        fields = config.to_dict()
        assert "_name_or_path" not in {**fields["decoder_config"], **fields}
