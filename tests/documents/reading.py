"""Read the documents: fenced blocks, code spans, and the commands in both."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "hub_configs/**/*.md", "benchmarks/**/*.md")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))
PROGRAMS = (
    "make",
    "llm2clip",
    "pip",
    "python",
    "torchrun",
    "accelerate",
    "jupyter",
    "npm",
    "hf",
    "img2dataset",
    ".ci/run",
)
# Blocks that show what a command printed, by their first words.
OUTPUTS = (
    "{'a train on a single rail':",
    "Caption retrieval, R@1 / 5 / 10 in %",
    "docci  DOCCI",
    "hours: 0.5 for 625 steps",
    "runs/quickstart/llm2clip, in %",
    "stage1: memory of each of 8 GPUs",
)


def is_command(text: str) -> bool:
    """Return whether a line or a code span is a command."""
    program, _, rest = text.strip().partition(" ")
    return program in PROGRAMS and (bool(rest.strip()) or program == ".ci/run")


def blocks(document: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a document: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def kind(language: str, content: str) -> str:
    """Return the kind of a block: python, recipe, shell, output or diagram.

    Raises:
        ValueError: It is none of them.
    """
    lines = content.replace("\\\n", " ").splitlines()
    kinds = {"python": "python", "yaml": "recipe", "mermaid": "diagram"}
    if language in kinds:
        return kinds[language]
    if language in ("", "bash", "shell") and lines and all(map(is_command, lines)):
        return "shell"
    if not language and content.startswith(OUTPUTS):
        return "output"
    raise ValueError(f"this block is neither Python nor known commands nor a listed output:\n{content}")


def code_spans(document: str) -> list[str]:
    """Return the inline code of a document; a span may continue on the next line."""
    text = (ROOT / document).read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(document: str) -> list[str]:
    """Return the commands of a document, from its blocks and code spans, without trailing comments."""
    lines = [
        line
        for language, content in blocks(document)
        if kind(language, content) == "shell"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [bare(line) for line in [*lines, *filter(is_command, code_spans(document))]]


def bare(line: str) -> str:
    """Strip the comment of a command: after `#` or, for make and .ci/run, after two spaces."""
    remark = r"\s{2,}.*|\s#.*" if line.startswith(("make ", ".ci/run")) else r"\s#.*"
    return " ".join(re.sub(remark, "", line.strip()).split())
