"""The kind of a repository is read from its config files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.utils.repos import RepoKind, hub_ids, inspect_repo, is_hub_id

KINDS = {
    RepoKind.JOINT: {"model_type": "llm2clip", "architectures": ["LLM2CLIPModel"]},
    RepoKind.VISION_HALF: {"model_type": "llm2clip", "architectures": ["LLM2CLIPVisionModelWithProjection"]},
    RepoKind.TEXT_TOWER: {"model_type": "llm2clip_text_model"},
    RepoKind.OTHER: {"model_type": "llama"},
}


def save(folder: Path, config: dict | None, adapter: bool = False) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("config", "is_adapter", "kind"),
    [
        *((config, False, kind) for kind, config in KINDS.items()),
        (None, True, RepoKind.ADAPTER),
        (KINDS[RepoKind.TEXT_TOWER], True, RepoKind.TEXT_TOWER),
    ],
)
def test_kind_follows_from_the_config_files(
    config: dict | None, is_adapter: bool, kind: RepoKind, tmp_path: Path
) -> None:
    repo = inspect_repo(save(tmp_path, config, is_adapter))
    assert (repo.kind, repo.is_adapter, repo.config) == (kind, is_adapter, config or {})


def test_wrong_kind_is_refused_with_what_was_found(tmp_path: Path) -> None:
    repo = inspect_repo(save(tmp_path, KINDS[RepoKind.OTHER]))
    with pytest.raises(ValueError, match=r"is not an LLM2CLIP model: .*'llama'"):
        repo.require(RepoKind.JOINT)
    assert repo.require(RepoKind.JOINT, RepoKind.OTHER) is repo


def test_a_missing_model_is_named_where_the_hub_cannot_be_reached() -> None:
    with pytest.raises(OSError, match="there is no model runs/typo here, nor can it be read from the Hub"):
        inspect_repo("runs/typo")


def test_existing_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/local").mkdir(parents=True)
    assert is_hub_id("owner/name-1.0")
    assert not is_hub_id("/absolute/path")
    assert hub_ids("owner/local", "owner/name", None, "") == ["owner/name"]
