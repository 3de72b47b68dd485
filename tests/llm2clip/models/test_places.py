"""Names of models that cannot exist are refused without a library or the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.models.places import is_repo, require_model_place


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


@pytest.mark.parametrize("name", ["./model", "/no/such", "runs/a/model", "b.py:f"])
def test_what_cannot_be_a_model_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        require_model_place(name)
