"""Running a command by a plan, in a process that finds the libraries imported; unbroken runs to compare with."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.documents.shell import Result, Shell
from tests.faults.commands import ATTACKED, WORK
from tests.faults.content import Content, content, differences, digest_bytes
from tests.faults.injection import Plan, preloaded, read_changes
from tests.faults.trials import Baseline
from tests.loopback_hub import LoopbackHub

LOG, LATER_LOG = "changes.log", "later.log"
# Files that may differ between two runs; none has rows or weights.
MAY_VARY = re.compile(r".*\.(json|md|html|txt|jsonl)")
# Bytes that let a command run to its end.
ROOM = 1 << 30
MESSAGE = re.compile(r"^llm2clip \S+: error: .+", re.MULTILINE)


class Bench:
    """A folder with inputs, a hub, and the environment of the processes.

    Args:
        folder: An existing folder, which the caller deletes.
    """

    def __init__(self, folder: Path, hub: LoopbackHub) -> None:
        self.folder, self.hub, self.inputs = folder, hub, folder / "inputs"
        # The order of a set that is written into a file depends on the seed of hashes.
        variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
        self.environment = preloaded(folder, {**os.environ, **variables, **hub.environment(folder / "home")})

    def shell(self) -> Shell:
        """A shell for [`Bench.run`]; each runs one command at a time."""
        return Shell(self.environment)

    def run(self, shell: Shell, command: str, folder: Path, plan: Plan | None = None, again: bool = False) -> Result:
        """Run a command in a folder of its own.

        Args:
            plan: What happens to it; nothing by default.
            again: Whether it is run a second time.
        """
        attacked = ATTACKED[command]
        plan = plan or Plan(str(folder / WORK), str(folder / LATER_LOG))
        if attacked.sockets:
            plan = replace(plan, sockets=True, root="/no/folder")
        arguments = attacked.arguments.format(inputs=self.inputs, repo=repo(folder))
        more = attacked.again if again else ""
        line = f"python -m tests.faults.injection {shlex.quote(plan.to_json())} {arguments} {more}"
        return shell.run(line, folder)

    def content(self, command: str, folder: Path) -> Content:
        """Return what a command has made; see [`content`]."""
        if not ATTACKED[command].sockets:
            return content(folder / WORK)
        found = self.hub.repos.get(("model", repo(folder)))
        files = found.files() if found else {}
        return {name: digest_bytes(value.replace(repo(folder).encode(), b"REPO")) for name, value in files.items()}

    def measure(self, shell: Shell, command: str) -> Baseline:
        """Run a command twice without a fault; the result of the first run is what other commands read.

        Raises:
            AssertionError: It fails, or its two results differ in more than texts.
        """
        found = []
        for folder in (self.inputs / "made" / command, self.folder / f"{command}-twice"):
            (folder / WORK).mkdir(parents=True)
            plan = Plan(str(folder / WORK), str(folder / LOG), mode="count")
            result = self.run(shell, command, folder, plan)
            assert result.returncode == 0, f"{command} fails without a fault: {result.stderr[-2000:]}"
            found.append(self.content(command, folder))
            if len(found) == 1:
                sizes = [path.stat().st_size for path in (folder / WORK).rglob("*") if path.is_file()]
                first = Baseline(found[0], read_changes(plan), sum(sizes), max(sizes, default=0))
        shutil.rmtree(folder)
        differing = differences(found[1], found[0])
        varying = {line.split(" ")[0] for line in differing if line.endswith(" differs")}
        unequal = [line for line in differing if not (line.endswith(" differs") and MAY_VARY.match(line))]
        assert not unequal, f"two unbroken runs of {command} differ: {unequal}"
        return replace(first, varying=varying)


def repo(folder: Path) -> str:
    """The repo on the hub that belongs to the folder of a trial."""
    return f"tester/{folder.name}"


def is_clear(result: Result) -> bool:
    """Whether a command has failed with one message and without a traceback."""
    return result.returncode in (1, 2) and bool(MESSAGE.search(result.stderr)) and "Traceback" not in result.stderr


def last_words(result: Result) -> str:
    """The end of what a command has written, for messages."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    found = MESSAGE.search(result.stderr)
    return f"exit {result.returncode}: {found[0] if found else ' | '.join(lines[-3:])}"[:400]


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of some bytes, rounded up to a page, as `folder`, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without a page more, none would be left for the root.
    _mount("-t", "tmpfs", "-o", f"size={size + 4096}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    """Give a small disk room for everything."""
    _mount("-o", f"remount,size={ROOM}", str(folder))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
