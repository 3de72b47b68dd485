"""`make check-sets` against a loopback Hub: what it says of copies that are as published, and of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from llm2clip.evaluation.benchmarks.rows import Row
from tests import check_sets
from tests.llm2clip.evaluation.benchmarks.classification_samples import tar_of, webdataset
from tests.llm2clip.evaluation.benchmarks.samples import picture, write
from tests.loopback_hub import File, LoopbackHub, Repo

TEXTS = [["a dog", " a cat"], ["x", "y"]]
ROW = {"title": "A", "protocol": "retrieval", "license": "a", "source": "a"}
FILES = {"layout": "files", "reader": "urban1k", "needs": ["a"]}


def checked(hub: LoopbackHub, data: Path, files: dict[str, Any], read: dict[str, Any], name: str) -> str:
    repo = Repo("owner/copy", "dataset")
    contents = {path: File(text if isinstance(text, bytes) else text.encode(), False) for path, text in files.items()}
    revision = repo.commit("main", contents, "data")
    hub.repos["dataset", "owner/copy"] = repo
    candidate = {"repo": "owner/copy", "short_revision": revision[:7], "files": ["test/*", "*.txt"], "read": read}
    row = Row.model_validate(ROW | {"read": FILES, "candidate": candidate})
    return "\n".join(check_sets.check(name, row, data, 10))


@pytest.fixture(autouse=True)
def _commits(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_repo_commits(api: HfApi, repo: str, repo_type: str) -> list[Any]:
        class Commit:
            def __init__(self, commit_id: str) -> None:
                self.commit_id = commit_id

        return [Commit(sha) for sha in reversed(hub.repos[repo_type, repo].commits)]

    monkeypatch.setattr(HfApi, "list_repo_commits", list_repo_commits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (TEXTS, "as published"),
        ([TEXTS[0], ["y", "x"]], "1 differ in the order of captions or in outer blanks alone"),
        ([TEXTS[0], ["x", "z"]], "1 differ, as"),
        (TEXTS[:1], "1 images or classes instead of 2"),
    ],
)
def test_captions_are_compared_with_the_published_file(
    changed: list[list[str]], said: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    write(tmp_path / "flickr30k_test.json", [{"image": "1.jpg", "caption": texts} for texts in TEXTS])
    members = {}
    for number, texts in enumerate(changed):
        members |= {f"s{number}.png": picture(number), f"s{number}.txt": "\n".join(texts).encode()}
    files = {"test/0.tar": tar_of(members), "test/nshards.txt": "1", "dataset_type.txt": "retrieval"}
    shown = checked(hub, tmp_path, files, {"layout": "webdataset", "answer": "txt"}, "flickr30k")
    assert "1,000" in shown
    assert f"{said}" in shown.splitlines()[-1]


def test_labels_are_compared_with_the_folders_of_the_published_set(hub: LoopbackHub, tmp_path: Path) -> None:
    write(tmp_path / "imagenet-a/n01498041/1.jpg", picture(1))
    files = webdataset({"s0.png": picture(1), "s0.cls": b"0"}) | {"classnames.txt": "stingray\n"}
    shown = checked(hub, tmp_path, files, {"layout": "webdataset", "answer": "cls"}, "imagenet-a")
    assert "1 images instead of 7,500" in shown
    assert shown.endswith("as published")


def test_a_beginning_of_no_commit_is_an_error(hub: LoopbackHub) -> None:
    hub.repos["dataset", "owner/copy"] = Repo("owner/copy", "dataset")
    with pytest.raises(ValueError, match="0 of 1 commits of owner/copy begin with 0000000"):
        check_sets.whole_revision("owner/copy", "0000000")
