"""What a config writes: no local folders, wherever the program runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import tiny


def test_local_folders_are_not_written_to_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where they look like ids of the Hub, which stay wherever the program runs."""
    hub = tiny.joint_config()
    hub.text_config.decoder_config._name_or_path = "some/llm"
    expected = hub.to_dict()
    assert expected["text_config"]["decoder_config"]["_name_or_path"] == "some/llm"
    monkeypatch.chdir(tmp_path)
    tiny.text_model().decoder.save_pretrained("some/llm")
    assert hub.to_dict() == expected
    LLM2CLIPTextModel.from_decoder("some/llm").save_pretrained("runs/tower")
    configs = [LLM2CLIPTextModel.from_decoder("some/llm").config, AutoConfig.from_pretrained("runs/tower")]
    monkeypatch.chdir("/")
    for config in configs:
        fields = config.to_dict()
        assert "_name_or_path" not in {**fields["decoder_config"], **fields}
