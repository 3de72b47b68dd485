"""The license of a model, which follows those of the models that it was made from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import files as distribution_files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from llm2clip.command_line.settings import nearest
from llm2clip.files.atomic import read_json, write_text
from llm2clip.hub.cards.card import CARD, as_list, license_fields, read_card, split_card
from llm2clip.hub.cards.facts import public_name
from llm2clip.hub.upload import explained
from llm2clip.models.repos import encoders_of, hub_ids
from modeling_llm2clip.modeling_llm2clip_utils import find_text_model

logger = logging.getLogger(__name__)

UNKNOWN, OTHER, CODE_LICENSE = "unknown", "other", "apache-2.0"  # ids of the Hub
LICENSE, NOTICE = "LICENSE", "NOTICE"
LICENSE_NAMES = (LICENSE, f"{LICENSE}.txt", f"{LICENSE}.md")
# https://huggingface.co/docs/hub/repositories-licenses
IDS = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other"
)
LICENSE_IDS = tuple(IDS.split())
# A model made from such models may have any license; the last ask for the most.
PERMISSIVE = (
    *("unlicense", "cc0-1.0", "zlib", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cdla-permissive-2.0"),
    *("cc-by-4.0", "apache-2.0"),
)
# An entry of `base_licenses` on a card, as a `Base` is written.
RECORDED, NOT_KNOWN = re.compile(r"(.+) \((.+)\)"), "license not known"
# What names other models; only the settings of a run have the folder of its tower.
NAMING_FILES = (CONFIG_NAME, ADAPTER_CONFIG_NAME, "settings.json")
NAMING_FIELDS = (
    *("model_name_or_path", "base_model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path"),
    *("model", "student"),
)


class Terms(NamedTuple):
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


def _llama(version: str, shown: str = "Built with Llama", beginning: str = "Llama", name: str = "Llama") -> Terms:
    pattern = rf"\bLlama-?{re.escape(version)}(?![.\dBb])"
    owner = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    notice = f"{name} {version} is licensed under the {name} {version} Community License, {owner}"
    return Terms(f"llama{version}", pattern, notice, shown, beginning)


GEMMA = (
    r"\bgemma-(1\.1-|2-|3-|3n-)?E?\d+[bBm]\b",  # Gemma 4 is under Apache-2.0
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
LLAMA_3 = _llama("3", "Built with Meta Llama 3", "Llama 3", "Meta Llama")
TERMS = {terms.license: terms for terms in (LLAMA_3, *map(_llama, ("3.1", "3.2", "3.3")), Terms("gemma", *GEMMA))}


class Base(NamedTuple):
    """A model that another one was made from, under one of its licenses.

    Attributes:
        name: Hub id or folder.
        folder: That folder, or one with its card and license from the Hub; None if it cannot be read.
        stated: Its license as a card states it, by the names in `LICENSE_FIELDS`.
    """

    name: str
    folder: Path | None
    stated: Mapping[str, str]

    @property
    def license(self) -> str:
        """Name or id of its license; `unknown` if it is not known."""
        return self.stated.get("license_name") or self.stated.get("license", UNKNOWN)

    @property
    def binds(self) -> bool:
        """Whether what is made from it has to be under its license, or under terms that keep it."""
        return self.license not in (UNKNOWN, *PERMISSIVE)

    def allows(self, license: str | None) -> bool:
        """Tell whether what is made from it may be under a license."""
        return not self.binds or license in (self.stated["license"], self.license, OTHER)

    def __str__(self) -> str:
        return f"{public_name(self.name)} ({NOT_KNOWN if self.license == UNKNOWN else self.license})"


class ModelLicense(NamedTuple):
    """The license of a model.

    Attributes:
        stated: Fields of its card, by the names in `LICENSE_FIELDS`; empty if no license is stated.
        bases: The models that it was made from.
    """

    stated: Mapping[str, str]
    bases: list[Base]

    @property
    def name(self) -> str:
        """Name or id of the license; `unknown` if none is stated."""
        return Base("", None, self.stated).license

    @property
    def terms(self) -> list[Terms]:
        """What it and the licenses of the bases demand."""
        licenses = dict.fromkeys((self.name, *(base.license for base in self.bases)))
        return [TERMS[license] for license in licenses if license in TERMS]

    def facts(self) -> dict[str, Any]:
        """Return what the card says of it, as fields of [`CardFacts`]."""
        shown = dict.fromkeys(terms.shown for terms in self.terms if terms.shown)
        return {**self.stated, "base_licenses": [str(base) for base in self.bases], "shown": list(shown)}

    def check_repo_name(self, repo_id: str) -> None:
        """Raise a `ValueError` if a license demands another beginning of the name of the repo."""
        for terms in self.terms:
            bare, beginning = (re.sub(r"[-_. ]", "", x) for x in (repo_id.split("/")[-1], terms.beginning))
            if not bare.startswith(beginning):
                raise ValueError(
                    f"under {terms.license}, the name of the repo has to begin with {terms.beginning!r}, unlike "
                    f"{repo_id}: push to another repo."
                )

    def write_files(self, folder: Path, source: Path) -> None:
        """Write the text of the license, of those whose terms bind, of that of the code, and NOTICE.

        Of a license whose text no base has, the card has the name; what has to be there is missed in a warning.

        Args:
            folder: The model, with its code.
            source: Folder of the card of the model that it was made of.
        """
        if self.name == CODE_LICENSE:
            write_text(folder / LICENSE, code_license())
        elif any(folder.glob("*.py")):
            write_text(folder / f"{LICENSE}-CODE", code_license())
        holders = [Base("", source, license_fields(read_card(source)[0])), *self.bases]
        for license in {terms.license for terms in self.terms} | ({self.name} - {UNKNOWN, CODE_LICENSE}):
            folders = [base.folder for base in holders if base.folder is not None and base.license == license]
            paths = [source / f"{LICENSE}-{license}", *(path / name for path in folders for name in LICENSE_NAMES)]
            if text := next((_read(path) for path in paths if path.is_file()), ""):
                write_text(folder / (LICENSE if license == self.name else f"{LICENSE}-{license}"), text)
        notice = _read(source / NOTICE)
        if notice := notice + "".join(f"{terms.notice}\n" for terms in self.terms if terms.notice not in notice):
            write_text(folder / NOTICE, notice)
        self.warn_of_missing_texts(folder)

    def warn_of_missing_texts(self, folder: Path) -> None:
        """Name the licenses that ask for a copy of their text, which a folder lacks."""
        for license in (terms.license for terms in self.terms):
            names = LICENSE_NAMES if license in self.stated.values() else (f"{LICENSE}-{license}",)
            if not any((folder / name).is_file() for name in names):
                logger.warning(
                    "the license %s asks for a copy of its text, which is not there: put it into the model's folder "
                    "as %s",
                    *(license, names[0]),
                )


def strictest(bases: list[Base]) -> ModelLicense:
    """Return the license of the strictest base; none is stated if that of one is not known, or if several bind."""
    if binding := {base.license: base for base in bases if base.binds}:
        license, base = binding.popitem()
        stated = {} if binding else {"license": license} if license in TERMS else dict(base.stated)
        return ModelLicense(stated, bases)
    licenses = [base.license for base in bases]
    is_known = bool(licenses) and UNKNOWN not in licenses
    return ModelLicense({"license": max(licenses, key=PERMISSIVE.index)} if is_known else {}, bases)


def choose_license(
    given: Mapping[str, str], card: Mapping[str, Any], bases: list[Base], where: str = ""
) -> ModelLicense:
    """Return the license of a model: that which is given, else that on its card, else the strictest of its bases.

    Args:
        given: The license that somebody chose, as fields of a card; empty if nobody did.
        card: Front matter of the card of the model.
        bases: The models that it was made from.
        where: The card that has to state it, where there are no options for it.

    Raises:
        ValueError: The Hub does not know the license, it does not keep those of the bases, or several of these bind.
    """
    advice = "write license: {} into " + where if where else "give --license {}"
    fields = "license_name and license_link" if where else "--license-name and --license-link"
    other = f"{advice.format(OTHER)} with {fields}"
    if stated := dict(given) or (license_fields(card) if card.get("license") else {}):
        place = "--license {}" if given else "license: {} " + (f"in {where}" if where else "on its card")
        license = stated["license"] = license_id(stated["license"], place)
        for base in bases:
            if not base.allows(license):
                raise ValueError(
                    f"{place.format(license)} does not keep the license of {base}, which the model was made from: "
                    f"{advice.format(base.stated['license'])}, or {other}."
                )
        return ModelLicense(stated, bases)
    listed = " and ".join(str(base) for base in bases if base.binds)
    if not (chosen := strictest(bases)).stated and listed:
        raise ValueError(f"the model was made from {listed}, so that no license is right: {other}, to keep all.")
    return chosen


def license_id(given: str, place: str) -> str:
    """Return the id of a license on the Hub; capital letters do not count.

    Args:
        given: The id as somebody wrote it.
        place: What states it, with `{}` for the id, for the message.

    Raises:
        ValueError: The Hub has no such id.
    """
    license = given.strip().lower()
    if license not in LICENSE_IDS:
        raise ValueError(
            f"{place.format(given)}: the Hub has no license of this id{nearest(license, LICENSE_IDS)} One without an "
            f"id is {OTHER}, with its name and link."
        )
    return license


def license_of_name(name: str) -> str | None:
    """Return the license of a model whose name says what it is, such as `Llama-3.1-8B`; None for all others."""
    last = re.split(r"[/\\]", name)[-1]
    return next((terms.license for terms in TERMS.values() if re.search(terms.names, last)), None)


def bases_of(source: Path, others: Iterable[str] = ()) -> list[Base]:
    """Find the models that a model was made from, with their licenses.

    They are named by its card, config and settings of a run. Folders among them are followed to the models that they
    name in turn. What a card recorded of them (`base_licenses`) is not asked for again. That a model is Llama or Gemma
    is said by its name too, whatever its card says, and so without network.

    Args:
        source: Folder of the model, or of its card. It is among the result only if its NOTICE is that of a license.
        others: Further models that it was made from.

    Raises:
        ValueError: A card or config in a folder is damaged.
    """
    bases: list[Base] = []
    seen: set[str] = set()
    waiting = [str(source), *others]
    while waiting:
        name = waiting.pop(0)
        is_folder, is_source = Path(name).is_dir(), not seen
        if (key := str(Path(name).resolve()) if is_folder else name) in seen:
            continue
        seen.add(key)
        folder = folder_of_card(name)
        card = {} if folder is None else read_card(folder)[0]
        entries = [RECORDED.fullmatch(str(entry)) for entry in as_list(card.get("base_licenses"))]
        found = [Base(entry[1], None, {"license": entry[2]}) for entry in entries if entry and entry[2] != NOT_KNOWN]
        parents = [*as_list(card.get("base_model")), *_references(Path(name))] if is_folder else []
        own = list(_licensed(name, folder, {} if is_source else card, by_name=not is_source))
        if is_source or parents or found:  # a run whose card states nothing is under the licenses of its bases
            own = [base for base in own if base.license not in (UNKNOWN, *(other.license for other in found))]
        bases += own + found
        waiting += [parent for parent in parents if public_name(parent) not in {base.name for base in found}]
    return list({str(base): base for base in reversed(bases)}.values())[::-1]


def _licensed(name: str, folder: Path | None, card: Mapping[str, Any], by_name: bool) -> Iterator[Base]:
    """Yield a model once for each license of `TERMS` that its name or NOTICE says, and for each on its card."""
    said = [terms.license for terms in TERMS.values() if folder and terms.notice in _read(folder / NOTICE)]
    if by_name and (license := license_of_name(name)):
        said.append(license)
    yield from (Base(name, folder, {"license": license}) for license in dict.fromkeys(said))
    for license in as_list(card.get("license")) or [UNKNOWN]:
        base = Base(name, folder, {**license_fields(card), "license": str(license).lower()})
        if base.license not in said and (base.binds or not said):
            yield base


def folder_of_card(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of the card and the license of a model, here or on the Hub; None if they cannot be read."""
    if Path(name).is_dir():
        return Path(name)
    if not hub_ids(name):
        return None
    try:
        with explained(name):
            return Path(snapshot_download(name, revision=revision, allow_patterns=[CARD, f"{LICENSE}*", NOTICE]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("the card of %s, which states its license, cannot be read (%s)", name, reason)
        return None


def _references(folder: Path) -> Iterator[str]:
    for path in (folder / file for file in NAMING_FILES):
        fields = read_json(path) if path.is_file() else {}
        models = [*(model for name in NAMING_FIELDS if (model := fields.get(name))), *encoders_of(fields)]
        yield from (find_text_model(model, folder)[0] for model in models)


def check_license(folder: Path, repo_id: str, card: str, where: str | None = None) -> None:
    """Check that a folder that is pushed keeps the licenses of what the model was made from.

    Args:
        folder: The model.
        repo_id: Where it is pushed to.
        card: Its card as it will be there.
        where: What states the license of that card; by default the card in the folder.

    Raises:
        ValueError: It does not; the message names all that is missing.
    """
    own, (data, text) = str(folder / CARD), split_card(card)
    bases, notice = bases_of(folder), _read(folder / NOTICE)
    choose_license({}, read_card(folder)[0], bases, own)
    license = choose_license({}, data, bases, where or own)
    binding = [str(base) for base in bases if base.binds]
    stated = f"README.md has to state license: {license.stated.get('license')}"
    demands = {stated: bool(data.get("license")) or not binding}
    for terms in license.terms:
        demands[f"README.md has to show {terms.shown!r}"] = terms.shown in text
        demands[f"{NOTICE} has to contain the line {terms.notice!r}"] = terms.notice in notice
    if broken := [demand for demand, is_kept in demands.items() if not is_kept]:
        made = f", made from {' and '.join(binding)}," if binding else ""
        raise ValueError(f"{folder}{made} is under {license.name}, which demands more: {'; '.join(broken)}.")
    license.check_repo_name(repo_id)
    license.warn_of_missing_texts(folder)


def code_license() -> str:
    """Return the text of the license of the code.

    Raises:
        FileNotFoundError: This installation lacks it.
    """
    licenses = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not licenses:
        raise FileNotFoundError("this installation of llm2clip has no LICENSE file; install it again.")
    return licenses[0].read_text(encoding="utf-8")


def _read(path: Path) -> str:
    """Return the text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
