"""Commands whose mistakes are found before a large library is imported."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.processes import run_python

LARGE = {"torch", "transformers", "lancedb", "datasets", "pyarrow", "gradio"}
SCRIPT = """
import sys
from llm2clip import cli
commands, large = {commands}, {large}
assert [cli.main(command) for command in commands] == [2] * len(commands)
print(sorted(large & set(sys.modules)))
"""


def assert_found_early(mistakes: dict[str, list[str]], folder: Path, *small: str) -> None:
    """Run commands in a folder, in one new process: each ends with its message, and none imports a large library.

    Args:
        mistakes: Command lines by a part of their message.
        small: Further libraries that are not to be imported.
    """
    script = SCRIPT.format(commands=list(mistakes.values()), large={*LARGE, *small})
    ended = run_python(["-c", script], folder=folder, PYTHONPATH=":".join(sys.path))
    assert ended.stdout == "[]\n"
    errors = [line for line in ended.stderr.splitlines() if "error: " in line]
    for message, shown in zip(mistakes, errors, strict=True):
        assert message in shown
