"""Read the documents: fenced blocks, code spans, the commands in both, and the markers that say how they are tested.

A marker is a comment before a fenced block, a paragraph or a table:

- `<!-- test: prints=Museum -->`: with `needs` and `makes` (paths), `small` (options), `reads` (a word and its
  stand-in), `prints` and `slow`; `test (embed): ...` is about the commands with that word. `rules.py` has what
  commands of one kind need.
- `<!-- not run: it needs keys; run by FILE::TEST -->`: the command cannot be run here; the test that does it.
- `<!-- output -->`: the block shows what was printed; `<!-- output: printed by the command above -->` has it compared.

A block of the pages of training whose first line names a file (`# my_teacher.py`, `# llm2clip align align.yaml`) is
written to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "hub_configs/**/*.md", "benchmarks/**/*.md")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))
PROGRAMS = (
    *("llm2clip", "python", "torchrun", "accelerate"),
    *("make", "pip", "jupyter", "npm", "hf", "img2dataset", "docker", ".ci/run"),
)
# Comments, then a fenced block or lines without an empty one between them.
PART = re.compile(
    r"((?:^<!-- [^\n]* -->\n)*)(?:^```(\w*)\n(.*?)^```$|((?:^(?!```|<!-- )[^\n]+\n?)+))", re.MULTILINE | re.DOTALL
)
KINDS = {"python": "python", "yaml": "recipe", "mermaid": "diagram"}


@dataclass(frozen=True)
class Part:
    """A fenced block with its language, or text, whose language is None; with the markers before it."""

    language: str | None
    content: str
    markers: tuple[str, ...]

    @property
    def code_spans(self) -> list[str]:
        """The inline code of a text; a span may continue on the next line."""
        if self.language is not None:
            return []
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.content)]

    @property
    def commands(self) -> list[str]:
        """The commands of a block, or of the code spans of a text, without trailing comments."""
        if self.language is None:
            return [bare(span) for span in self.code_spans if is_command(span)]
        if kind(self.language, self.content, self.markers) != "shell":
            return []
        return [bare(line) for line in self.content.replace("\\\n", " ").splitlines()]


@cache
def parts(document: str) -> list[Part]:
    """Return what a document consists of, in its order."""
    found = PART.findall((ROOT / document).read_text(encoding="utf-8"))
    return [
        Part(None if text else language, text or content, tuple(re.findall(r"<!-- (.*) -->", comments)))
        for comments, language, content, text in found
    ]


def is_command(text: str) -> bool:
    """Return whether a line or a code span is a command."""
    program, _, rest = text.strip().partition(" ")
    return program in PROGRAMS and (bool(rest.strip()) or program == ".ci/run")


def blocks(document: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a document: language and content."""
    return [(part.language, part.content) for part in parts(document) if part.language is not None]


def kind(language: str, content: str, markers: tuple[str, ...] = ()) -> str:
    """Return the kind of a block: python, recipe, shell, output or diagram.

    Raises:
        ValueError: It is none of them.
    """
    if language in KINDS:
        return KINDS[language]
    if any(marker.startswith("output") for marker in markers):
        return "output"
    lines = content.replace("\\\n", " ").splitlines()
    if language in ("", "bash", "shell") and lines and all(map(is_command, lines)):
        return "shell"
    raise ValueError(f"this block is neither Python nor known commands nor a marked output:\n{content}")


def commands(document: str) -> list[str]:
    """Return the commands of a document, from its blocks and code spans, without trailing comments."""
    return [line for part in parts(document) for line in part.commands]


def bare(line: str) -> str:
    """Strip the comment of a command: after `#` or, for make and .ci/run, after two spaces."""
    remark = r"\s{2,}.*|\s#.*" if line.startswith(("make ", ".ci/run")) else r"\s#.*"
    return " ".join(re.sub(remark, "", line.strip()).split())
