"""Uploads to a repo that others use too: branches, pull requests, edits of the card, interrupted connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, constants

from llm2clip.hub import hub_errors
from llm2clip.hub.cards.card import CARD, split_card
from llm2clip.hub.upload import Uploader
from tests.llm2clip.hub.conftest import REPO, content, upload
from tests.loopback_hub import CUT, TOKEN, File, LoopbackHub


def test_private_push_to_an_existing_public_repo_is_refused(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    commits = len(hub.repo(REPO).messages)
    with pytest.raises(ValueError, match=rf"{REPO} exists and is public: make it private in its settings"):
        upload(hub, built, private=True)
    assert len(hub.repo(REPO).messages) == commits
    upload(hub, built, repo_id="tester/other", private=True)
    upload(hub, built, repo_id="tester/other", private=True)


def test_repeated_push_does_not_send_uploaded_weights_again(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts
    before = content(built)
    hub.fail_next("PUT", "_lfs", CUT, times=20)
    with pytest.raises(ValueError, match=r"the connection broke .*push again: files that were uploaded are not sent"):
        upload(hub, built)
    assert not hub.repo(REPO).files()
    hub.failures.clear()
    upload(hub, built)
    assert hub.repo(REPO).files()["model.safetensors"] == (built / "model.safetensors").read_bytes()
    # Interrupted after the weights had arrived.
    sent = len(hub.uploads())
    hub.fail_next("POST", "/commit/", CUT, times=20)
    with pytest.raises(ValueError, match="push again"):
        upload(hub, built, repo_id="tester/other")
    hub.failures.clear()
    upload(hub, built, repo_id="tester/other")
    assert len(hub.uploads()) == sent
    assert hub.repo("tester/other").files().keys() == hub.repo(REPO).files().keys()
    assert content(built) == before


def test_push_to_a_branch_or_new_pull_request_leaves_main_unchanged(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built, revision="experiment")
    assert not hub.repo(REPO).files()
    assert "model.safetensors" in hub.repo(REPO).files("experiment")
    result = upload(hub, built, create_pr=True)
    assert result["pull_request"].endswith(f"/{REPO}/discussions/1")
    assert "model.safetensors" in hub.repo(REPO).files("refs/pr/1")
    assert not hub.repo(REPO).files()


def test_existing_pull_request_accepts_further_pushes(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built, create_pr=True)
    upload(hub, built, revision="refs/pr/1", commit_message="Once more")
    assert hub.repo(REPO).messages[-1] == "Once more"
    assert not hub.repo(REPO).files()
    # A pull request is meant to become main.
    data, _ = split_card(hub.repo(REPO).files("refs/pr/1")[CARD].decode())
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    with pytest.raises(ValueError, match=rf"{REPO} has no refs/pr/2; --create-pr opens a new pull request"):
        upload(hub, built, revision="refs/pr/2")
    with pytest.raises(ValueError, match="omit --revision experiment, or --create-pr"):
        upload(hub, built, revision="experiment", create_pr=True)
    assert list(hub.repo(REPO).branches) == ["main", "refs/pr/1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, "contains a model of type 'bert', and .* has type 'llm2clip'"),
        ({"config.json": b'{"architecture": "vit_base"}'}, "contains something else, and .* has type 'llm2clip'"),
        ({"config.json": b"{"}, "contains something else"),
        (
            {"diffusion.safetensors": b"x"},
            "contains diffusion.safetensors, but no config.json, so it is not an earlier push",
        ),
        ({f"{letter}.bin": b"x" for letter in "abcd"}, r"contains a.bin, b.bin, c.bin, d.bin, but no config.json"),
    ],
)
def test_repo_without_a_model_of_this_package_is_not_changed(
    files: dict[str, bytes], message: str, hub: LoopbackHub, built: Path
) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO)
    repo = hub.repo(REPO)
    repo.commit("main", {name: File(content, lfs=False) for name, content in files.items()}, "theirs")
    for revision in (None, "experiment"):
        with pytest.raises(ValueError, match=f"{message}.*; push to another repo"):
            upload(hub, built, revision=revision)
    assert repo.files() == files
    assert list(repo.branches) == ["main"]


def test_first_push_keeps_gitattributes_and_front_matter_of_a_new_repo(hub: LoopbackHub, built: Path) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO)
    card = b"---\nlicense: mit\n---\n"
    hub.repo(REPO).commit("main", {".gitattributes": File(b"*", False), CARD: File(card, False)}, "website")
    upload(hub, built)
    assert hub.repo(REPO).files()[".gitattributes"] == b"*"
    assert split_card(hub.repo(REPO).files()[CARD].decode())[0]["license"] == "mit"


def edit_while_uploading(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, edits: list[Callable[[str], str]]) -> None:
    """Edit the card on main between upload and commit, once per push attempt."""
    send = HfApi.preupload_lfs_files

    def and_edit(*args: Any, **kwargs: Any) -> None:
        send(*args, **kwargs)
        if edits:
            repo = hub.repo(REPO)
            files = dict(repo.commits[repo.branches["main"]])
            files[CARD] = File(edits.pop(0)(files[CARD].content.decode()).encode(), lfs=False)
            repo.commit("main", files, "edit")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_edit)


def test_card_edits_during_the_upload_are_kept(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(hub, built)
    edits = [lambda card: card + "\nOnce.\n", lambda card: card + "\nTwice.\n"]
    edit_while_uploading(hub, monkeypatch, edits)
    sent = len(hub.uploads())
    upload(hub, built, commit_message="Second")
    assert hub.repo(REPO).messages[-3:] == ["edit", "edit", "Second"]
    assert "\nOnce.\n\nTwice.\n" in hub.repo(REPO).files()[CARD].decode()
    assert len(hub.uploads()) == sent


def test_push_fails_after_four_concurrent_commits(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, built)
    edits = [lambda card: card + "\nMore.\n"] * 10
    edit_while_uploading(hub, monkeypatch, edits)
    with pytest.raises(ValueError, match=r"the repo changed during this push: push again \(HTTP 412"):
        upload(hub, built)
    assert len(edits) == 6


def test_card_edits_and_other_files_are_kept_and_stale_weights_deleted(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    card = hub.repo(REPO).files()[CARD].decode().replace("An LLM2CLIP model:", "Edited on the website:")
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=REPO)
    stale = ("model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors", "model.sig")
    others = ("notes.txt", "last-checkpoint/model.safetensors", "diffusion.safetensors")
    for name in (*stale, *others):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO)
    upload(hub, built)
    files = hub.repo(REPO).files()
    assert "Edited on the website:" in files[CARD].decode()
    assert set(others) <= set(files)
    assert not set(stale) & set(files)


def test_push_fails_if_the_card_on_the_hub_cannot_be_read(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    hub.fail_next("GET", "/resolve/", CUT, times=50)
    hub.fail_next("HEAD", "/resolve/", CUT, times=50)
    with pytest.raises(ValueError, match=r"the connection broke .*push again"):
        upload(hub, built)


def test_license_changed_on_the_hub_is_kept_with_a_warning(
    hub: LoopbackHub, built: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for license_id in ("mit", "apache-2.0"):
        card = (built / CARD).read_text().replace("pipeline_tag:", f"license: {license_id}\npipeline_tag:", 1)
        (model / CARD).write_text(card)
        upload(hub, model)
    assert split_card(hub.repo(REPO).files()[CARD].decode())[0]["license"] == "mit"
    assert "the card on the Hub keeps its own license; change it there" in caplog.text


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client of the Hub of its own, with patience for a fraction of a second."""
    monkeypatch.setattr(hub_errors, "PATIENCE", (5.0, 0.2, 5.0, 5.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_an_error() -> None:
    # Connections to a socket that listens are accepted by the system.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", token="token")
        with pytest.raises(ValueError, match=r"tester/tiny: the connection broke .*timed out.*push again"):
            Uploader(REPO, api=api).create_repo()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("body", [b"<html>log in</html>", b""])
def test_what_is_no_answer_of_a_hub_is_one_error(body: bytes) -> None:
    """As of the page of a hotel's network, or of a wrong HF_ENDPOINT."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        uploader = Uploader(REPO, api=HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="token"))
        for request in (uploader.create_repo, uploader.read_card):
            with pytest.raises(
                ValueError, match=r"tester/tiny: .* does not answer as a Hub does .*correct HF_ENDPOINT"
            ):
                request()
        server.shutdown()
