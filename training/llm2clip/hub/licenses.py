"""The license of a model, which follows those of the models that it was made from; Llama and Gemma ask for more."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import files as distribution_files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from llm2clip.hub.cards.card import CARD, as_list, license_fields, read_card
from llm2clip.hub.cards.facts import public_name
from llm2clip.hub.upload import explained
from llm2clip.utils.files import read_json, write_text
from llm2clip.utils.repos import hub_ids, names_of
from modeling_llm2clip.modeling_llm2clip_utils import find_text_model

logger = logging.getLogger(__name__)

LICENSE, CODE_LICENSE_FILE, NOTICE = "LICENSE", "LICENSE-CODE", "NOTICE"
LICENSE_NAMES = (LICENSE, f"{LICENSE}.txt", f"{LICENSE}.md")
CODE_LICENSE = "apache-2.0"
UNKNOWN = "unknown"  # an id of the Hub too
# A model made from such models may have any license; the last ask for the most.
PERMISSIVE = (
    *("unlicense", "cc0-1.0", "zlib", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cdla-permissive-2.0"),
    *("cc-by-4.0", "apache-2.0"),
)
# Fields that name other models, by file; the settings of a run are the only place that has the folder of its tower.
REFERENCES = {
    CONFIG_NAME: ("text_model_name_or_path",),
    ADAPTER_CONFIG_NAME: ("base_model_name_or_path",),
    "settings.json": ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path"),
}
META = "Copyright © Meta Platforms, Inc. All Rights Reserved."
OTHER = "--license other with --license-name and --license-link"


@dataclass(frozen=True)
class Terms:
    """What a license demands of every model that was made from one under it.

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


class Base(NamedTuple):
    """A model that another one was made from.

    Attributes:
        name: Hub id or folder.
        folder: That folder, or one with its card and license from the Hub; None if it cannot be read.
        stated: Its license as a card states it, by the names in `LICENSE_FIELDS`.
        has_parents: Whether its folder says what it was made from.
    """

    name: str
    folder: Path | None
    stated: Mapping[str, str]
    has_parents: bool = False

    @property
    def license(self) -> str:
        """Name or id of its license; `unknown` if it is not known."""
        return self.stated.get("license_name") or self.stated.get("license", UNKNOWN)

    def __str__(self) -> str:
        license = "license not known" if self.license == UNKNOWN else self.license
        return f"{public_name(self.name)} ({license})"


def license_model(given: Mapping[str, str], card: Mapping[str, Any], bases: Sequence[Base]) -> dict[str, Any]:
    """Return the license of a model: that which is given, else that on its card, else the strictest of its bases.

    Args:
        given: The license that somebody chose, as fields of a card; empty if nobody did.
        card: Front matter of the card of the model.
        bases: The models that it was made from.

    Returns:
        Fields of its card, by the names in `LICENSE_FIELDS`; empty if no license is stated.

    Raises:
        ValueError: The license does not keep those of the bases, or several of these ask for their own.
    """
    stated = dict(given) or (license_fields(card) if card.get("license") else {}) or _strictest(bases)
    license = stated.get("license")
    for base in bases:
        if license in (base.stated.get("license"), base.license, "other", None):
            continue
        if base.license in TERMS or (license in PERMISSIVE and base.license not in (UNKNOWN, *PERMISSIVE)):
            where = f"--license {license}" if given else f"license: {license} on its card"
            raise ValueError(
                f"{where} does not keep the license of {base}, which the model was made from: give --license "
                f"{base.stated['license']}, or {OTHER}."
            )
    return stated


def _strictest(bases: Sequence[Base]) -> dict[str, str]:
    """Return the license that the strictest base states; empty if one is not known and none binds."""
    binding = {base.license: base for base in bases if base.license not in (UNKNOWN, *PERMISSIVE)}
    if len(binding) > 1:
        listed = " and ".join(map(str, binding.values()))
        raise ValueError(
            f"this model was made from {listed}, so that no license is right: give {OTHER}, for terms that keep all."
        )
    if binding:
        (base,) = binding.values()
        return {"license": base.license} if base.license in TERMS else dict(base.stated)
    licenses = [base.license for base in bases]
    return {"license": max(licenses, key=PERMISSIVE.index)} if licenses and UNKNOWN not in licenses else {}


def terms_of(bases: Iterable[Base]) -> list[Terms]:
    """Return what the licenses of the models that a model was made from demand of it."""
    return list(dict.fromkeys(TERMS[base.license] for base in bases if base.license in TERMS))


