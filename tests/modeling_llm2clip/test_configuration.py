"""What a config writes: no local folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel

from tests.builders import tiny


def test_local_folders_are_not_written_to_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tiny.joint_config()
    hub.text_config.decoder_config._name_or_path = "an/llm"
    assert hub.to_dict()["text_config"]["decoder_config"]["_name_or_path"] == "an/llm"
    monkeypatch.chdir(tmp_path)
    tiny.text_model().decoder.save_pretrained("some/llm")
    tower = tiny.wrapped(AutoModel.from_pretrained("some/llm"))
    tower.save_pretrained("runs/tower")
    for config in (tower.config, AutoConfig.from_pretrained("runs/tower")):
        fields = config.to_dict()
        assert "_name_or_path" not in {**fields["decoder_config"], **fields}
