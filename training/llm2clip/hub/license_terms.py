"""What the licenses of some models demand of every model that was made from one of them."""

from __future__ import annotations

import re
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
        bare, beginning = (re.sub(r"[-_. ]", "", text) for text in (name.split("/")[-1], self.beginning))
        return bare.startswith(beginning)


def _llama(version: str, shown: str, beginning: str, name: str) -> Terms:
    pattern = rf"\bLlama-?{re.escape(version)}(?![.\dBb])"
    notice = f"{name} is licensed under the {name} Community License, {META}"
    return Terms(f"llama{version}", pattern, notice, shown, beginning)


# Gemma 4 is under Apache-2.0.
GEMMA = r"\bgemma-(1\.1-|2-|3-|3n-)?E?\d+[bBm]\b"
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
TERMS = {
    terms.license: terms
    for terms in (
        _llama("3", "Built with Meta Llama 3", "Llama 3", "Meta Llama 3"),
        *(_llama(version, "Built with Llama", "Llama", f"Llama {version}") for version in ("3.1", "3.2", "3.3")),
        Terms("gemma", GEMMA, GEMMA_NOTICE),
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
    for terms in TERMS.values():
        if terms.license not in stated and terms.notice not in notice:
            continue
        problems = {
            f"README.md has to state license: {terms.license}, or other with its name and link": stated[0]
            in (terms.license, "other"),
            f"the name of the repo has to begin with {terms.beginning!r}, unlike {repo_id}": terms.fits_name(repo_id),
            f"README.md has to show {terms.shown!r}": terms.shown in text,
            f"{NOTICE} has to contain the line {terms.notice!r}": terms.notice in notice,
        }
        if found := [problem for problem, is_kept in problems.items() if not is_kept]:
            raise ValueError(f"{folder} is under {terms.license}, which demands more: {'; '.join(found)}.")


def read_notice(folder: Path) -> str:
    """Read the file NOTICE of a folder; empty if it has none."""
    path = folder / NOTICE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
