"""A process that has never seen this package, offline: what someone who loads a folder from the Hub has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.forks import run_code

# The test environment has the package installed; this hides it as if it were not.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_llm2clip", "llm2clip", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def answer(
    code: str,
    *arguments: str | Path,
    home: Path,
    environment: dict[str, str] | None = None,
    is_forked: bool = True,
    python: str | Path = sys.executable,
) -> Any:
    """What `code` prints, read as JSON.

    Args:
        code: Python; its arguments are in `sys.argv[1:]`.
        arguments: They.
        home: An empty folder: its working directory, and where it caches.
        environment: Variables; the default is offline.
        is_forked: Whether it finds torch imported; not for code that starts processes, nor for another `python`.
        python: The interpreter.
    """
    variables = environment or {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "huggingface")}
    command = [str(python), "-I", "-c", HIDE + code, *map(str, arguments)]
    run: Any = run_code if is_forked else subprocess.run
    result = run(command, capture_output=True, text=True, env={**os.environ, **variables}, cwd=home)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
