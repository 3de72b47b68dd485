"""A reader's shell: every command runs in a process of its own, which finds the libraries imported.

Importing them takes longer than most commands do on tiny models. So a process (`python -m tests.documents.shell`)
imports them once, and forks for every command. Programs that start processes themselves are started as they are.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.documents.reading import ROOT

# Run as modules, since an environment that borrows its packages does not have their console scripts.
MODULES = {
    "llm2clip": "llm2clip",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}
OUTPUT, ERRORS = ".stdout", ".stderr"


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit status, and what it wrote to stdout and stderr."""

    code: int
    output: str
    errors: str


class Shell:
    """Runs commands, between entering and leaving it.

    Args:
        environment: Environment variables of the commands.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __enter__(self) -> Shell:
        command = [sys.executable, "-m", "tests.documents.shell"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

    def run(self, line: str, folder: Path) -> Result:
        """Run a command of one line in a folder."""
        program, *arguments = shlex.split(line)
        if program in ("llm2clip", "python"):
            assert self.server.stdin is not None
            assert self.server.stdout is not None
            order = {"program": program, "arguments": arguments, "folder": str(folder)}
            print(json.dumps(order), file=self.server.stdin, flush=True)
            code = int(self.server.stdout.readline())
        else:
            with (folder / OUTPUT).open("w") as output, (folder / ERRORS).open("w") as errors:
                code = subprocess.call(
                    self.command(line), cwd=folder, env=self.environment, stdout=output, stderr=errors
                )
        return Result(code, (folder / OUTPUT).read_text(), (folder / ERRORS).read_text())

    def command(self, line: str) -> list[str]:
        """The arguments of a new process that runs a command."""
        program, *arguments = shlex.split(line)
        module = [] if program == "python" else ["-m", MODULES[program]]
        return [sys.executable, *module, *arguments]


def _next_order() -> dict[str, Any]:
    """Wait for orders and fork for each; the child returns with its own, the parent ends where there are no more."""
    for line in sys.stdin:
        if os.fork() == 0:
            order: dict[str, Any] = json.loads(line)
            return order
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def _run(program: str, arguments: list[str], folder: str) -> int | str | None:
    """Run a command; returns what it would exit with."""
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, OUTPUT), (2, ERRORS)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    try:
        if program == "llm2clip":
            return cli.main(arguments)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        return traceback.format_exc()
    return 0


def _end(status: int | str | None) -> None:
    """End the process as Python does, but without the seconds that it takes to tidy up all libraries."""
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    from importlib import import_module

    from llm2clip import cli

    for job in cli.COMMANDS.values():
        import_module(job.module)
    _end(_run(**_next_order()))
