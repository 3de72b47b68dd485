"""Access tokens and private keys in files that are about to be published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

# Of the Hub, GitHub, AWS, OpenAI and Anthropic, Google, Slack; and private keys.
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{34,}|github_pat_\w{22,}|gh[pousr]_[A-Za-z0-9]{36,}|(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])|"
    rb"sk-[a-z]+-[\w-]{32,}|AIza[\w-]{35}|xox[abpr]-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Characters of a token that a message shows.
SHOWN = 6
# A shorter one may be a word.
SHORTEST = 8


def refuse_secrets(folder: Path, contents: Mapping[str, bytes | Path], token: str | None = None) -> None:
    """Raise a ValueError if a file contains an access token or private key.

    Args:
        folder: Where the files are, for the message.
        contents: The files by name. Only those that are given as bytes are searched, since large files are weights.
        token: The one that the user is logged in with, of any form.
    """
    own = token.encode() if token is not None and len(token) >= SHORTEST else None
    for name, content in contents.items():
        if not isinstance(content, bytes):
            continue
        found = SECRET.search(content)
        secret = own if own is not None and own in content else found and found[0]
        if secret:
            start = secret[:SHOWN].decode(errors="replace")
            raise ValueError(
                f"{folder / name} contains what looks like an access token or private key ({start}...), which "
                "everybody could read; remove it there, and revoke it if others may have seen it."
            )
