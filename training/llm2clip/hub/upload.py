"""Uploads of models to the Hub with `HfApi.upload_folder`; the only module of this package that writes to the Hub."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, constants, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llm2clip.command_line.logs import shortened
from llm2clip.files.atomic import read_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub.cards.card import CARD, MERGED_LISTS, merge_cards, split_card, with_repo
from llm2clip.hub.cards.facts import EXAMPLE

logger = logging.getLogger(__name__)

# The Hub client lets the connection errors of its HTTP library through and has no public class for them: httpx in
# huggingface_hub 1, httpx2 in huggingface_hub 2.
HTTPError: Any = import_module("httpx" if huggingface_hub.__version__.startswith("1.") else "httpx2").HTTPError
# Seconds to connect, to wait for an answer, to send a piece, and to wait for a free connection. The Hub may take
# minutes over a commit of many files, but by default its client waits for ever.
TIMEOUTS = (30.0, 600.0, 600.0, 600.0)
NEXT_STEPS = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "the token needs write access to the repo and its organization",
    412: "the repo changed during this push: push again",
}
# What an earlier push may have left that would be loaded instead of the new weights, or lists other ones.
STALE_FILES = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "training_args.bin"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_dense.safetensors", FOLDER_MANIFEST, "model.sig"),
)
# Fields of a card that are united with those on the Hub, or that differ in an address only.
UNITED_FIELDS = (*MERGED_LISTS, "model-index", "widget")
# Files that a repo may contain before the first push.
INITIAL_FILES = {".gitattributes", CARD, "LICENSE"}


class HubError(ValueError):
    """The Hub refuses, or cannot be reached; the message names the next step."""


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub and of the connection as a [`HubError`] in one line; others pass through.

    A Hub that does not answer is such an error after some minutes.
    """
    client = get_session()
    if client.timeout.read is None:
        client.timeout = TIMEOUTS
    try:
        yield
    except Exception as error:
        if message := explanation(error, repo_id):
            raise HubError(message) from error
        raise


def explanation(error: BaseException, repo_id: str) -> str | None:
    """Describe an error of the Hub or of the connection in one line; None for any other error."""
    # The upload threads of the client wrap their errors.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        step = NEXT_STEPS.get(error.response.status_code)
        return f"{repo_id}: {reason}{f'; {step}' if step else ''}."
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"{repo_id}: the connection broke ({reason}); push again: files that were uploaded are not sent twice."
    if isinstance(error, JSONDecodeError):
        # The page of a hotel's network, or that of another address.
        return f"{repo_id}: {constants.ENDPOINT} does not answer as a Hub does ({reason}): correct HF_ENDPOINT."
    return None


def require_token(api: HfApi, repo_id: str) -> None:
    """Raise a `ValueError` if there is no token to push with."""
    if not (get_token() if api.token in (None, True) else api.token):
        raise ValueError(f"{repo_id}: there is no access token; {NEXT_STEPS[401]}.")


class Branch(NamedTuple):
    """A branch of a repo at its newest commit; one that does not exist yet starts from main.

    Attributes:
        is_new: It does not exist yet.
        commit: Its newest commit.
        files: Names of its files.
        card: The text of its card.
        checksums: Those of the files of its model, by name; None if it has no list of them.
    """

    is_new: bool
    commit: str | None
    files: list[str]
    card: str | None
    checksums: dict[str, str] | None


def read_branch(api: HfApi, repo_id: str, revision: str | None, model_type: str) -> Branch | None:
    """Read the branch that a model is pushed to; None if the repo does not exist.

    Raises:
        ValueError: The repo contains another type of model, or files but no model; or the Hub refuses.
    """
    with explained(repo_id):
        is_new = False
        try:
            info = api.model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            if revision is not None and revision.startswith("refs/"):
                raise ValueError(f"{repo_id} has no {revision}; --create-pr opens a new pull request.") from None
            info, is_new = api.model_info(repo_id), True
        files = [entry.rfilename for entry in info.siblings or []]
        found = {}
        for name in ("config.json", CARD, FOLDER_MANIFEST):
            found[name] = _download(api, repo_id, name, info.sha) if name in files else None
    _require_ours(repo_id, files, found["config.json"], model_type)
    card, manifest = found[CARD], found[FOLDER_MANIFEST]
    with wrap_read_errors(f"the card of {repo_id} on the Hub"):
        text = None if card is None else card.read_text(encoding="utf-8")
    return Branch(is_new, info.sha, files, text, None if manifest is None else _checksums(manifest))


