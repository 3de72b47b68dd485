"""What the licenses of some models demand of every model that was made from one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llm2clip.hub.cards.card import read_card

NOTICE = "NOTICE"
META = "Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Terms:
    """The terms of a license.

    Attributes:
        license: Id of the license on the Hub.
        names: What is in the name of a model under it, as a regular expression.
        notice: Line that the file NOTICE has to have.
        shown: Words that the card has to show.
        beginning: With which the name of the model has to begin; `-`, `_`, `.` and spaces do not count.
    """

    license: str
    names: str
    notice: str
    shown: str = ""
    beginning: str = ""

    def fits_name(self, name: str) -> bool:
        """Whether a name, or that in a Hub id, begins as it has to."""
        return _joined(name.split("/")[-1]).startswith(_joined(self.beginning))


TERMS = {
    terms.license: terms
    for terms in (
        Terms(
            "llama3",
            r"\bLlama-?3(?![.\dBb])",
            f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {META}",
            "Built with Meta Llama 3",
            "Llama 3",
        ),
        Terms(
            "llama3.1",
            r"\bLlama-?3\.1(?!\d)",
            f"Llama 3.1 is licensed under the Llama 3.1 Community License, {META}",
            "Built with Llama",
            "Llama",
        ),
        Terms(
            "llama3.2",
            r"\bLlama-?3\.2(?!\d)",
            f"Llama 3.2 is licensed under the Llama 3.2 Community License, {META}",
            "Built with Llama",
            "Llama",
        ),
        Terms(
            "llama3.3",
            r"\bLlama-?3\.3(?!\d)",
            f"Llama 3.3 is licensed under the Llama 3.3 Community License, {META}",
            "Built with Llama",
            "Llama",
        ),
        Terms(
            "gemma",
            # Gemma 4 is under Apache-2.0.
            r"\bgemma-(1\.1-|2-|3-|3n-)?E?\d+[bBm]\b",
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
    )
}


def license_of_name(name: str) -> str | None:
    """Return the license of a model whose name says what it is, such as `Llama-3.1-8B`; None for all others."""
    last = re.split(r"[/\\]", name)[-1]
    return next((terms.license for terms in TERMS.values() if re.search(terms.names, last)), None)


def check_terms(folder: Path, repo_id: str) -> None:
    """Check that a folder and the repo that it is pushed to keep the terms of the license on its card or in NOTICE.

    Raises:
        ValueError: They do not; the message names all that is missing.
    """
    data, text = read_card(folder)
    notice = read_notice(folder)
    stated = (data.get("license"), data.get("license_name"))
    problems: list[str] = []
    for terms in TERMS.values():
        if terms.license not in stated and terms.notice not in notice:
            continue
        if stated[0] not in (terms.license, "other"):
            problems.append(f"README.md has to state license: {terms.license}, or other with its name and link")
        if not terms.fits_name(repo_id):
            problems.append(f"the name of the repo has to begin with {terms.beginning!r}, unlike {repo_id}")
        if terms.shown not in text:
            problems.append(f"README.md has to show {terms.shown!r}")
        if terms.notice not in notice:
            problems.append(f"{NOTICE} has to contain the line {terms.notice!r}")
        if problems:
            raise ValueError(f"{folder} is under {terms.license}, which demands more: {'; '.join(problems)}.")


def read_notice(folder: Path) -> str:
    """Read the file NOTICE of a folder; empty if it has none."""
    path = folder / NOTICE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def notice_with(text: str, terms: Iterable[Terms]) -> str:
    """Add the lines that terms demand to the text of a NOTICE, unless it has them."""
    return text + "".join(f"{entry.notice}\n" for entry in terms if entry.notice not in text)


def _joined(name: str) -> str:
    return re.sub(r"[-_. ]", "", name)
