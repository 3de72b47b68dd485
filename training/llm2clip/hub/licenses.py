"""The license of a model, which follows those of the models that it was made from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import files as distribution_files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from llm2clip.hub.cards.card import CARD, as_list, license_fields, read_card, split_card
from llm2clip.hub.cards.facts import public_name
from llm2clip.hub.license_terms import OTHER, PERMISSIVE, TERMS, UNKNOWN, Terms, license_id, license_of_name
from llm2clip.hub.upload import explained
from llm2clip.utils.files import read_json, write_text
from llm2clip.utils.repos import encoders_of, hub_ids, names_of
from modeling_llm2clip.modeling_llm2clip_utils import find_text_model

logger = logging.getLogger(__name__)

LICENSE, CODE_LICENSE_FILE, NOTICE = "LICENSE", "LICENSE-CODE", "NOTICE"
LICENSE_NAMES = (LICENSE, f"{LICENSE}.txt", f"{LICENSE}.md")
CODE_LICENSE = "apache-2.0"
NOT_KNOWN = "license not known"
# An entry of `base_licenses` on a card, as a `Base` is written.
RECORDED = re.compile(r"(.+) \((.+)\)")
# What names other models; only the settings of a run have the folder of its tower.
NAMING_FILES = (CONFIG_NAME, ADAPTER_CONFIG_NAME, "settings.json")
NAMING_FIELDS = (
    *("model_name_or_path", "base_model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path"),
    *("model", "student"),
)


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
        """Whether what is made from it may be under a license."""
        return not self.binds or license in (self.stated["license"], self.license, OTHER)

    def __str__(self) -> str:
        return f"{public_name(self.name)} ({NOT_KNOWN if self.license == UNKNOWN else self.license})"


def strictest(bases: Sequence[Base]) -> dict[str, str]:
    """The license of the strictest base, as fields of a card; empty if one is not known, or if several bind."""
    if binding := {base.license: base for base in bases if base.binds}:
        license, base = binding.popitem()
        return {} if binding else {"license": license} if license in TERMS else dict(base.stated)
    licenses = [base.license for base in bases]
    return {"license": max(licenses, key=PERMISSIVE.index)} if licenses and UNKNOWN not in licenses else {}


def license_model(
    given: Mapping[str, str], card: Mapping[str, Any], bases: Sequence[Base], where: str = ""
) -> dict[str, str]:
    """Return the license of a model: that which is given, else that on its card, else the strictest of its bases.

    Args:
        given: The license that somebody chose, as fields of a card; empty if nobody did.
        card: Front matter of the card of the model.
        bases: The models that it was made from.
        where: The card that has to state it, where there are no options for it.

    Returns:
        Fields of its card, by the names in `LICENSE_FIELDS`; empty if no license is stated.

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
        return stated
    listed = " and ".join(str(base) for base in bases if base.binds)
    if not (stated := strictest(bases)) and listed:
        raise ValueError(f"the model was made from {listed}, so that no license is right: {other}, to keep all.")
    return stated


def terms_of(stated: Mapping[str, str], bases: Iterable[Base]) -> list[Terms]:
    """Return what the license of a model, and those of the models that it was made from, demand of it."""
    licenses = (base.license for base in (Base("", None, stated), *bases))
    return list(dict.fromkeys(TERMS[license] for license in licenses if license in TERMS))


def license_facts(stated: Mapping[str, str], bases: Sequence[Base]) -> dict[str, Any]:
    """What the card of a model says of its license, as fields of [`CardFacts`]."""
    shown = [terms.shown for terms in terms_of(stated, bases) if terms.shown]
    return {**stated, "base_licenses": [str(base) for base in bases], "shown": list(dict.fromkeys(shown))}