def _checksums(manifest: Path) -> Any:
    with suppress(OSError, ValueError):
        return read_json(manifest).get("sha256")


def _download(api: HfApi, repo_id: str, name: str, commit: str | None) -> Path:
    try:
        return Path(api.hf_hub_download(repo_id, name, revision=commit))
    except LocalEntryNotFoundError as error:
        # Its message advises about the cache; the reason why it asks there is the connection.
        raise error.__cause__ or error from None


def _require_ours(repo_id: str, files: Iterable[str], config: Path | None, model_type: str) -> None:
    others = [name for name in files if name not in INITIAL_FILES]
    if config is None and others:
        raise ValueError(
            f"{repo_id} contains {shortened(others)}, but no config.json, so it is not an earlier push of this model; "
            "push to another repo."
        )
    if config is not None:
        try:
            existing = read_json(config).get("model_type")
        except ValueError:
            existing = None
        if existing != model_type:
            kind = "something else" if existing is None else f"a model of type {existing!r}"
            raise ValueError(
                f"{repo_id} contains {kind}, and this model has type {model_type!r}; push to another repo."
            )


def open_repo(
    api: HfApi, repo_id: str, revision: str | None, model_type: str, private: bool | None
) -> tuple[RepoUrl, Branch]:
    """Create the repo and the branch if they do not exist, and check write access.

    Args:
        repo_id: OWNER/NAME, or NAME for the owner of the token.
        revision: The branch; main by default.
        model_type: That of the model that is pushed.
        private: Whether a new repo is private; None follows the default of its owner.

    Raises:
        ValueError: `private` is true, but the repo exists and is public; or see [`read_branch`].
    """
    with explained(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = url.repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or push to another repo."
            )
    branch = read_branch(api, repo_id, revision, model_type)
    if branch is None:
        raise HubError(f"{repo_id} is not there, although it was just created: push again.")
    with explained(repo_id):
        if branch.is_new:
            api.create_branch(repo_id, branch=str(revision), revision=branch.commit, exist_ok=True)
        # The first request of every upload; the Hub answers 403 to a read-only token.
        api.preupload_lfs_files(repo_id, additions=[CommitOperationAdd(CARD, b"?")], revision=revision)
    return url, branch


def card_for(api: HfApi, repo_id: str, revision: str | None, card: str, theirs: str | None) -> str:
    """Return the card of a folder for a repo, with what people wrote on the card there, `theirs`."""
    # A pull request is meant to become main.
    branch = "main" if revision is None or revision.startswith("refs/") else revision
    ours = with_repo(card, repo_id, f"{api.endpoint}/{repo_id}/resolve/{branch}/{EXAMPLE}")
    if theirs is None:
        return ours
    merged = merge_cards(theirs, ours)
    mine, result = split_card(ours)[0], split_card(merged)[0]
    if kept := [key for key, value in mine.items() if result[key] != value and key not in UNITED_FIELDS]:
        logger.warning("the card on the Hub keeps its own %s; change it there", ", ".join(kept))
    return merged


def upload_model(api: HfApi, repo_id: str, folder: Path, names: Iterable[str], **options: Any) -> Any:
    """Upload files of a folder, and delete what would be loaded in place of its weights.

    Args:
        names: The files.
        options: Other arguments of `HfApi.upload_folder`.
    """
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns=list(STALE_FILES),
        **options,
    )


def weights_replaced(branch: Branch | None, folder: Path) -> str | None:
    """Describe the model in a branch whose weights the upload of a folder would replace by others; None if none."""
    if branch is None or branch.is_new or "config.json" not in branch.files:
        return None
    if branch.checksums is not None and branch.checksums == _checksums(folder / FOLDER_MANIFEST):
        return None
    title = re.search(r"^# (.+)", branch.card or "", re.MULTILINE)
    commit = f"commit {str(branch.commit)[:8]}, {len(branch.files)} files"
    return f"{title[1]} ({commit})" if title else commit
