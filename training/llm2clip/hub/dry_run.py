"""`llm2clip push --dry-run`: what a push would upload, and what stays here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from rich.console import Console

from llm2clip.hub.secrets import refuse_secrets
from llm2clip.hub.upload_files import model_files, read_small
from llm2clip.utils.tables import print_table

OTHER = "no model needs it; --include '{name}' uploads it"
OF_RUN = "of a training run, or hidden; --include with its name uploads it"


def show_upload(folder: Path, repo_id: str, include: Sequence[str] = ()) -> dict[str, Any]:
    """Print the files that a push would upload and those that it would not, with their sizes, and why.

    Args:
        folder: The model, which was checked.
        repo_id: Where it would be pushed to.
        include: Patterns of further files; see [`model_files`].

    Returns:
        `would_upload_to`, the repo; `files` and `megabytes`.

    Raises:
        ValueError: A file to upload is a link out of the folder, or holds an access token or private key; or a pattern
            fits no file.
    """
    uploaded, others = model_files(folder, include)
    refuse_secrets(folder, read_small(uploaded), get_token())
    sizes = {name: path.stat().st_size for name, path in uploaded.items()}
    console = Console()
    rows = [(name, f"{size:,}") for name, size in sizes.items()]
    print_table(console, f"Uploaded to {repo_id}", ["file", "bytes"], rows)
    reasons = {name: OTHER.format(name=name) for name in others}
    left: dict[str, list[int]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in uploaded:
            # A line for each checkpoint of a run, and not for each of its files.
            left[name if name in reasons or "/" not in name else f"{name.split('/')[0]}/"].append(path.stat().st_size)
    if left:
        why = [(name, f"{sum(found):,}", reasons.get(name, OF_RUN)) for name, found in left.items()]
        print_table(console, "Not uploaded", ["file", "bytes", "why"], why, (0, 2))
    return {"would_upload_to": repo_id, "files": len(sizes), "megabytes": round(sum(sizes.values()) / 1e6, 1)}