def bases_of(source: Path, others: Iterable[str] = ()) -> list[Base]:
    """Find the models that a model was made from, with their licenses.

    They are named by its card (`base_model`), config and settings of a run. Folders among them are followed to the
    models that they name in turn; of a model on the Hub, its own card counts, or its name if that says what it is.

    Args:
        source: Folder of the model, or of its card. It is among the result only if that has a license of `TERMS`.
        others: Further models that it was made from.

    Raises:
        ValueError: A card or config in a folder is damaged.
    """
    bases_of_model: dict[str, list[Base]] = {}
    waiting = [str(source), *others]
    while waiting:
        name = waiting.pop(0)
        is_folder = Path(name).is_dir()
        key = str(Path(name).resolve()) if is_folder else name
        if key in bases_of_model:
            continue
        folder = Path(name) if is_folder else _card_on_hub(name)
        card = {} if folder is None else read_card(folder)[0]
        licenses = list(map(str, as_list(card.get("license")))) or [license_of_name(name) or UNKNOWN]
        parents = [*as_list(card.get("base_model")), *_references(Path(name))] if is_folder else []
        bases_of_model[key] = [
            Base(name, folder, {**license_fields(card), "license": license}, bool(parents)) for license in licenses
        ]
        waiting += parents
    of_source, *of_others = bases_of_model.values()
    own_terms = [base for base in of_source if base.license in TERMS]
    bases = [base for of_model in of_others for base in of_model]
    # A run whose card states nothing is under the licenses of what it was trained from.
    return own_terms + [base for base in bases if base.license != UNKNOWN or not base.has_parents]


def license_of_name(name: str) -> str | None:
    """Return the license of a model whose name says what it is, such as `Llama-3.1-8B`; None for all others."""
    last = re.split(r"[/\\]", name)[-1]
    return next((terms.license for terms in TERMS.values() if re.search(terms.names, last)), None)


def _card_on_hub(name: str) -> Path | None:
    """The folder of the card and the license of a model on the Hub; None if they cannot be read."""
    if not hub_ids(name):
        return None
    try:
        with explained(name):
            return Path(snapshot_download(name, allow_patterns=[CARD, f"{LICENSE}*"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("the card of %s, which states its license, cannot be read (%s)", name, reason)
        return None


def _references(folder: Path) -> Iterator[str]:
    for file, names in REFERENCES.items():
        fields = read_json(folder / file) if (folder / file).is_file() else {}
        models = (model for name in names for model in names_of(fields.get(name)))
        yield from (find_text_model(model, folder)[0] for model in models)


def write_license_files(folder: Path, source: Path, stated: Mapping[str, str], bases: Sequence[Base]) -> None:
    """Write the license of a built model, those whose terms bind it, that of its code, and NOTICE.

    Of a license without a file, the card has the name.

    Args:
        folder: The model, with its code.
        source: Folder of the card of the model that it was built from.
        stated: Its license, see [`license_model`].
        bases: The models that it was made from.
    """
    license_of_model, terms = Base(str(folder), None, stated).license, terms_of(bases)
    if license_of_model == CODE_LICENSE:
        write_text(folder / LICENSE, code_license())
    elif any(folder.glob("*.py")):
        write_text(folder / CODE_LICENSE_FILE, code_license())
    holders = [Base(str(source), source, license_fields(read_card(source)[0])), *bases]
    for license in {demanded.license for demanded in terms} | ({license_of_model} - {UNKNOWN, CODE_LICENSE}):
        paths = [source / f"{LICENSE}-{license}"]
        folders = [base.folder for base in holders if base.folder is not None and base.license == license]
        paths += [holder / file for holder in folders for file in LICENSE_NAMES]
        name = LICENSE if license == license_of_model else f"{LICENSE}-{license}"
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
        if text := next(texts, None):
            write_text(folder / name, text)
        elif license in TERMS:
            logger.warning(
                "the license %s asks for a copy of its text, which the folders and repos of this model do not have: "
                "put it into the built folder as %s",
                license,
                name,
            )
    notice = read_notice(source)
    if notice := notice + "".join(f"{demanded.notice}\n" for demanded in terms if demanded.notice not in notice):
        write_text(folder / NOTICE, notice)


def code_license() -> str:
    """The text of the license of the code.

    Raises:
        FileNotFoundError: This installation lacks it.
    """
    licenses = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not licenses:
        raise FileNotFoundError("this installation of llm2clip has no LICENSE file; install it again.")
    return licenses[0].read_text(encoding="utf-8")


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
        demands = {
            f"README.md has to state license: {terms.license}, or other with its name and link": stated[0]
            in (terms.license, "other"),
            f"the name of the repo has to begin with {terms.beginning!r}, unlike {repo_id}": terms.fits_name(repo_id),
            f"README.md has to show {terms.shown!r}": terms.shown in text,
            f"{NOTICE} has to contain the line {terms.notice!r}": terms.notice in notice,
        }
        if broken := [demand for demand, is_kept in demands.items() if not is_kept]:
            raise ValueError(f"{folder} is under {terms.license}, which demands more: {'; '.join(broken)}.")
        names = LICENSE_NAMES if terms.license in stated else (f"{LICENSE}-{terms.license}",)
        if not any((folder / name).is_file() for name in names):
            logger.warning(
                "the license %s asks for a copy of its text, which %s does not have: put it there as %s",
                *(terms.license, folder, names[0]),
            )


def read_notice(folder: Path) -> str:
    """Read the file NOTICE of a folder; empty if it has none."""
    path = folder / NOTICE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
