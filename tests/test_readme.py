"""What README.md and the other documents show works: Python snippets run, commands exist with all their options."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from tests import commands
from tests.commands import ROOT
from tests.modeling import tiny

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "hub_configs/**/*.md")
    for path in ROOT.glob(pattern)
)
# Blocks that show what a command printed, by their first words.
OUTPUTS = ("{'a train on a single rail':", "Caption retrieval, R@1 / 5 / 10 in %")
# Names that a document's snippets use without defining them.
PROVIDED: dict[str, dict[str, Any]] = {
    "README.md": {"repo": "runs/quickstart/llm2clip", "torch": torch, "BitsAndBytesConfig": BitsAndBytesConfig},
}
# Statements that are compiled only, by a word in them.
NOT_RUN = {"BitsAndBytesConfig": "bitsandbytes needs an accelerator"}
# Code spans that stand for any option.
PLACEHOLDERS = {"--field value"}
# Options of accelerate and torchrun that the text names.
LAUNCHERS = {"--num_machines", "--machine_rank", "--main_process_ip", "--nnodes"}


def blocks(document: str) -> list[tuple[str, str]]:
    """The fenced blocks of a document: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def kind(language: str, content: str) -> str:
    """What a block is: python, shell or output.

    Raises:
        ValueError: This test does not know what to do with it.
    """
    lines = content.replace("\\\n", " ").splitlines()
    if language == "python":
        return "python"
    if language in ("", "bash", "shell") and lines and all(map(commands.is_command, lines)):
        return "shell"
    if not language and content.startswith(OUTPUTS):
        return "output"
    raise ValueError(f"this block is neither Python nor known commands nor a listed output:\n{content}")


def shell_lines(document: str) -> list[str]:
    """The commands of a document, from its blocks and its code spans."""
    text = (ROOT / document).read_text()
    found = [
        line
        for language, content in blocks(document)
        if kind(language, content) == "shell"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return found + [span for span in code_spans(text) if commands.is_command(span)]


def code_spans(text: str) -> list[str]:
    """The inline code of a document; a span may go over a line's end."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


WITH_PYTHON = [document for document in DOCUMENTS if "```python" in (ROOT / document).read_text()]
COMMANDS = [(document, line) for document in DOCUMENTS for line in shell_lines(document)]


def run_snippets(document: str, names: dict[str, Any]) -> None:
    """Run a document's Python blocks one after another, as a reader would in one session."""
    statements = [
        statement
        for language, content in blocks(document)
        if kind(language, content) == "python"
        for statement in map(ast.unparse, ast.parse(content).body)
        if not any(word in statement for word in NOT_RUN)
    ]
    session = Path("session.py")
    session.write_text("\n".join(statements))
    runpy.run_path(str(session), init_globals=names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout after `make quickstart`, but with a tiny model."""
    tiny.save(tmp_path / "runs" / "quickstart" / "llm2clip")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documents_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "examples/README.md", "hub_configs/README.md"} <= set(DOCUMENTS)
    assert len([line for document, line in COMMANDS if document == "README.md"]) > 15


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_snippets_run(document: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = dict(PROVIDED.get(document, {}))
    run_snippets(document, names)
    printed = capsys.readouterr().out
    for _, content in blocks(document):
        if content.startswith("{"):
            shown, now = ast.literal_eval(content), ast.literal_eval(printed.splitlines()[0])
            assert list(shown) == list(now)
            assert sum(now.values()) == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize(("document", "line"), COMMANDS)
def test_commands_exist_with_all_their_options(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.check(line, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_in_the_text_exist(document: str) -> None:
    spans = [span for span in code_spans((ROOT / document).read_text()) if span.startswith("--")]
    unknown = [
        span
        for span in spans
        if span not in PLACEHOLDERS | LAUNCHERS and span.split()[0] not in commands.known_options()
    ]
    assert not unknown


@pytest.mark.parametrize(
    "line",
    [
        "make quickstrat",
        'make quickstart ARGS="--profil full"',
        "make lint ARGS=-x",
        "llm2clip stage3 RECIPE",
        "llm2clip stage2 stage2_paper --learning-rte 2e-5",
        "llm2clip stage1 stage1_papers",
        'pip install -e ".[trian]"',
        "python examples/no_such_example.py",
        "python examples/swap_the_llm.py --lm x",
        "torchrun --nproc_per_node 2 -m llm2clip_training.cli stage2 RECIPE --resum",
        "accelerate launch --config_file training/recipes/accelerate/none.yaml -m llm2clip_training.cli stage2 RECIPE",
    ],
)
def test_a_wrong_command_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        commands.check(line, monkeypatch)


def test_an_unknown_block_is_noticed() -> None:
    with pytest.raises(ValueError, match="neither Python nor known commands"):
        kind("", "curl -O x\n")
    with pytest.raises(ValueError, match="neither Python nor known commands"):
        kind("rust", "fn main() {}\n")
