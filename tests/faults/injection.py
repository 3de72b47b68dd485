"""A command in a process that dies, or whose system calls fail, at the n-th change of a folder.

`python -m tests.faults.injection PLAN ARGUMENTS` runs `llm2clip ARGUMENTS` by a plan. The changes are counted and
spoilt by `shim.c`, which the process has to have been started with; see `preloaded`.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

SOURCE = Path(__file__).with_name("shim.c")
Mode = Literal["off", "count", "kill", "once", "from"]
MODES: dict[Mode, int] = {"off": 0, "count": 1, "kill": 2, "once": 3, "from": 4}


@dataclass(frozen=True)
class Plan:
    """What happens to a process.

    Attributes:
        root: The folder whose changes are counted.
        log: File that receives the changes that are counted, or the one that is spoilt.
        mode: off: nothing; count: changes are counted; kill: SIGKILL at the change `at`, in the middle of a write;
            once: this change fails; from: so do all later ones that a full disk (or a read-only one, by `error`) does
            not allow.
        error: The number of the system's error.
        sockets: Whether data that is sent counts as a change.
        file_size: Largest file in bytes that the process can write.
        seconds: Time after which the process shows where it hangs and ends.
    """

    root: str
    log: str
    mode: Mode = "off"
    at: int = 0
    error: int = errno.EIO
    sockets: bool = False
    file_size: int | None = None
    seconds: int = 300

    def arm(self) -> None:
        """Let it happen to this process from now on."""
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        signal.alarm(self.seconds + 10)
        if self.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        shim = ctypes.CDLL(None)
        if not hasattr(shim, "fault_arm"):
            raise RuntimeError("this process was not started with the shim; see preloaded().")
        text, number = ctypes.c_char_p, ctypes.c_int
        shim.fault_arm.argtypes = [text, number, ctypes.c_long, number, text, number]
        root, log = (os.fsencode(path) for path in (self.root, self.log))
        shim.fault_arm(root, MODES[self.mode], self.at, self.error, log, self.sockets)

    def to_json(self) -> str:
        """Return the argument of a process."""
        return json.dumps(asdict(self))


class Change(NamedTuple):
    """A change of a folder: its number from 1, its kind (write, rename, ...), and the path in the folder."""

    number: int
    kind: str
    path: str


def read_changes(plan: Plan) -> list[Change]:
    """Read the changes that a process has counted."""
    log = Path(plan.log)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [line.split("\t", 2) for line in lines]
    return [Change(int(number), kind, path.removeprefix(plan.root).lstrip("/")) for number, kind, path in found]


def preloaded(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Build the shim into a folder; returns the environment of a process that has it.

    Raises:
        FileNotFoundError: There is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        raise FileNotFoundError("faults are injected by a library in C: this needs Linux and a C compiler (cc).")
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return {**environment, "LD_PRELOAD": str(library)}


def main() -> int:
    """Run a command by a plan."""
    from llm2clip import cli

    plan = Plan(**json.loads(sys.argv[1]))
    plan.arm()
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
