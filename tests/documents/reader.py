"""Run the commands of the documents, each in a folder with the files that it needs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents.reading import ROOT
from tests.documents.shell import Result, Shell
from tests.documents.stand_ins import DATASETS, FILES, FOLDERS, HUB
from tests.documents.table import COMMANDS, Run
from tests.examples.server import serving
from tests.loopback_hub import LFS_SUFFIXES, File, LoopbackHub, Repo

# Commands whose outcome other commands need.
NEEDED = {need for case in COMMANDS.values() if isinstance(case, Run) for need in case.needs if need in COMMANDS}


class Reader:
    """Runs commands of the table.

    Args:
        shell: Where they run.
        hub: The Hub of that shell.
        factory: Makes folders that stay as long as the tests run.
    """

    def __init__(self, shell: Shell, hub: LoopbackHub, factory: pytest.TempPathFactory) -> None:
        self.shell, self.hub, self.factory = shell, hub, factory
        self.done: dict[str, Path] = {}

    def run(self, line: str, case: Run, folder: Path) -> Path:
        """Run a command; one that others need runs once, in a folder of its own.

        Args:
            line: As the document shows it.
            case: How it is run.
            folder: Where another one runs; it is empty.

        Returns:
            The folder where it ran.

        Raises:
            AssertionError: It fails, or leaves or prints something else than `case` says.
        """
        if line not in NEEDED:
            self._run(line, case, folder)
            return folder
        if line not in self.done:
            folder = self.factory.mktemp("reader")
            self._run(line, case, folder)
            self.done[line] = folder
        return self.done[line]

    def _run(self, line: str, case: Run, folder: Path) -> None:
        for need in case.needs:
            self._provide(need, folder)
        command = meant(line, case)
        result = self._serve(command, folder) if case.serves else self.shell.run(command, folder)
        shown = f"$ {command}\n{result.output[-3000:]}\n{result.errors[-3000:]}"
        assert result.code == 0, f"exit status {result.code}\n{shown}"
        assert case.prints in result.output, f"{case.prints!r} is not printed\n{shown}"
        missing = [
            name for name in case.makes if not (folder / name).exists() and ("model", name) not in self.hub.repos
        ]
        assert not missing, f"{', '.join(missing)}: not made\n{shown}"
        if case.check is not None:
            case.check(folder)

    def _serve(self, command: str, folder: Path) -> Result:
        """Start a command that serves a page, request the page, and stop the command."""
        _, *arguments = self.shell.command(command)
        with serving(*arguments, folder=folder):
            return Result(0, (folder / "server.log").read_text(), "")

    def _provide(self, need: str, folder: Path) -> None:
        """Create an input of a command in its folder, or on the Hub."""
        kind = "dataset" if need in DATASETS else "model"
        if need in COMMANDS:
            case = COMMANDS[need]
            assert isinstance(case, Run)
            shutil.copytree(self.run(need, case, folder), folder, symlinks=True, dirs_exist_ok=True)
        elif need in FILES:
            FILES[need](folder / need)
        elif need in FOLDERS:
            (folder / need).mkdir(parents=True)
            FOLDERS[need](folder / need)
        elif (kind, need) not in self.hub.repos:
            source = self.factory.mktemp("repo")
            HUB[need](source)
            publish(self.hub, need, source, kind)
            shutil.rmtree(source)


def publish(hub: LoopbackHub, name: str, folder: Path, kind: str) -> None:
    """Upload the files of a folder to a new repository."""
    repo = hub.repos[kind, name] = Repo(name, kind)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    content = {file: File(path.read_bytes(), file.endswith(LFS_SUFFIXES)) for file, path in files.items()}
    repo.commit("main", content, "upload")


def meant(line: str, case: Run) -> str:
    """Return the command that is run: placeholders replaced, and options appended that make it small."""
    if line.startswith("make "):
        line = recipe(line)
    for word, meaning in case.meant.items():
        line = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", meaning, line)
    return f"{line} {case.small}".strip()


def recipe(line: str) -> str:
    """Return the last command of a `make` target, after the set-up of its environment.

    Raises:
        AssertionError: The target does not exist, or does not use one of the variables.
    """
    _, target, *variables = shlex.split(line)
    # If make runs the tests, its MAKEFLAGS would change the output of this make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", target, *variables]
    asked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    last = asked.stdout.splitlines()[-1]
    unused = [variable for variable in variables if variable.partition("=")[2] not in last]
    assert not unused, f"make {target} does not use {', '.join(unused)}"
    return last.removeprefix(".venv/bin/")
