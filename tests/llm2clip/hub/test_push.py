"""`llm2clip push` against a hub on the loopback interface: the good day, and the bad ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor

from llm2clip import cli
from llm2clip.hub import build, push
from llm2clip.hub.cards import CARD, split_card
from modeling_llm2clip import LLM2CLIPModel
from tests.loopback_hub import CUT, READ_TOKEN, TOKEN, File, LoopbackHub
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import CAPTIONS, IMAGES
from tests.stranger import HIDE

REPO = "tester/tiny"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    tiny.save_apart(folder)
    IMAGES[0].save(folder / "picture.png")
    settings = build.BuildConfig(
        str(folder / "clip"),
        str(folder / "out"),
        example_image=str(folder / "picture.png"),
        example_captions=["noise", "a dog"],
    )
    build.run(settings)
    return folder / "out"


def upload(hub: LoopbackHub, folder: Path, token: str | bool = TOKEN, **settings: Any) -> dict[str, Any]:
    config = push.PushConfig(**{"folder": str(folder), "repo_id": REPO, "validate": False, **settings})
    return push.run(config, HfApi(endpoint=hub.url, token=token))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_the_folder(hub: LoopbackHub, built: Path) -> None:
    before = content(built)
    result = upload(hub, built, private=True, commit_message="Hello")
    repo = hub.repo(REPO)
    assert repo.private
    assert repo.messages[-1] == "Hello"
    arrived = repo.files()
    assert set(arrived) == {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert result["files"] == len(arrived)
    assert all(value == (built / name).read_bytes() for name, value in arrived.items() if name != CARD)
    assert repo.commits[repo.branches["main"]]["model.safetensors"].lfs
    data, text = split_card(arrived[CARD].decode())
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    assert f'from_pretrained("{REPO}"' in text
    assert str(built) not in text
    assert content(built) == before


def test_nothing_private_goes_to_a_public_repo(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    commits = len(hub.repo(REPO).messages)
    with pytest.raises(ValueError, match=rf"{REPO} is there already and is public: make it private in its settings"):
        upload(hub, built, private=True)
    assert len(hub.repo(REPO).messages) == commits
    upload(hub, built, repo_id="tester/other", private=True)
    upload(hub, built, repo_id="tester/other", private=True)


def test_a_second_push_finishes_the_first(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    before = content(built)
    hub.fail_next("PUT", "_lfs", CUT, times=20)
    with pytest.raises(ValueError, match=r"the connection broke .*push again, and what has been uploaded is not sent"):
        upload(hub, built)
    assert not hub.repo(REPO).files()
    hub.failures.clear()
    upload(hub, built)
    assert hub.repo(REPO).files()["model.safetensors"] == (built / "model.safetensors").read_bytes()
    # Cut off after the weights had arrived: they are not sent again.
    sent = len(hub.uploads())
    hub.fail_next("POST", "/commit/", CUT, times=20)
    with pytest.raises(ValueError, match="push again"):
        upload(hub, built, repo_id="tester/other")
    hub.failures.clear()
    upload(hub, built, repo_id="tester/other")
    assert len(hub.uploads()) == sent
    assert hub.repo("tester/other").files().keys() == hub.repo(REPO).files().keys()
    assert content(built) == before


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (False, REPO, r"token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN \(HTTP 401"),
        ("hf_wrong", REPO, r"token is missing or not valid.*HTTP 401"),
        (READ_TOKEN, REPO, r"needs write access to the repo and its organisation \(HTTP 403"),
        (TOKEN, "someone-else/tiny", r"needs write access to the repo and its organisation \(HTTP 403"),
        (TOKEN, "tester/a--b", r"'tester/a--b' is no repo name that the Hub takes"),
        (TOKEN, "tiny", r"'tiny' is no repo name: write OWNER/NAME"),
        (TOKEN, "tester/no spaces", r"is no repo name: write OWNER/NAME"),
    ],
)
def test_refusals_name_the_next_step(
    token: str | bool, repo: str, message: str, hub: LoopbackHub, built: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        upload(hub, built, token, repo_id=repo)
    assert not hub.repos


@pytest.mark.parametrize(
    ("status", "path", "message"),
    [
        (400, "/commit/", r"does not take this: mend what it names .*, then push again \(HTTP 400"),
        (402, "/commit/", r"plan does not cover this: free storage or change the plan .* \(HTTP 402"),
        (412, "/commit/", r"the repo changed while this push ran: push again \(HTTP 412"),
        (413, "/commit/", r"a file is too large for the Hub: .*save its weights in shards .* \(HTTP 413"),
        (451, "/commit/", r"the Hub refused: mend what it names \(HTTP 451"),
        (409, "/commit/", r"changed or is being created at the same time: push again \(HTTP 409"),
        (429, "/commit/", r"too many requests: wait some minutes, then push again \(HTTP 429"),
        (404, "/preupload/", r"there is no such repo, or the token may not see it \(HTTP 404"),
    ],
)
def test_bad_days_name_the_next_step(status: int, path: str, message: str, hub: LoopbackHub, built: Path) -> None:
    hub.fail_next("POST", path, status, times=20)
    with pytest.raises(ValueError, match=message):
        upload(hub, built)
    assert not hub.repo(REPO).files()


def test_branches_and_pull_requests(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built, revision="experiment")
    assert not hub.repo(REPO).files()
    assert "model.safetensors" in hub.repo(REPO).files("experiment")
    result = upload(hub, built, create_pr=True)
    assert result["pull_request"].endswith(f"/{REPO}/discussions/1")
    assert "model.safetensors" in hub.repo(REPO).files("refs/pr/1")
    assert not hub.repo(REPO).files()


def test_a_pull_request_takes_further_pushes(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built, create_pr=True)
    upload(hub, built, revision="refs/pr/1", commit_message="Once more")
    assert hub.repo(REPO).messages[-1] == "Once more"
    assert not hub.repo(REPO).files()
    # It is to become main.
    data, _ = split_card(hub.repo(REPO).files("refs/pr/1")[CARD].decode())
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    with pytest.raises(ValueError, match=rf"{REPO} has no refs/pr/2; --create-pr opens a new pull request"):
        upload(hub, built, revision="refs/pr/2")
    with pytest.raises(ValueError, match="leave out --revision experiment, or --create-pr"):
        upload(hub, built, revision="experiment", create_pr=True)
    assert list(hub.repo(REPO).branches) == ["main", "refs/pr/1"]


def test_a_repo_of_another_model_is_left_alone(hub: LoopbackHub, built: Path) -> None:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id=REPO)
    for revision in (None, "experiment"):
        with pytest.raises(
            ValueError, match=r"holds a model of type 'bert', and .* is 'llm2clip'; push to another repo"
        ):
            upload(hub, built, revision=revision)
    assert list(hub.repo(REPO).branches) == ["main"]
    assert list(hub.repo(REPO).files()) == ["config.json"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"architecture": "vit_base"}'}, "holds something else, and this model is 'llm2clip'"),
        ({"config.json": b"{"}, "holds something else"),
        ({"diffusion.safetensors": b"x"}, "holds diffusion.safetensors, but no config.json, so it is no earlier push"),
        ({f"{letter}.bin": b"x" for letter in "abcd"}, r"holds a.bin, b.bin, c.bin and more, but no config.json"),
    ],
)
def test_a_repo_of_something_else_is_left_alone(
    files: dict[str, bytes], message: str, hub: LoopbackHub, built: Path
) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO)
    repo = hub.repo(REPO)
    repo.commit("main", {name: File(content, lfs=False) for name, content in files.items()}, "theirs")
    with pytest.raises(ValueError, match=f"{message}.*; push to another repo"):
        upload(hub, built)
    assert repo.files() == files


def test_a_new_repo_keeps_what_the_website_put_there(hub: LoopbackHub, built: Path) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO)
    card = b"---\nlicense: mit\n---\n"
    hub.repo(REPO).commit("main", {".gitattributes": File(b"*", False), CARD: File(card, False)}, "website")
    upload(hub, built)
    assert hub.repo(REPO).files()[".gitattributes"] == b"*"
    assert split_card(hub.repo(REPO).files()[CARD].decode())[0]["license"] == "mit"


def edit_while_uploading(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, edits: list[Callable[[str], str]]) -> None:
    """Change the card on main after the weights have arrived and before the commit, once for every edit."""
    send = HfApi.preupload_lfs_files

    def and_edit(*args: Any, **kwargs: Any) -> None:
        send(*args, **kwargs)
        if edits:
            repo = hub.repo(REPO)
            files = dict(repo.commits[repo.branches["main"]])
            files[CARD] = File(edits.pop(0)(files[CARD].content.decode()).encode(), lfs=False)
            repo.commit("main", files, "edit")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_edit)


def test_edits_of_the_card_while_the_push_runs_survive(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, built)
    edits = [lambda card: card + "\nOnce.\n", lambda card: card + "\nTwice.\n"]
    edit_while_uploading(hub, monkeypatch, edits)
    sent = len(hub.uploads())
    upload(hub, built, commit_message="Second")
    assert hub.repo(REPO).messages[-3:] == ["edit", "edit", "Second"]
    assert "\nOnce.\n\nTwice.\n" in hub.repo(REPO).files()[CARD].decode()
    assert len(hub.uploads()) == sent


def test_a_repo_that_never_rests_ends_the_push(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(hub, built)
    edits = [lambda card: card + "\nMore.\n"] * 10
    edit_while_uploading(hub, monkeypatch, edits)
    with pytest.raises(ValueError, match=r"the repo changed while this push ran: push again \(HTTP 412"):
        upload(hub, built)
    assert len(edits) == 6


def test_edits_of_the_card_survive_and_stale_weights_go(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    card = hub.repo(REPO).files()[CARD].decode().replace("An LLM2CLIP model:", "Edited on the website:")
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=REPO)
    stale = ("model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors")
    others = ("notes.txt", "last-checkpoint/model.safetensors", "diffusion.safetensors")
    for name in (*stale, *others):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO)
    upload(hub, built)
    files = hub.repo(REPO).files()
    assert "Edited on the website:" in files[CARD].decode()
    assert set(others) <= set(files)
    assert not set(stale) & set(files)


def test_a_card_that_cannot_be_read_stops_the_push(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    hub.fail_next("GET", "/resolve/", CUT, times=50)
    hub.fail_next("HEAD", "/resolve/", CUT, times=50)
    with pytest.raises(ValueError, match=r"the connection broke .*push again"):
        upload(hub, built)


def test_a_licence_that_was_changed_on_the_hub_stays_and_is_named(
    hub: LoopbackHub, built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    for licence in ("mit", "apache-2.0"):
        card = (built / CARD).read_text().replace("pipeline_tag:", f"license: {licence}\npipeline_tag:", 1)
        (copy / CARD).write_text(card)
        upload(hub, copy)
    assert split_card(hub.repo(REPO).files()[CARD].decode())[0]["license"] == "mit"
    assert "the card on the Hub keeps its own license; change it there" in caplog.text


def test_folder_names_that_look_like_hub_ids(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / REPO)
    upload(hub, Path(REPO))
    assert "model.safetensors" in hub.repo(REPO).files()


def test_folders_that_are_not_ready(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, message: str) -> None:
        assert cli.main(["push", str(folder), REPO]) == 2
        assert message in capsys.readouterr().err

    refused(tmp_path / "nowhere", "is no folder; `llm2clip build MODEL")
    refused(tmp_path, "has no config.json; build it first")
    copy = tmp_path / "copy"
    for spoil, message in (
        (lambda: (copy / "model.safetensors").unlink(), "has no weights"),
        (lambda: (copy / "modeling_llm2clip.py").unlink(), "lacks the code of modeling_llm2clip"),
        (lambda: (copy / CARD).unlink(), "has no README.md"),
        (lambda: os.truncate(copy / "model.safetensors", 5000), "is damaged or truncated"),
        (lambda: (copy / CARD).write_text("---\nlicense: [\n---\n"), "README.md"),
        (lambda: (copy / "tokenizer.json").unlink(), "lacks tokenizer.json; build it first"),
        (
            lambda: [(copy / f"{name}_config.json").unlink() for name in ("processor", "preprocessor")],
            "lacks processor_config.json or preprocessor_config.json; build it first",
        ),
        (lambda: os.truncate(copy / "config.json", 30), f"{copy / 'config.json'} is not valid JSON"),
        (lambda: (copy / "config.json").write_text("{}"), f"{copy / 'config.json'} has no model_type; build"),
    ):
        shutil.copytree(built, copy)
        spoil()
        refused(copy, message)
        shutil.rmtree(copy)
    tiny.save_apart(tmp_path)
    refused(tmp_path / "clip", "where others cannot load it from; `llm2clip build` bundles it")


CONSUMER = """
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline
repo, picture, output, *captions = sys.argv[1:]
image = Image.open(picture)
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
found = {"logits": model(**processor(text=captions, images=image, return_tensors="pt")).logits_per_image}
classify = pipeline("zero-shot-image-classification", model=repo, trust_remote_code=True)
scores = {row["label"]: row["score"] for row in classify(image, candidate_labels=captions, hypothesis_template="{}")}
found["scores"] = torch.tensor([[scores[caption] for caption in captions]])
features = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
found["image"] = torch.nn.functional.normalize(torch.tensor(features(image, pool=True)), dim=-1)
states = pipeline("feature-extraction", model=repo, trust_remote_code=True)
found["states"] = torch.tensor(states(captions[0]))
encoder = SentenceTransformer(repo, trust_remote_code=True, device="cpu")
found["st_text"] = torch.tensor(encoder.encode(captions))
found["st_image"] = torch.tensor(encoder.encode([image]))
assert not {"modeling_llm2clip", "llm2clip"} & set(sys.modules)
save_file({key: value.detach().contiguous() for key, value in found.items()}, output)
"""


def test_strangers_use_the_repo_through_every_door(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    """Push by the command, then AutoModel, three pipelines and SentenceTransformer from the repo id alone."""
    environment = {**os.environ, **hub.environment(tmp_path / "publisher")}
    command = [sys.executable, "-m", "llm2clip", "push", str(built), REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"repo: {hub.url}/{REPO}" in done.stdout
    IMAGES[0].save(tmp_path / "picture.png")
    environment = {**os.environ, **hub.environment(tmp_path / "consumer", token=None)}
    command = [sys.executable, "-I", "-c", HIDE + CONSUMER, REPO, str(tmp_path / "picture.png")]
    output = tmp_path / "found.safetensors"
    done = subprocess.run(
        [*command, str(output), *CAPTIONS], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compare(LLM2CLIPModel.from_pretrained(built).eval(), load_file(output))


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
