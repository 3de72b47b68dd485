"""`llm2clip push`: checks before the upload, error messages, and the pushed model in the hands of its users."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm2clip import cli
from llm2clip.hub.cards.card import CARD, split_card
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import MODEL_MANIFEST
from modeling_llm2clip import LLM2CLIPModel
from tests.damage import flip
from tests.llm2clip.hub.conftest import REPO, consume, content, push_by_command, upload
from tests.loopback_hub import READ_TOKEN, TOKEN, LoopbackHub
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import CAPTIONS, IMAGES


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
    spoil: Callable[[Path], object], message: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "copy"))
    spoil(folder)
    assert cli.main(["push", str(folder), REPO, "--no-check"]) == 2
    assert message in capsys.readouterr().err


def test_a_reference_to_a_local_llm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_apart(tmp_path)
    (tmp_path / "clip" / CARD).write_text("A model.")
    assert cli.main(["push", str(tmp_path / "clip"), REPO]) == 2
    assert "which others cannot load; `llm2clip build` bundles it" in capsys.readouterr().err


def test_what_the_hub_says_of_the_metadata_is_passed_on(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "copy"))
    card = (folder / CARD).read_text()
    (folder / CARD).write_text(card.replace("license: apache-2.0", "license: Apache-2.0"))
    with pytest.raises(ValueError, match="license"):
        upload(hub, folder)
    assert not hub.repo(REPO).files()


def test_folder_that_is_not_what_was_built_is_refused(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    listed = read_json(built / MODEL_MANIFEST)["files"]
    assert set(listed) == {
        name
        for path in built.rglob("*")
        if path.is_file() and (name := path.relative_to(built).as_posix())[0] != "."
        if name not in (CARD, "LICENSE", "example.png", MODEL_MANIFEST)
    }
    assert {"model.safetensors", "modeling_llm2clip.py", "config.json", "1_Normalize/config.json"} <= set(listed)
    (copy / CARD).write_text((copy / CARD).read_text() + "\nWhat its author adds.\n")
    for stays_here in (True, False):
        for name in ("model.safetensors", "processing_llm2clip.py", "tokenizer_config.json", MODEL_MANIFEST):
            if name == MODEL_MANIFEST and not stays_here:
                continue
            with flip(copy / name), pytest.raises(ValueError, match=r"is not what was written|damaged"):
                upload(hub, copy)
            assert not hub.repos
        (copy / ".llm2clip.json").unlink(missing_ok=True)
    upload(hub, copy)
    assert hub.repo(REPO).files()[MODEL_MANIFEST] == (built / MODEL_MANIFEST).read_bytes()
    arrived = tmp_path / "arrived"
    for name, content_of_file in hub.repo(REPO).files().items():
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(content_of_file)
    assert cli.main(["verify", str(arrived)]) == 0
    with flip(arrived / "model.safetensors"):
        assert cli.main(["verify", str(arrived)]) == 2
    # A folder without one does not leave that of other weights there.
    (copy / MODEL_MANIFEST).unlink()
    upload(hub, copy)
    assert MODEL_MANIFEST not in hub.repo(REPO).files()


@pytest.mark.slow
def test_pushed_model_works_in_auto_classes_pipelines_and_sentence_transformers(
    hub: LoopbackHub, built: Path, tmp_path: Path
) -> None:
    """The command pushes; AutoModel, three pipelines and SentenceTransformer load the model by its Hub id."""
    IMAGES[0].save(tmp_path / "picture.png")
    assert f"repo: {hub.url}/{REPO}" in push_by_command(hub, built, tmp_path)
    found = consume(hub, [tmp_path / "picture.png"], CAPTIONS, tmp_path)
    compare(LLM2CLIPModel.from_pretrained(built).eval(), found)


def compare(model: LLM2CLIPModel, found: dict[str, Tensor]) -> None:
    processor = tiny.processor()
    with torch.inference_mode():
        output = model(**processor(text=CAPTIONS, images=IMAGES[:1], return_tensors="pt"))
        states = model.get_text_features(**processor(text=CAPTIONS[:1], return_tensors="pt")).last_hidden_state
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found["logits"], output.logits_per_image, **close)
    torch.testing.assert_close(found["scores"], output.logits_per_image.softmax(dim=-1), **close)
    torch.testing.assert_close(found["image"], output.image_embeds, **close)
    torch.testing.assert_close(found["states"], states, **close)
    torch.testing.assert_close(found["st_text"], output.text_embeds, **close)
    torch.testing.assert_close(found["st_image"], output.image_embeds, **close)
