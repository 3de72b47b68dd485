"""What a process must not do with a file that it reads: run code, open connections, write elsewhere.

`python -m tests.damaged.watch PLACE COMMANDS` runs commands of `llm2clip`, in JSON, and prints what was seen.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from PIL import Image

from tests.documents.reading import ROOT

FORBIDDEN = (
    *("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("socket.connect", "socket.getaddrinfo", "shutil.unpack_archive"),
)
RESULTS = "RESULTS "


def watch(place: Path) -> list[str]:
    """Return a list that grows with what this process does of it from now on, by Python's audit hook.

    Args:
        place: The only folder that it may write to.
    """
    seen: list[str] = []
    allowed = (f"{place.resolve()}/", "/dev/", "/proc/")

    def look(event: str, arguments: Any) -> None:
        if event in FORBIDDEN:
            seen.append(f"{event} {arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            path = os.path.realpath(arguments[0])
            # Nameless files are opened by the path of their folder.
            seen.extend([] if f"{path}/".startswith(allowed) else [f"writes {path}"])

    sys.addaudithook(look)
    return seen


def run(
    commands: list[list[str]], folder: Path, variables: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run commands in a process of their own; returns the status of each and what was seen, and all that was printed.

    Args:
        commands: Arguments of `llm2clip`.
        folder: The working directory, and the only place that they may write to.
        variables: More environment variables.
    """
    home = folder / "home"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        **{"PYTHONPATH": f"{ROOT}:{ROOT / 'training'}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")},
        **{"TMPDIR": str(home / "tmp"), "MPLCONFIGDIR": str(home / "mpl"), "HOME": str(home)},
        **(variables or {}),
    }
    command = [sys.executable, "-B", "-m", "tests.damaged.watch", str(folder.resolve()), json.dumps(commands)]
    options: dict[str, Any] = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    assert RESULTS in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition(RESULTS)[2]), done.stdout + done.stderr


def picture() -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.effect_noise((32, 32), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Run commands, and print their exit statuses with what was seen of each."""
    from llm2clip import cli

    commands = json.loads(sys.argv[2])
    for name in {command[0] for command in commands}:
        importlib.import_module(cli.COMMANDS[name].module)
    seen, results = watch(Path(sys.argv[1])), []
    for command in commands:
        seen.clear()
        try:
            status = cli.main(command)
        except Exception:  # with --traceback
            traceback.print_exc()
            status = 2
        results.append({"command": command[0], "status": status, "seen": list(seen)})
    print(RESULTS + json.dumps(results))


if __name__ == "__main__":
    main()
