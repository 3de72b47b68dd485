"""A reader's shell: every command runs in a process of its own, which finds the libraries imported."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from llm2clip import cli
from tests.forks import ForkServer

# Run as modules, since an environment that borrows its packages does not have their console scripts.
MODULES = {
    "llm2clip": "llm2clip",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}
Result = subprocess.CompletedProcess[str]


class Shell:
    """Runs commands, between entering and leaving it.

    Args:
        environment: Environment variables of the commands.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __enter__(self) -> Shell:
        self.server = ForkServer([command.module for command in cli.COMMANDS.values()], self.environment)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.process.communicate()

    def run(self, line: str, folder: Path) -> Result:
        """Run a command of one line in a folder; programs that start processes themselves are started as they are."""
        program, *arguments = self.command(line)
        if line.startswith(("llm2clip ", "python ")):
            return self.server.run(arguments, folder)
        return subprocess.run(
            [program, *arguments], cwd=folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def command(self, line: str) -> list[str]:
        """The arguments of a new process that runs a command."""
        program, *arguments = shlex.split(line)
        module = [] if program == "python" else ["-m", MODULES[program]]
        return [sys.executable, *module, *arguments]
