"""The licenses of the models that a model was made from, and the one that it gets itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import files as distribution_files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from llm2clip.hub.cards.card import CARD, as_list, license_fields, license_of, read_card
from llm2clip.hub.hub_errors import explained
from llm2clip.hub.license_terms import NOTICE, TERMS, Terms, license_of_name, read_notice
from llm2clip.utils.files import read_json, write_text
from llm2clip.utils.repos import hub_ids, names_of
from modeling_llm2clip.modeling_llm2clip_utils import find_text_model

logger = logging.getLogger(__name__)

LICENSE, CODE_LICENSE_FILE = "LICENSE", "LICENSE-CODE"
CODE_LICENSE = "apache-2.0"
# Fields that name other models, by file; the settings of a run are the only place that has the folder of its tower.
REFERENCES = {
    CONFIG_NAME: ("text_model_name_or_path",),
    ADAPTER_CONFIG_NAME: ("base_model_name_or_path",),
    "settings.json": ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path"),
}
# A model made from such models may have any license; the last ask for the most.
PERMISSIVE = (
    *("wtfpl", "unlicense", "cc0-1.0", "pddl", "zlib", "isc", "mit", "ncsa", "postgresql", "bsl-1.0", "bsd"),
    *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "afl-3.0", "ms-pl", "cdla-permissive-1.0"),
    *("cdla-permissive-2.0", "etalab-2.0", "odc-by", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("openmdw-1.0", "ecl-2.0", "apache-2.0"),
)
UNKNOWN = "unknown"  # an id of the Hub too


class Base(NamedTuple):
    """A model that another one was made from.

    Attributes:
        name: Hub id or folder.
        folder: That folder, or one with its card and license from the Hub; None if it cannot be read.
        fields: Its license as a card states it, by the names in `LICENSE_FIELDS`.
    """

    name: str
    folder: Path | None
    fields: Mapping[str, str]

    @property
    def license(self) -> str:
        """Id of its license, also where a card states it as `other` with this name; `unknown` if it is not known."""
        name = self.fields.get("license_name", "")
        return name if name in TERMS else self.fields.get("license", UNKNOWN)

    @property
    def license_title(self) -> str:
        """Name of its license."""
        return self.fields.get("license_name") or self.license

    def __str__(self) -> str:
        """Its name, without the path on this machine, which may be private, and its license."""
        name = self.name if hub_ids(self.name) else Path(self.name).name
        return f"{name} ({'license not known' if self.license == UNKNOWN else self.license_title})"


class Licensing(NamedTuple):
    """The license of a model that is built.

    Attributes:
        stated: Fields of its card, by the names in `LICENSE_FIELDS`; empty if no license is stated.
        bases: The models that it was made from.
        terms: What their licenses demand.
    """

    stated: dict[str, Any]
    bases: list[Base]
    terms: list[Terms]


def license_model(
    given: Mapping[str, str], card: Mapping[str, Any], bases: Sequence[Base], names: Iterable[str]
) -> Licensing:
    """Return the license of a model: that which is given, else that on its card, else the strictest of its bases.

    Args:
        given: The license that somebody chose, as fields of a card; empty if nobody did.
        card: Front matter of the card of the model.
        bases: The models that it was made from.
        names: Its title, and its Hub id if that is known.

    Raises:
        ValueError: License or names do not keep the licenses of the bases; the message says what to do.
    """
    on_card = license_fields(card) if card.get("license") else {}
    stated = dict(given) or on_card or choose_license(bases)
    own, bound = stated.get("license"), _bound(bases)
    problems: list[str] = []
    if wrong := [base for base in bound if own is not None and not _keeps(own, base)]:
        where = f"--license {own}" if given else f"license: {own} on its card"
        problems.append(
            f"{where} does not keep the license of {_listed(wrong)}, which the model was made from: {_way(bound)}"
        )
    found = [(base, TERMS[base.license]) for base in bases if base.license in TERMS]
    for base, terms in found:
        if others := [name for name in names if not terms.fits_name(name)]:
            problems.append(
                f"the license of {base} asks for a name that begins with {terms.beginning!r}, unlike "
                f"{' and '.join(others)}: give the folder or --name, and the repo, such a name"
            )
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")
    return Licensing(stated, list(bases), list(dict.fromkeys(terms for _, terms in found)))


def choose_license(bases: Sequence[Base]) -> dict[str, str]:
    """Return the strictest license of some models, as fields of a card; empty if one is not known and none is bound.

    Raises:
        ValueError: Several ask for the same license as their own.
    """
    bound = _bound(bases)
    if len(bound) > 1:
        raise ValueError(f"this model was made from {_listed(bound)}, so that no license is right: {_way(bound)}.")
    if not bound:
        licenses = [base.license for base in bases]
        return {"license": max(licenses, key=PERMISSIVE.index)} if licenses and UNKNOWN not in licenses else {}
    (base,) = bound
    if base.license in TERMS:
        return {"license": base.license}
    fields = dict(base.fields)
    if (link := fields.get("license_link")) and "://" not in link and hub_ids(base.name):
        fields["license_link"] = f"https://huggingface.co/{base.name}/blob/main/{link}"
    return fields


def _bound(bases: Sequence[Base]) -> list[Base]:
    """The first model of each license that binds what is made from it."""
    first: dict[str, Base] = {}
    for base in bases:
        if base.license != UNKNOWN and base.license not in PERMISSIVE:
            first.setdefault(base.license_title, base)
    return list(first.values())


def _keeps(license: str, base: Base) -> bool:
    return license in (base.license, "other") if base.license in TERMS else license.lower() not in PERMISSIVE


def _listed(bases: Sequence[Base]) -> str:
    return " and ".join(map(str, bases))


def _way(bound: Sequence[Base]) -> str:
    other = "--license other with --license-name and --license-link"
    if len(bound) > 1:
        return f"give {other}, for terms that keep all of them"
    return f"give {other}" if bound[0].license == "other" else f"give --license {bound[0].license}, or {other}"


def bases_of(source: str, revision: str | None = None, others: Iterable[str] = ()) -> list[Base]:
    """Find the models that a model was made from, and those that these were made from, with their licenses.

    They are named by cards (`base_model`), configs and the settings of a run. What is on the Hub is looked up there,
    or in the cache; of what cannot be reached, the name may say what it is.

    Args:
        source: Folder or Hub id of the model. It is among the found only if its card has a license of `TERMS`.
        revision: Branch, tag or commit of it on the Hub.
        others: Further models that it was made from.

    Raises:
        ValueError: A card or config in a folder is damaged.
    """
    found: dict[str, list[Base]] = {}
    waiting = [source, *others]
    while waiting:
        name = waiting.pop(0)
        key = str(Path(name).resolve()) if Path(name).is_dir() else name
        if key in found:
            continue
        folder = _folder(name, revision if name == source else None)
        card = {} if folder is None else read_card(folder)[0]
        parents = [*as_list(card.get("base_model")), *_references(Path(name))]
        waiting += parents
        stated = [str(value) for value in as_list(card.get("license"))] or [license_of_name(name) or UNKNOWN]
        found[key] = [Base(name, folder, {**license_fields(card), "license": value}) for value in stated]
        if name == source:
            found[key] = [base for base in found[key] if base.license in TERMS]
        elif parents and stated == [UNKNOWN]:
            found[key] = []  # it is under the licenses of its parents
    return [base for bases in found.values() for base in bases]


def _folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model, or one with its card and license, from the Hub or the cache; None if there is neither."""
    if Path(name).is_dir() or not hub_ids(name):
        return Path(name) if Path(name).is_dir() else None
    try:
        with explained(name):
            return Path(snapshot_download(name, revision=revision, allow_patterns=[CARD, f"{LICENSE}*"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("%s cannot be read on the Hub (%s): its license is that in the cache, if any", name, reason)
        cached = try_to_load_from_cache(name, CARD, revision=revision)
        return Path(cached).parent if isinstance(cached, str) else None


def _references(folder: Path) -> Iterator[str]:
    for file, names in REFERENCES.items():
        fields = read_json(folder / file) if (folder / file).is_file() else {}
        found = (one for name in names for one in names_of(fields.get(name)))
        yield from (find_text_model(name, folder)[0] for name in found)


def write_license_files(folder: Path, source: Path, licensing: Licensing) -> None:
    """Write the license of a built model, those of the models that it was made from, and NOTICE.

    Of a license without a file, the card has the name. That of the code is there too if the folder has code.

    Args:
        folder: The model, with its code.
        source: Folder of the card of the model that it was built from.
        licensing: Its license.
    """
    stated, bases, terms = licensing
    own = stated.get("license")
    files = {entry.license: LICENSE if entry.license == own else f"{LICENSE}-{entry.license}" for entry in terms}
    if own == CODE_LICENSE:
        write_text(folder / LICENSE, code_license())
    elif any(folder.glob("*.py")):
        write_text(folder / CODE_LICENSE_FILE, code_license())
    wanted = {*files, *([Base("", None, stated).license_title] if own else [])}
    for base in [Base(str(source), source, license_of(source)), *bases]:
        path = folder / (LICENSE if base.license == own else f"{LICENSE}-{base.license}")
        if base.license_title in wanted and not path.exists() and (text := _license_text(base, source)):
            write_text(path, text)
    for license, name in files.items():
        if not (folder / name).exists():
            logger.warning(
                "the license %s asks for a copy of its text, which the folders and repos of this model do not have: "
                "put it into the built folder as %s",
                license,
                name,
            )
    notice = read_notice(source)
    if notice := notice + "".join(f"{entry.notice}\n" for entry in terms if entry.notice not in notice):
        write_text(folder / NOTICE, notice)


def _license_text(base: Base, source: Path) -> str | None:
    """The text of the license of a base, unless it is the license of the code."""
    paths = [source / f"{LICENSE}-{base.license}"]
    if base.folder is not None:
        paths += [base.folder / name for name in (LICENSE, "LICENSE.txt", "LICENSE.md")]
    path = next((path for path in paths if path.is_file()), None)
    text = None if path is None else path.read_text(encoding="utf-8", errors="replace")
    return None if text == code_license() else text


def code_license() -> str:
    """The text of the license of the code.

    Raises:
        FileNotFoundError: This installation lacks it.
    """
    found = [path for path in distribution_files("llm2clip") or [] if path.name == "LICENSE"]
    if not found:
        raise FileNotFoundError("this installation of llm2clip has no LICENSE file; install it again.")
    return found[0].read_text(encoding="utf-8")
