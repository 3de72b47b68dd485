"""Names of models that cannot exist are refused without a library or the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.utils.model_places import is_repo, require_model_place


@pytest.mark.parametrize(
    "name",
    ["owner/name", "gpt2", "runs/model", "open_clip:ViT-B-32/openai", "open_clip:ViT-B-32//no/such.pt", "a.py:f"],
)
def test_what_may_be_a_model_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    Path("runs").mkdir()
    require_model_place(name)
    assert is_repo(name) == (":" not in name)
    require_model_place(str(tmp_path))


@pytest.mark.parametrize("name", ["./model", "/no/such", "runs/a/model", "../owner/name", "b.py:f"])
def test_what_cannot_be_a_model_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        require_model_place(name)


def test_a_mistyped_folder_is_named_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    require_model_place("owner/name")
    assert caplog.text == ""
    require_model_place("runs/typo")
    assert "there is no folder runs/typo; looking for a model of this name on the Hub" in caplog.text
