"""Run the commands of the documents, each in a folder with the files that it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.documents.cases import CASES, Case
from tests.documents.shell import Result, Shell
from tests.documents.stand_ins import DATASETS, FILES, FOLDERS, HUB
from tests.examples.server import served
from tests.loopback_hub import LFS_SUFFIXES, File, LoopbackHub, Repo

# Commands whose outcome other commands need.
MAKERS = {maker for case in CASES.values() for maker in case.makers}


class Reader:
    """Runs commands.

    Args:
        shell: Where they run.
        hub: The Hub of that shell.
        factory: Makes folders that stay as long as the tests run.
    """

    def __init__(self, shell: Shell, hub: LoopbackHub, factory: pytest.TempPathFactory) -> None:
        self.shell, self.hub, self.factory = shell, hub, factory
        self.done: dict[Case, Path] = {}

    def run(self, case: Case, folder: Path) -> Path:
        """Run a command; one that others need runs once, in a folder of its own.

        Args:
            folder: Where another one runs; it is empty.

        Returns:
            The folder where it ran.

        Raises:
            AssertionError: It fails, or leaves or prints something else than it should.
        """
        if case not in MAKERS:
            self._run(case, folder)
            return folder
        if case not in self.done:
            folder = self.factory.mktemp("reader")
            self._run(case, folder)
            self.done[case] = folder
        return self.done[case]

    def _run(self, case: Case, folder: Path) -> None:
        for maker in case.makers:
            # Links to folders of the checkout cannot be made twice.
            links = {path.name for path in folder.iterdir() if path.is_symlink()}
            ignored = shutil.ignore_patterns(*links)
            shutil.copytree(self.run(maker, folder), folder, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        for name in case.stand_ins:
            self._provide(name, folder)
        result = self._serve(case.command, folder) if case.how.serves else self.shell.run(case.command, folder)
        shown = f"$ {case.command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        assert result.returncode == 0, f"exit status {result.returncode}\n{shown}"
        printed = "\n".join(line.rstrip() for line in result.stdout.splitlines())
        assert case.how.prints in printed, f"{case.how.prints!r} is not printed\n{shown}"
        missing = [path for path in case.makes if not (folder / path).exists()]
        assert not missing, f"{', '.join(missing)}: not made\n{shown}"

    def _serve(self, command: str, folder: Path) -> Result:
        """Start a command that serves a page, request the page, and stop the command."""
        _, *arguments = self.shell.command(command)
        with served(*arguments, folder=folder):
            return Result(arguments, 0, (folder / "server.log").read_text(), "")

    def _provide(self, name: str, folder: Path) -> None:
        """Create a stand-in where it is not there yet: in a folder, or on the Hub."""
        kind = "dataset" if name in DATASETS else "model"
        if name in HUB and (kind, name) not in self.hub.repos:
            source = self.factory.mktemp("repo")
            HUB[name](source)
            publish(self.hub, name, source, kind)
            shutil.rmtree(source)
        elif name in FILES and not (folder / name).exists():
            FILES[name](folder / name)
        elif name in FOLDERS and not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            FOLDERS[name](folder / name)


def publish(hub: LoopbackHub, name: str, folder: Path, kind: str) -> None:
    """Upload the files of a folder to a new repository."""
    repo = hub.repos[kind, name] = Repo(name, kind)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    content = {file: File(path.read_bytes(), file.endswith(LFS_SUFFIXES)) for file, path in files.items()}
    repo.commit("main", content, "upload")
