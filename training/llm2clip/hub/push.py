"""`llm2clip push`: check a built folder and upload it to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.console import Console

from llm2clip.hub.cards.card import validate_card
from llm2clip.hub.licenses import check_license
from llm2clip.hub.source_model import validate_folder
from llm2clip.hub.upload import HubError, Uploader
from llm2clip.hub.upload_files import added_files, code_targets, model_files, refuse_secrets
from llm2clip.utils.logs import shortened
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_MANIFEST, refuse_damaged
from llm2clip.utils.repos import OUR_MODELS, RepoKind, inspect_repo, is_hub_id, needed_llms
from llm2clip.utils.settings import build_config, refuse, setting
from llm2clip.utils.tables import print_table

logger = logging.getLogger(__name__)

BUILD_FIRST = "build it first: llm2clip build MODEL FOLDER"


@dataclass
class PushConfig:
    """Settings of `llm2clip push`."""

    folder: str = setting("", "Folder written by `llm2clip build`.")
    repo_id: str = setting("", "Hub repo to upload to: OWNER/NAME.")
    private: bool = setting(False, "Create the repo as private if it does not exist.")
    revision: str | None = setting(
        None, "Branch, created if it does not exist, or pull request (refs/pr/N). Default: main."
    )
    create_pr: bool = setting(False, "Open a pull request instead of committing.")
    commit_message: str = setting("Upload model", "Message of the commit.")
    check: bool = setting(
        True,
        "Before the upload, load the folder in a new process without this package, which runs the Python code in it "
        "(without network and without tokens in its environment); --no-check leaves that out.",
    )
    include: list[str] = setting(
        [], "Further files to upload, as patterns such as 'results/*'; by default only what a model folder holds."
    )
    dry_run: bool = setting(
        False,
        "Upload nothing: make all checks, say what the repo holds now if it can be read, and list what would be "
        "uploaded and what not, and why.",
    )


def push_folder(folder: str | Path, repo_id: str, **settings: Any) -> dict[str, Any]:
    """Check a folder of [`build_folder`] and upload it to the Hub in one commit.

    Edits that people made to the card on the Hub are kept. An interrupted push can be repeated; files that were
    uploaded before are not sent again.

    Args:
        folder: The folder; it is not changed.
        repo_id: OWNER/NAME; the repo is created if it does not exist.
        settings: Other fields of [`PushConfig`].

    Returns:
        `repo`, its address; `commit`; `files` and `megabytes`; `pull_request` if one was opened. With `dry_run`,
        `would_upload_to`, `files` and `megabytes`.

    Raises:
        FileNotFoundError: The folder is incomplete.
        RuntimeError: The folder does not load in a new process, or its outputs differ.
        ValueError: A setting is wrong, the repo contains another model, or the Hub refuses; the message names the next
            step.
    """
    return run(build_config(PushConfig, {"folder": folder, "repo_id": repo_id, **settings}, "PushConfig"))


def run(config: PushConfig, api: HfApi | None = None) -> dict[str, Any]:
    """Run `llm2clip push`; see [`push_folder`]. `api` is a client to use instead of a new one."""
    if not config.folder or not config.repo_id:
        raise ValueError("give a folder and a repo: llm2clip push FOLDER OWNER/NAME")
    folder = Path(config.folder)
    if not is_hub_id(config.repo_id):
        raise ValueError(
            f"{config.repo_id!r} is not a repo name: write OWNER/NAME with letters, digits, '-', '_' and '.'."
        )
    if config.create_pr and config.revision != "main":
        refuse(config, ["revision"], "--create-pr opens a pull request against main")
    uploader = Uploader(config.repo_id, revision=config.revision, create_pr=config.create_pr, api=api)
    if not config.dry_run:
        uploader.require_token()
    _check_folder(folder)
    check_license(folder, config.repo_id, _card_there(uploader, folder, config.dry_run))
    uploaded, others = model_files(folder, config.include)
    # Before they are searched: what is changed later was not.
    stamps = _stamps(uploaded)
    refuse_secrets(folder, uploaded, uploader.api.token)
    if others and not config.dry_run:
        logger.warning("not uploaded, as no model needs them: %s; --include PATTERN uploads them", shortened(others))
    if config.check and any("--" in target for target in code_targets(folder)):
        logger.info("the code of %s is in another repo, so the folder is not loaded before the upload", folder)
    elif config.check:
        logger.info("loading %s here and in a new process, which runs the code in it (skip with --no-check)", folder)
        validate_folder(folder)
    if _stamps(uploaded) != stamps:
        raise ValueError(
            f"{folder} has changed while it was checked; nothing was committed. Wait until nothing writes there, "
            "and push again; if the code in the folder does it, do not trust it."
        )
    if config.dry_run:
        return _show_upload(folder, config.repo_id, uploaded, others)
    # None leaves the visibility of a new repo to the default of its owner.
    url = uploader.create_repo(private=config.private or None)
    return {"repo": str(url), **uploader.upload(folder, config.commit_message, uploaded)}


def _card_there(uploader: Uploader, folder: Path, dry_run: bool) -> str | None:
    """Say what a push would replace in the repo, and return the card there; None if there is none.

    Raises:
        ValueError: The repo contains something else; or, unless with `dry_run`, the Hub refuses or is not reached.
    """
    try:
        replaced, card = uploader.contents(folder)
    except HubError as error:
        if not dry_run:
            raise
        logger.warning("what %s holds now is not checked: %s", uploader.repo_id, error)
        return None
    if replaced:
        logger.warning(
            "%s holds other weights, which this push replaces: %s. To keep both, push to another repo; --create-pr "
            "opens a pull request instead",
            *(uploader.repo_id, replaced),
        )
    return card


def _stamps(uploaded: Mapping[str, Path]) -> list[tuple[int, ...]]:
    """What changes with every change of a file: unlike its other times, that of its status cannot be set."""
    statuses = [path.stat() for path in uploaded.values()]
    return [(status.st_ino, status.st_size, status.st_ctime_ns) for status in statuses]


def _show_upload(folder: Path, repo_id: str, uploaded: Mapping[str, Path], others: Sequence[str]) -> dict[str, Any]:
    """Print the files that a push would upload and those that it would not, with their sizes, and why."""
    sizes = {name: path.stat().st_size for name, path in uploaded.items()}
    rows = [(name, f"{size:,}") for name, size in sizes.items()]
    print_table(Console(), f"Would be uploaded to {repo_id}", ["file", "bytes"], rows)
    left: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in uploaded:
            # A line for each checkpoint of a run, and not for each of its files.
            shown = name if name in others or "/" not in name else f"{name.split('/')[0]}/"
            left[shown] = left.get(shown, 0) + path.stat().st_size
    if left:
        why = {name: f"no model needs it; --include '{name}' uploads it" for name in others}
        of_run = "of a training run, or hidden; --include with its name uploads it"
        unused = [(name, f"{size:,}", why.get(name, of_run)) for name, size in left.items()]
        print_table(Console(), "Would not be uploaded", ["file", "bytes", "why"], unused, (0, 2))
    return {"would_upload_to": repo_id, "files": len(sizes), "megabytes": round(sum(sizes.values()) / 1e6, 1)}


def _check_folder(folder: Path) -> None:
    """Check that a folder is a whole model that others can load.

    Raises:
        FileNotFoundError: The folder does not exist, or has no config, weights, card, code, tokenizer or image
            processor.
        ValueError: The folder refers to another local folder, or a file is damaged, or is not what was built.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; `llm2clip build MODEL {folder}` creates it.")
    _require(folder, "config.json")
    repo = inspect_repo(folder).require(*OUR_MODELS, hint="Build it first: llm2clip build MODEL FOLDER")
    _require(folder, "*.safetensors")
    if repo.kind is not RepoKind.VISION_HALF and not repo.encoders:
        _require(folder, "tokenizer.json")
    if repo.kind is not RepoKind.TEXT_TOWER:
        _require(folder, "processor_config.json", "preprocessor_config.json")
    if not (targets := code_targets(folder)):
        raise FileNotFoundError(f"{folder} lacks the code of its model (no auto_map in config.json); {BUILD_FIRST}")
    for target in targets:
        if "--" not in target:
            _require(folder, f"{target.split('.')[0]}.py")
    local = [name for name in needed_llms(repo) if not is_hub_id(name)]
    if local:
        raise ValueError(
            f"the LLM of {folder} is in {local[0]}, which others cannot load; `llm2clip build` bundles it or, with "
            "--text-model, refers to its Hub id."
        )
    validate_card(folder)
    refuse_damaged(folder)
    if added := added_files(folder):
        raise ValueError(
            f"{folder} contains {added[0]}, which was not built but would be loaded with the model; delete it, or, if "
            f"it belongs to the model, delete {MODEL_MANIFEST} and {FOLDER_MANIFEST}, which do not list it."
        )


def _require(folder: Path, *patterns: str) -> None:
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise FileNotFoundError(f"{folder} lacks {' or '.join(patterns)}; {BUILD_FIRST}")
