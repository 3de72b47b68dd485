"""`llm2clip push`: checks before the upload, error messages, and the pushed model in the hands of its users."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from llm2clip import cli
from llm2clip.hub.cards.card import CARD, split_card
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_MANIFEST
from tests.damage import flip
from tests.llm2clip.hub.conftest import REPO, content, upload
from tests.loopback_hub import READ_TOKEN, TOKEN, LoopbackHub
from tests.modeling_llm2clip import tiny


def test_push_uploads_every_file_of_the_folder_unchanged_except_the_card(hub: LoopbackHub, built: Path) -> None:
    before = content(built)
    result = upload(hub, built, private=True, commit_message="Hello")
    repo = hub.repo(REPO)
    assert repo.private
    assert repo.messages[-1] == "Hello"
    arrived = repo.files()
    assert set(arrived) == {
        path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file() and path.name[0] != "."
    }
    assert result["files"] == len(arrived)
    assert all(value == (built / name).read_bytes() for name, value in arrived.items() if name != CARD)
    assert repo.commits[repo.branches["main"]]["model.safetensors"].lfs
    data, text = split_card(arrived[CARD].decode())
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    assert f'from_pretrained("{REPO}"' in text
    assert str(built) not in text
    assert content(built) == before


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (False, REPO, r"token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN \(HTTP 401"),
        ("hf_wrong", REPO, r"token is missing or not valid.*HTTP 401"),
        (READ_TOKEN, REPO, r"needs write access to the repo and its organization \(HTTP 403"),
        (TOKEN, "someone-else/tiny", r"needs write access to the repo and its organization \(HTTP 403"),
        (TOKEN, "tester/a--b", r"'tester/a--b' is not a valid repo name"),
        (TOKEN, "tiny", r"'tiny' is not a repo name: write OWNER/NAME"),
        (TOKEN, "tester/no spaces", r"is not a repo name: write OWNER/NAME"),
    ],
)
def test_error_for_token_or_repo_name_names_the_next_step(
    token: str | bool, repo: str, message: str, hub: LoopbackHub, built: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        upload(hub, built, token, repo_id=repo)
    assert not hub.repos


@pytest.mark.parametrize(
    ("status", "path", "message"),
    [
        (400, "/commit/", r"the Hub rejects this request: correct what it names .* and push again \(HTTP 400"),
        (402, "/commit/", r"plan of the account does not cover this: free storage, or change the plan .* \(HTTP 402"),
        (412, "/commit/", r"the repo changed during this push: push again \(HTTP 412"),
        (413, "/commit/", r"a file is too large for the Hub: .*save its weights in shards .* \(HTTP 413"),
        (451, "/commit/", r"the Hub refuses this request \(HTTP 451"),
        (409, "/commit/", r"changed or is being created at the same time: push again \(HTTP 409"),
        (429, "/commit/", r"too many requests: wait some minutes and push again \(HTTP 429"),
        (404, "/preupload/", r"the repo does not exist, or the token has no access to it \(HTTP 404"),
    ],
)
def test_error_for_http_status_names_the_next_step(
    status: int, path: str, message: str, hub: LoopbackHub, built: Path
) -> None:
    hub.fail_next("POST", path, status, times=20)
    with pytest.raises(ValueError, match=message):
        upload(hub, built)
    assert not hub.repo(REPO).files()


def test_local_folder_whose_path_looks_like_a_hub_id_is_pushed(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / REPO)
    upload(hub, Path(REPO))
    assert "model.safetensors" in hub.repo(REPO).files()


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is not a folder; `llm2clip build MODEL"),
        (remove("config.json"), "lacks config.json; build it first: llm2clip"),
        (remove("model.safetensors"), "lacks *.safetensors"),
        (remove("modeling_llm2clip.py"), "lacks modeling_llm2clip.py"),
        (remove(CARD), "lacks README.md"),
        (remove("tokenizer.json"), "lacks tokenizer.json"),
        (
            remove("processor_config.json", "preprocessor_config.json"),
            "lacks processor_config.json or preprocessor_config.json",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors has 5000 bytes instead"),
        (lambda folder: os.truncate(folder / "config.json", 30), "config.json' is not a valid JSON file"),
        (
            lambda folder: (folder / "config.json").write_text('{"a": 1}'),
            "it contains model_type None. Build it first",
        ),
        (lambda folder: (folder / CARD).write_text("---\nlicense: [\n---\n"), "README.md is not valid YAML"),
    ],
)
def test_incomplete_folder_is_refused_before_the_upload(
    spoil: Callable[[Path], object], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    assert cli.main(["push", str(model), REPO, "--no-check"]) == 2
    assert message in capsys.readouterr().err


def test_a_reference_to_a_local_llm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_apart(tmp_path)
    (tmp_path / "clip" / CARD).write_text("A model.")
    assert cli.main(["push", str(tmp_path / "clip"), REPO]) == 2
    assert "which others cannot load; `llm2clip build` bundles it" in capsys.readouterr().err


def test_what_the_hub_says_of_the_metadata_is_passed_on(hub: LoopbackHub, model: Path) -> None:
    card = (model / CARD).read_text()
    (model / CARD).write_text(card.replace("license: apache-2.0", "license: Apache-2.0"))
    with pytest.raises(ValueError, match="license"):
        upload(hub, model)
    assert not hub.repo(REPO).files()


def test_folder_that_is_not_what_was_built_is_refused(
    hub: LoopbackHub, built: Path, model: Path, tmp_path: Path
) -> None:
    listed = read_json(built / MODEL_MANIFEST)["files"]
    files = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert set(listed) == files - {CARD, "LICENSE", "example.png", MODEL_MANIFEST, FOLDER_MANIFEST}
    assert {"model.safetensors", "modeling_llm2clip.py", "config.json", "1_Normalize/config.json"} <= set(listed)
    (model / CARD).write_text((model / CARD).read_text() + "\nWhat its author adds.\n")
    changed = ["model.safetensors", "processing_llm2clip.py", "tokenizer_config.json"]
    for names in ([*changed, MODEL_MANIFEST], changed):
        for name in names:
            with flip(model / name), pytest.raises(ValueError, match=r"is not what was written|damaged"):
                upload(hub, model)
        assert not hub.repos
        (model / FOLDER_MANIFEST).unlink(missing_ok=True)  # it stays with whoever built the folder
    upload(hub, model)
    assert hub.repo(REPO).files()[MODEL_MANIFEST] == (built / MODEL_MANIFEST).read_bytes()
    arrived = tmp_path / "arrived"
    snapshot_download(REPO, endpoint=hub.url, token=False, local_dir=arrived)
    assert cli.main(["verify", str(arrived)]) == 0
    with flip(arrived / "model.safetensors"):
        assert cli.main(["verify", str(arrived)]) == 2
    # A folder without one does not leave that of other weights there.
    (model / MODEL_MANIFEST).unlink()
    upload(hub, model)
    assert MODEL_MANIFEST not in hub.repo(REPO).files()