def bases_of(source: Path, others: Iterable[str] = ()) -> list[Base]:
    """Find the models that a model was made from, with their licenses.

    They are named by its card, config and settings of a run. Folders among them are followed to the models that they
    name in turn. What a card recorded of them (`base_licenses`) is not asked for again. That a model is Llama or Gemma
    is said by its name too, whatever its card says, and so without network.

    Args:
        source: Folder of the model, or of its card. It is among the result only if that has a license of `TERMS`.
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
        folder = Path(name) if is_folder else _card_on_hub(name)
        card = {} if folder is None else read_card(folder)[0]
        entries = [RECORDED.fullmatch(str(entry)) for entry in as_list(card.get("base_licenses"))]
        found = [Base(entry[1], None, {"license": entry[2]}) for entry in entries if entry and entry[2] != NOT_KNOWN]
        parents = [*as_list(card.get("base_model")), *_references(Path(name))] if is_folder else []
        own = list(_licensed(name, folder, card, by_name=not is_source))
        if is_source:
            own = [base for base in own if base.license in TERMS.keys() - {base.license for base in found}]
        elif parents or found:  # a run whose card states nothing is under the licenses of what it was trained from
            own = [base for base in own if base.license != UNKNOWN]
        bases += own + found
        waiting += [parent for parent in parents if public_name(parent) not in {base.name for base in found}]
    return list({str(base): base for base in reversed(bases)}.values())[::-1]


def _licensed(name: str, folder: Path | None, card: Mapping[str, Any], by_name: bool) -> Iterator[Base]:
    """Yield a model once for each license of `TERMS` that its name or NOTICE says, and for each on its card."""
    said = [terms.license for terms in TERMS.values() if folder and terms.notice in read_notice(folder)]
    if by_name and (license := license_of_name(name)):
        said.append(license)
    yield from (Base(name, folder, {"license": license}) for license in dict.fromkeys(said))
    for license in as_list(card.get("license")) or [UNKNOWN]:
        base = Base(name, folder, {**license_fields(card), "license": str(license).lower()})
        if base.license not in said and (base.binds or not said):
            yield base


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
    for path in (folder / file for file in NAMING_FILES):
        fields = read_json(path) if path.is_file() else {}
        models = [*(model for name in NAMING_FIELDS for model in names_of(fields.get(name))), *encoders_of(fields)]
        yield from (find_text_model(model, folder)[0] for model in models)


def write_license_files(folder: Path, source: Path, stated: Mapping[str, str], bases: Sequence[Base]) -> None:
    """Write the license of a model, those whose terms bind it, that of its code, and NOTICE.

    Of a license without a file, the card has the name.

    Args:
        folder: The model, with its code.
        source: Folder of the card of the model that it was made of.
        stated: Its license, see [`license_model`].
        bases: The models that it was made from.
    """
    license_of_model, terms = Base(str(folder), None, stated).license, terms_of(stated, bases)
    if license_of_model == CODE_LICENSE:
        write_text(folder / LICENSE, code_license())
    elif any(folder.glob("*.py")):
        write_text(folder / CODE_LICENSE_FILE, code_license())
    holders = [Base(str(source), source, license_fields(read_card(source)[0])), *bases]
    for license in {demanded.license for demanded in terms} | ({license_of_model} - {UNKNOWN, CODE_LICENSE}):
        paths = [source / f"{LICENSE}-{license}"]
        folders = [base.folder for base in holders if base.folder is not None and base.license == license]
        paths += [holder / file for holder in folders for file in LICENSE_NAMES]
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
        if text := next(texts, None):
            write_text(folder / (LICENSE if license == license_of_model else f"{LICENSE}-{license}"), text)
    notice = read_notice(source)
    if notice := notice + "".join(f"{demanded.notice}\n" for demanded in terms if demanded.notice not in notice):
        write_text(folder / NOTICE, notice)
    _warn_of_missing_texts(folder, stated, terms)


def code_license() -> str:
    """The text of the license of the code.

    Raises:
        FileNotFoundError: This installation lacks it.
    """
    licenses = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not licenses:
        raise FileNotFoundError("this installation of llm2clip has no LICENSE file; install it again.")
    return licenses[0].read_text(encoding="utf-8")


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
    data, text = split_card(card)
    bases, notice = bases_of(folder), read_notice(folder)
    for fields, place in ((read_card(folder)[0], str(folder / CARD)), (data, where or str(folder / CARD))):
        stated = license_model({}, fields, bases, place)
    binding = [str(base) for base in bases if base.binds]
    demands = {f"README.md has to state license: {stated.get('license')}": bool(data.get("license")) or not binding}
    for terms in terms_of(stated, bases):
        demands[f"README.md has to show {terms.shown!r}"] = terms.shown in text
        demands[f"{NOTICE} has to contain the line {terms.notice!r}"] = terms.notice in notice
    if broken := [demand for demand, is_kept in demands.items() if not is_kept]:
        made = f", made from {' and '.join(binding)}," if binding else ""
        license = Base("", None, stated).license
        raise ValueError(f"{folder}{made} is under {license}, which demands more: {'; '.join(broken)}.")
    check_repo_name(repo_id, stated, bases)
    _warn_of_missing_texts(folder, stated, terms_of(stated, bases))


def check_repo_name(repo_id: str, stated: Mapping[str, str], bases: Sequence[Base]) -> None:
    """Raise a `ValueError` if a license demands another beginning of the name of the repo."""
    for terms in terms_of(stated, bases):
        if not terms.fits_name(repo_id):
            raise ValueError(
                f"under {terms.license}, the name of the repo has to begin with {terms.beginning!r}, unlike "
                f"{repo_id}: push to another repo."
            )


def _warn_of_missing_texts(folder: Path, stated: Mapping[str, str], terms: Iterable[Terms]) -> None:
    for license in (demanded.license for demanded in terms):
        names = LICENSE_NAMES if license in stated.values() else (f"{LICENSE}-{license}",)
        if not any((folder / name).is_file() for name in names):
            logger.warning(
                "the license %s asks for a copy of its text, which is not there: put it into the model's folder as %s",
                *(license, names[0]),
            )


def read_notice(folder: Path) -> str:
    """Read the file NOTICE of a folder; empty if it has none."""
    path = folder / NOTICE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
