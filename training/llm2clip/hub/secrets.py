"""Access tokens and private keys in files that are about to be published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_token

# Of the Hub, GitHub, AWS, OpenAI and Anthropic, Google, Slack; and private keys.
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{34,}|github_pat_\w{22,}|gh[pousr]_[A-Za-z0-9]{36,}|(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])|"
    rb"sk-[a-z]+-[\w-]{32,}|AIza[\w-]{35}|xox[abpr]-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Characters of a token that a message shows; and the least that an own one has, since a shorter one may be a word.
SHOWN, SHORTEST = 6, 8
# Bytes; larger files are weights, and are not searched.
SMALL = 1 << 24


def read_small(folder: Path, uploaded: Mapping[str, Path], token: str | bool | None = None) -> dict[str, bytes | Path]:
    """Read the small files of an upload once, so that what was searched for secrets is what is published.

    Neither code in the folder, which a check runs afterwards, nor a run that writes there changes that.

    Args:
        folder: Where the files are, for the message.
        uploaded: The files by name.
        token: A token besides the one that the user is logged in with; both are searched for too.

    Returns:
        The content of each file; of a large one, its path.

    Raises:
        ValueError: A file contains an access token or private key.
    """
    own = [one.encode() for one in (token, get_token()) if isinstance(one, str) and len(one) >= SHORTEST]
    pattern = re.compile(b"|".join([SECRET.pattern, *map(re.escape, own)]))
    contents: dict[str, bytes | Path] = {}
    for name, path in uploaded.items():
        if path.stat().st_size >= SMALL:
            contents[name] = path
            continue
        contents[name] = content = path.read_bytes()
        if found := pattern.search(content):
            start = found[0][:SHOWN].decode(errors="replace")
            raise ValueError(
                f"{folder / name} contains what looks like an access token or private key ({start}...), which "
                "everybody could read; remove it there, and revoke it if others may have seen it."
            )
    return contents
