"""`llm2clip push`: check a built folder and upload it to the Hub."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.console import Console

from llm2clip.command_line.logs import shortened
from llm2clip.command_line.settings import build_config, refuse, setting
from llm2clip.command_line.tables import print_table
from llm2clip.files.atomic import write_text
from llm2clip.files.manifests import FOLDER_MANIFEST, refuse_damaged
from llm2clip.hub.cards.card import CARD, validate_card
from llm2clip.hub.licenses import check_license
from llm2clip.hub.source_model import validate_folder
from llm2clip.hub.upload import (
    Branch,
    HubError,
    card_for,
    explained,
    open_repo,
    read_branch,
    require_token,
    upload_model,
    weights_replaced,
)
from llm2clip.hub.upload_files import added_files, code_targets, model_files, require_no_secrets
from llm2clip.models.repos import OUR_MODELS, RepoKind, inspect_repo, is_hub_id, needed_llm

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
        "uploaded, with sizes, and what not.",
    )


def push_folder(folder: str | Path, repo_id: str, **settings: Any) -> dict[str, Any]:
    """Check a folder of [`build_folder`] and upload it to the Hub.

    What people wrote on the card on the Hub outside of the marks of ours is kept. An interrupted push can be repeated;
    files that were uploaded before are not sent again.

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
    api = api or HfApi()
    if not config.dry_run:
        require_token(api, config.repo_id)
    _check_folder(folder)
    branch = _read_repo(api, config, folder)
    theirs = None if branch is None else branch.card
    card = card_for(api, config.repo_id, config.revision, (folder / CARD).read_text(encoding="utf-8"), theirs)
    check_license(folder, config.repo_id, card, f"README.md of {config.repo_id} on the Hub" if theirs else None)
    uploaded, others = model_files(folder, config.include)
    if others and not config.dry_run:
        logger.warning("not uploaded, as no model needs them: %s; --include PATTERN uploads them", shortened(others))
    if config.check and any("--" in target for target in code_targets(folder)):
        logger.info("the code of %s is in another repo, so the folder is not loaded before the upload", folder)
    elif config.check:
        logger.info("loading %s here and in a new process, which runs the code in it (skip with --no-check)", folder)
        validate_folder(folder)
        refuse_damaged(folder)  # the code in it may have changed files
    require_no_secrets(folder, uploaded, api.token)
    if config.dry_run:
        return _show_upload(config.repo_id, uploaded, others)
    return _upload(api, config, uploaded, card, branch)


def _read_repo(api: HfApi, config: PushConfig, folder: Path) -> Branch | None:
    """Say what a push would replace in the repo, and return its branch; None if it does not exist, or is not reached.

    Raises:
        ValueError: The repo contains something else; or, unless with `dry_run`, the Hub refuses or is not reached.
    """
    try:
        branch = read_branch(api, config.repo_id, config.revision, str(inspect_repo(folder).model_type))
    except HubError as error:
        if not config.dry_run:
            raise
        logger.warning("what %s holds now is not checked: %s", config.repo_id, error)
        return None
    if not config.create_pr and (replaced := weights_replaced(branch, folder)):
        logger.warning(
            "%s holds other weights, which this push replaces: %s. To keep both, push to another repo; --create-pr "
            "opens a pull request instead",
            *(config.repo_id, replaced),
        )
    return branch


def _upload(
    api: HfApi, config: PushConfig, uploaded: Mapping[str, Path], card: str, known: Branch | None
) -> dict[str, Any]:
    """Upload files with the card for the repo; the Hub refuses if it was changed since it was read, as `known`."""
    model_type = str(inspect_repo(uploaded["config.json"].parent).model_type)
    # None leaves the visibility of a new repo to the default of its owner.
    url, branch = open_repo(api, config.repo_id, config.revision, model_type, config.private or None)
    megabytes = round(sum(path.stat().st_size for path in uploaded.values()) / 1e6, 1)
    logger.info("uploading %d files, %.1f MB, to %s", len(uploaded), megabytes, url.repo_id)
    options = {"revision": config.revision, "create_pr": config.create_pr, "parent_commit": (known or branch).commit}
    with tempfile.TemporaryDirectory() as links, explained(config.repo_id):
        for name, path in uploaded.items():
            Path(links, name).parent.mkdir(parents=True, exist_ok=True)
            Path(links, name).symlink_to(path.resolve())
        Path(links, CARD).unlink()
        write_text(Path(links, CARD), card)
        commit = upload_model(api, url.repo_id, Path(links), uploaded, commit_message=config.commit_message, **options)
    result = {"repo": str(url), "commit": commit.oid, "files": len(uploaded), "megabytes": megabytes}
    return {**result, "pull_request": commit.pr_url} if commit.pr_url else result


def _show_upload(repo_id: str, uploaded: Mapping[str, Path], others: Sequence[str]) -> dict[str, Any]:
    """Print the files that a push would upload with their sizes, and those that it would not."""
    sizes = {name: path.stat().st_size for name, path in uploaded.items()}
    rows = [(name, f"{size:,}") for name, size in sizes.items()]
    print_table(Console(), f"Would be uploaded to {repo_id}", ["file", "bytes"], rows)
    for name in others:
        Console().print(f"Not uploaded: {name}, as no model needs it; --include {name!r} uploads it.", markup=False)
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
    llm = needed_llm(repo)
    if llm and not is_hub_id(llm):
        raise ValueError(
            f"the LLM of {folder} is in {llm}, which others cannot load; `llm2clip build` bundles it or, with "
            "--text-model, refers to its Hub id."
        )
    validate_card(folder)
    refuse_damaged(folder)
    if added := added_files(folder):
        raise ValueError(
            f"{folder} contains {added[0]}, which was not built but would be loaded with the model; delete it, or, if "
            f"it belongs to the model, delete {FOLDER_MANIFEST}, which does not list it."
        )


def _require(folder: Path, *patterns: str) -> None:
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise FileNotFoundError(f"{folder} lacks {' or '.join(patterns)}; {BUILD_FIRST}")
