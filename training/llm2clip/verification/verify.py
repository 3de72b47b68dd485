"""The `llm2clip verify` command: whether the files in a folder are those that llm2clip wrote, and what is missing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.command_line.settings import setting
from llm2clip.data.sidecars import verify_sources
from llm2clip.files.manifests import Verified
from llm2clip.files.remote_path import open_path
from llm2clip.store.manifest import MANIFEST_SUFFIX
from llm2clip.store.verify import verify_store
from llm2clip.verification.kinds import KINDS, verify_folder

logger = logging.getLogger(__name__)

SHOWN = 20


class DamagedError(ValueError):
    """Files are damaged or missing."""

    exit_status = 2


@dataclass
class VerifyConfig:
    """Settings of the check."""

    folder: str = setting(
        "",
        "Folder of anything that llm2clip wrote, at any depth: caches, sidecars, checkpoints, models, indexes. Of "
        "sidecars also a URL.",
    )
    sources: bool = setting(
        True, "Read the shards too that sidecars belong to, and compare them with their checksums."
    )


def run(config: VerifyConfig) -> dict[str, Any]:
    """Read everything in a folder that llm2clip wrote, and compare it with its checksums.

    Returns:
        The numbers of what was read: `num_files`, and of embeddings `num_shards` and `num_captions`, `num_images` or
        `num_rows`.

    Raises:
        FileNotFoundError: The folder contains nothing of the kind.
        DamagedError: Something is damaged or missing; each fault is logged with its file and how to fix it. The exit
            status is 2.
    """
    folder = open_path(config.folder)
    verified, manifests = verify_store(folder)
    verified.add(verify_sources(folder, manifests, config.sources))
    if isinstance(folder, Path):
        for local in _folders(folder, verified):
            verified.add(verify_folder(local))
    for remark in verified.remarks:
        logger.warning(remark)
    for fault in verified.faults[:SHOWN]:
        logger.error("%s", fault)
    if verified.faults:
        more = f", the first {SHOWN} of which are above" if len(verified.faults) > SHOWN else ""
        raise DamagedError(f"{len(verified.faults)} faults in {folder}{more}; each says how to fix it.")
    if not verified.counts:
        raise FileNotFoundError(
            f"{folder} contains nothing that can be verified: stored rows (*{MANIFEST_SUFFIX}), {', '.join(KINDS)}."
        )
    logger.info("All of it is as it was written.")
    return dict(verified.counts)


def _folders(folder: Path, verified: Verified) -> Iterator[Path]:
    """Yield a folder and those below it, without hidden ones, which are unfinished; links to others are remarks.

    Raises:
        OSError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, _ in os.walk(folder, onerror=refuse if folder.is_dir() else None):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (link := Path(parent) / name).is_symlink():
                verified.remarks.append(f"{link} is a link to a folder, whose content was not checked.")
        yield Path(parent)
