"""Write what the table of public names in `llm2clip/__init__.py` says in two other places.

These are the tables of docs/api.md, which have the first sentence of every docstring, and `llm2clip/__init__.pyi`.

python docs/make_api.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import llm2clip

PAGE = Path(__file__).with_name("api.md")
STUB = Path(llm2clip.__file__).with_suffix(".pyi")
TABLES = re.compile(r"(?<=<!-- api: made by docs/make_api\.py -->\n).*?(?=<!-- /api -->)", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.:])(?<!al\.)\s")
# The sections of the page, by the beginning of the name of the modules that define their names.
SECTIONS = {
    "modeling_llm2clip": "Models and processor",
    "llm2clip.trainers": "Training",
    "llm2clip.losses": "Losses",
    "llm2clip.store": "Stored rows",
    "llm2clip.data": "Data",
    "llm2clip.checks": "Data",
    "llm2clip.encoders": "Embedding",
    "llm2clip.evaluation": "Evaluation",
    "llm2clip.search": "Search",
    "llm2clip.serving": "Serve",
    "llm2clip.convert": "Convert and publish",
    "llm2clip.hub": "Convert and publish",
    "llm2clip.models": "Utilities",
    "llm2clip.cli": "Utilities",
}


def first_sentence(name: str) -> str:
    """Return the first sentence of the docstring of a public name.

    Raises:
        ValueError: It has no docstring of its own.
    """
    value = getattr(llm2clip, name)
    doc = inspect.cleandoc(vars(value).get("__doc__") or "") if isinstance(value, type) else inspect.getdoc(value)
    if not doc or doc.startswith(f"{name}("):
        raise ValueError(f"llm2clip.{name} has no docstring, and docs/api.md shows its first sentence.")
    paragraph = re.sub(r"\[(`\w+`)\]", r"\1", " ".join(doc.split("\n\n")[0].split()))
    return SENTENCE_END.split(paragraph)[0].rstrip(".:").replace("|", "\\|") + "."


def section(module: str) -> str:
    """Return the section that documents the names of a module."""
    return next(title for start, title in SECTIONS.items() if module == start or module.startswith(f"{start}."))


def tables() -> str:
    """Return the tables of the page, one for each section."""
    names: dict[str, list[str]] = {title: [] for title in SECTIONS.values()}
    for module, members in llm2clip.MODULES.items():
        names[section(module)] += members
    parts = []
    for title, members in names.items():
        if not members:
            continue
        rows = [f"| `{name}` | {first_sentence(name)} |" for name in sorted(members, key=str.lower)]
        parts.append("\n".join([f"## {title}", "", "| name | description |", "| --- | --- |", *rows]) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def stub() -> str:
    """Return the text of `__init__.pyi`, in which `import X as X` makes a name public."""
    table = sorted(llm2clip.MODULES.items())
    lines = [f"from {module} import {name} as {name}" for module, names in table for name in sorted(names)]
    return "\n".join(["# Made by docs/make_api.py.", *lines, "", "__version__: str", ""])


def with_tables(page: str) -> str:
    """Return the text of the page with its tables made anew."""
    return TABLES.sub(lambda _: tables(), page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    STUB.write_text(stub(), encoding="utf-8")
