"""Uploads to a repo that others use too: branches, pull requests, edits of the card, interrupted connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, constants

from llm2clip.hub import upload as hub_upload
from llm2clip.hub.cards.card import CARD, split_card
from llm2clip.hub.upload import open_repo, read_branch
from tests.llm2clip.hub.conftest import REPO, files_of, upload
from tests.loopback_hub import CUT, TOKEN, File, LoopbackHub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    """What others, and the website, do with the repo."""
    return HfApi(endpoint=hub.url, token=TOKEN)


def card_of(hub: LoopbackHub, revision: str = "main") -> str:
    return hub.repo(REPO).files(revision)[CARD].decode()


def test_private_push_to_an_existing_public_repo_is_refused(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    commits = len(hub.repo(REPO).messages)
    with pytest.raises(ValueError, match=rf"{REPO} exists and is public: make it private in its settings"):
        upload(hub, built, private=True)
    assert len(hub.repo(REPO).messages) == commits
    for _ in range(2):
        upload(hub, built, repo_id="tester/other", private=True)


def test_repeated_push_does_not_send_uploaded_weights_again(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts
    before = files_of(built)
    hub.fail_next("PUT", "_lfs", CUT, times=20)
    with pytest.raises(ValueError, match=r"the connection broke .*push again: files that were uploaded are not sent"):
        upload(hub, built)
    assert not hub.repo(REPO).files()
    hub.failures.clear()
    upload(hub, built)
    assert hub.repo(REPO).files()["model.safetensors"] == before["model.safetensors"]
    # Interrupted after the weights had arrived.
    sent = len(hub.uploads())
    hub.fail_next("POST", "/commit/", CUT, times=20)
    with pytest.raises(ValueError, match="push again"):
        upload(hub, built, repo_id="tester/other")
    hub.failures.clear()
    upload(hub, built, repo_id="tester/other")
    assert len(hub.uploads()) == sent
    assert hub.repo("tester/other").files().keys() == hub.repo(REPO).files().keys()
    assert files_of(built) == before


def test_push_to_a_branch_or_pull_request_leaves_main_unchanged(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built, revision="experiment")
    result = upload(hub, built, create_pr=True)
    assert result["pull_request"].endswith(f"/{REPO}/discussions/1")
    upload(hub, built, revision="refs/pr/1", commit_message="Once more")
    repo = hub.repo(REPO)
    assert repo.messages[-1] == "Once more"
    assert not repo.files()
    assert all("model.safetensors" in repo.files(branch) for branch in ("experiment", "refs/pr/1"))
    # A pull request is meant to become main.
    data, _ = split_card(card_of(hub, "refs/pr/1"))
    assert data["widget"][0]["src"] == f"{hub.url}/{REPO}/resolve/main/example.png"
    with pytest.raises(ValueError, match=rf"{REPO} has no refs/pr/2; --create-pr opens a new pull request"):
        upload(hub, built, revision="refs/pr/2")
    with pytest.raises(ValueError, match="revision is experiment, but --create-pr opens a pull request against main"):
        upload(hub, built, revision="experiment", create_pr=True)
    assert list(repo.branches) == ["main", "experiment", "refs/pr/1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"model_type": "bert"}', "contains a model of type 'bert', and .* has type 'llm2clip'"),
        ("config.json", b"{", "contains something else"),
        ("diffusion.safetensors", b"x", "contains diffusion.safetensors, but no config.json"),
    ],
    ids=["bert", "damaged", "weights"],
)
def test_repo_without_a_model_of_this_package_is_not_changed(
    name: str, content: bytes, message: str, hub: LoopbackHub, api: HfApi, built: Path
) -> None:
    api.create_repo(REPO)
    hub.repo(REPO).commit("main", {name: File(content, lfs=False)}, "theirs")
    for revision in (None, "experiment"):
        with pytest.raises(ValueError, match=f"{message}.*; push to another repo"):
            upload(hub, built, revision=revision)
    assert hub.repo(REPO).files() == {name: content}
    assert list(hub.repo(REPO).branches) == ["main"]


def test_what_others_put_into_the_repo_is_kept_and_stale_weights_are_deleted(
    hub: LoopbackHub, api: HfApi, built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api.create_repo(REPO)
    card = b"---\nlicense: mit\n---\n"
    hub.repo(REPO).commit("main", {".gitattributes": File(b"*", False), CARD: File(card, False)}, "website")
    upload(hub, built)
    edited = f"{card_of(hub)}\nEdited on the website:\n"
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo=CARD, repo_id=REPO)
    stale = {"model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors", "model.sig"}
    others = {"notes.txt", "last-checkpoint/model.safetensors", "diffusion.safetensors"}
    for name in stale | others:
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO)
    upload(hub, built)
    files = hub.repo(REPO).files()
    assert files.keys() & (stale | others) == others
    assert files[".gitattributes"] == b"*"
    data, text = split_card(card_of(hub))
    assert "Edited on the website:" in text
    assert data["license"] == "mit"
    assert "the card on the Hub keeps its own license; change it there" in caplog.text


def test_a_commit_of_others_during_the_upload_is_an_error_and_stays(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card that is uploaded was made from the one before, so that their edits would be lost."""
    upload(hub, built)
    sent, send = len(hub.uploads()), HfApi.upload_folder

    def edit_and_send(*args: Any, **kwargs: Any) -> Any:
        repo, card = hub.repo(REPO), File(f"{card_of(hub)}\nTheirs.\n".encode(), lfs=False)
        repo.commit("main", {**repo.commits[repo.branches["main"]], CARD: card}, "edit")
        return send(*args, **kwargs)

    monkeypatch.setattr(HfApi, "upload_folder", edit_and_send)
    with pytest.raises(ValueError, match="the repo changed during this push: push again"):
        upload(hub, built)
    assert hub.repo(REPO).messages[-1] == "edit"
    monkeypatch.setattr(HfApi, "upload_folder", send)
    upload(hub, built)
    assert "\nTheirs.\n" in card_of(hub)
    assert len(hub.uploads()) == sent


def test_push_fails_if_the_card_on_the_hub_cannot_be_read(hub: LoopbackHub, built: Path) -> None:
    upload(hub, built)
    for method in ("GET", "HEAD"):
        hub.fail_next(method, "/resolve/", CUT, times=50)
    with pytest.raises(ValueError, match=r"the connection broke .*push again"):
        upload(hub, built)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client of the Hub of its own, with patience for a fraction of a second."""
    monkeypatch.setattr(hub_upload, "TIMEOUTS", (5.0, 0.2, 5.0, 5.0))
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
            open_repo(api, REPO, None, "llm2clip", None)


class HotelPage(BaseHTTPRequestHandler):
    """Answers everything as the page of a hotel's network does, or a wrong HF_ENDPOINT."""

    def do_GET(self) -> None:
        body = b"<html>log in</html>"
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.mark.usefixtures("online")
def test_what_is_no_answer_of_a_hub_is_one_error() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HotelPage) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="token")
        for request in (partial(open_repo, private=None), read_branch):
            with pytest.raises(ValueError, match=r"does not answer as a Hub does .*correct HF_ENDPOINT"):
                request(api, REPO, None, "llm2clip")
        server.shutdown()
