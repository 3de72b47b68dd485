"""How each command of the documents is tested: by `rules`, and by the markers of its page."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm2clip import cli
from tests.documents.reading import DOCUMENTS, ROOT, parts
from tests.documents.rules import MEANT, RULES, How
from tests.documents.stand_ins import STAND_INS

BARE_NAMES = {*(f"llm2clip {name}" for name in cli.COMMANDS), "python -m llm2clip", "accelerate launch"} - set(MEANT)
RECIPES = {path.stem: path.read_text() for path in (ROOT / "training/llm2clip/recipes").glob("*.yaml")}
OUTPUT = re.compile(
    r"--(?:output-dir|output|html|write-space) (\S+)|llm2clip (?:convert|build) \S+ (\S+)|llm2clip merge \S+ \S+ (\S+)"
)
TEST = re.compile(r"(test|not run)(?: \((.+?)\))?: (.+)")


@dataclass(frozen=True, eq=False)
class Case:
    """A command as it is shown, the documents that show it, and how it is tested."""

    line: str
    documents: tuple[str, ...]
    how: How

    @property
    def command(self) -> str:
        """The command that is run."""
        line = self.line
        for word, meaning in {**MEANT, **self.how.reads}.items():
            line = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", meaning, line)
        return f"{line} {self.how.small}".strip()

    @property
    def recipe(self) -> str:
        """The text of its recipe, without comments; `plan` reads and writes nothing that it names."""
        words = [] if "llm2clip plan" in self.command else self.command.split()
        return re.sub("#.*", "", "".join(RECIPES.get(word, "") for word in words))

    @cached_property
    def makes(self) -> list[str]:
        """The paths that it leaves."""
        named = ["".join(groups) for groups in OUTPUT.findall(self.command)]
        if "--output-dir" not in self.command:
            named += re.findall(r"^output_dir: (\S+)", self.recipe, re.MULTILINE)
        return [*self.how.makes, *named]

    @cached_property
    def stand_ins(self) -> list[str]:
        """The stand-ins that it reads."""
        return list(dict.fromkeys(name for word in self._words() for name in STAND_INS if lies_in(word, name)))

    @cached_property
    def makers(self) -> list[Case]:
        """The commands that make what it reads."""
        words = [word for word in self._words() if not any(lies_in(word, name) for name in STAND_INS)]
        return list(dict.fromkeys(maker for word in words for maker in self._makers_of(word)[:1]))

    def _words(self) -> list[str]:
        """Whatever may be a path or a Hub id that it reads."""
        if "llm2clip plan" in self.command:  # it takes names of `hub_configs`, which are those of converted models too
            return []
        words = re.findall(r"[^\s'\"{}\[\],]+", f"{self.command} {self.recipe}")
        words = [*(word.removeprefix("./") for word in words), *self.how.needs]
        return [word for word in dict.fromkeys(words) if not any(lies_in(word, path) for path in self.makes)]

    def _makers_of(self, path: str) -> list[Case]:
        """The commands that leave a path: first the quick ones, those of the same page, and of pages beside it."""
        pages, folders = set(self.documents), {folder(page) for page in self.documents}

        def distance(other: Case) -> tuple[bool, bool, bool]:
            return other.how.slow, pages.isdisjoint(other.documents), folders.isdisjoint(map(folder, other.documents))

        makers = [case for case in CASES.values() if not case.how.not_run]
        return sorted((case for case in makers if any(lies_in(path, made) for made in case.makes)), key=distance)


def lies_in(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def folder(document: str) -> str:
    return document.rpartition("/")[0]


def read_marker(marker: str) -> tuple[str, How] | None:
    """Return what a marker says, and words of the commands that it is about; None for other comments.

    Raises:
        ValueError: The marker is wrong.
    """
    if not marker.startswith(("test", "not run")):
        return None
    found = TEST.fullmatch(marker)
    if found is None:
        raise ValueError(f"this marker is neither `test: ...` nor `not run: ...`: {marker}")
    kind, words, text = found.groups()
    if kind == "not run":
        reason, _, run_by = text.partition("; run by ")
        return words or "", How(not_run=reason, run_by=run_by)
    fields: dict[str, Any] = dict(word.partition("=")[::2] for word in shlex.split(text))
    if unknown := set(fields) - {"needs", "small", "makes", "prints", "reads", "slow"}:
        raise ValueError(f"no marker has {', '.join(unknown)}: {marker}")
    fields |= {name: tuple(fields[name].split(",")) for name in ("needs", "makes") if name in fields}
    if "reads" in fields:
        fields["reads"] = dict([fields["reads"].split("=")])
    return words or "", How(**fields | {"slow": "slow" in fields})


def by_rules(line: str) -> How:
    how = How()
    for words, rule in RULES.items():
        how |= rule if re.search(words, line) else How()
    return how


def cases() -> dict[str, Case]:
    """Return the case of each command of the documents.

    Raises:
        ValueError: A marker is wrong, or about no command.
    """
    found: dict[str, Case] = {}
    for document in DOCUMENTS:
        last = ""
        for part in parts(document):
            lines = [line for line in part.commands if line not in BARE_NAMES]
            for line in lines:
                case = found.get(line, Case(line, (), by_rules(line)))
                found[line] = replace(case, documents=(*case.documents, document))
            for marker in part.markers:
                if marker.startswith("output:"):
                    found[last] = replace(found[last], how=found[last].how | How(prints=part.content.strip()))
                said = read_marker(marker)
                about = [line for line in lines if said and said[0] in line]
                if said and not about:
                    raise ValueError(f"{document} has no command for this marker: {marker}")
                for line in about:
                    found[line] = replace(found[line], how=found[line].how | said[1])
            last = (lines or [last])[-1]
    return found


CASES = cases()
