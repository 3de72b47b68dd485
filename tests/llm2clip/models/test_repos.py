"""The kind of a repository is read from its config files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2clip.models.repos import RepoKind, hub_ids, inspect_repo, is_hub_id

KINDS = {
    RepoKind.JOINT: {"model_type": "llm2clip", "architectures": ["LLM2CLIPModel"]},
    RepoKind.VISION_HALF: {"model_type": "llm2clip", "architectures": ["LLM2CLIPVisionModelWithProjection"]},
    RepoKind.TEXT_TOWER: {"model_type": "llm2clip_text_model"},
    RepoKind.OTHER: {"model_type": "llama"},
}


@pytest.mark.parametrize(
    ("config", "is_adapter", "kind"),
    [*((config, False, kind) for kind, config in KINDS.items()), (None, True, RepoKind.ADAPTER)],
)
def test_kind_follows_from_the_config_files(
    config: dict[str, Any] | None, is_adapter: bool, kind: RepoKind, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if is_adapter:
        (tmp_path / "adapter_config.json").write_text("{}")
    repo = inspect_repo(tmp_path)
    assert (repo.kind, repo.is_adapter, repo.config) == (kind, is_adapter, config or {})
    assert repo.require(kind, RepoKind.EMBEDDING_MODEL) is repo
    with pytest.raises(ValueError, match=r"is not an embedding model.*: it contains"):
        repo.require(RepoKind.EMBEDDING_MODEL)


def test_a_missing_model_is_named_where_the_hub_cannot_be_reached() -> None:
    with pytest.raises(OSError, match="there is no model runs/typo here, nor can it be read from the Hub"):
        inspect_repo("runs/typo")


def test_existing_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/local").mkdir(parents=True)
    assert is_hub_id("owner/name-1.0")
    assert not is_hub_id("/absolute/path")
    assert hub_ids("owner/local", "owner/name", None, "") == ["owner/name"]
