"""Environments for peers that cannot live beside our own dependencies."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ENVIRONMENTS: dict[str, list[str]] = {
    # The last release, and the last transformers that it works with.
    "llm2vec": ["llm2vec==0.2.3", "transformers==4.44.2", "numpy<2", "webdataset>=0.2", "torch"],
}
FOLDER = Path(sys.prefix) / "peers"


def python_of(environment: str | None) -> str:
    """The interpreter of an environment, which is made when it is first needed.

    Raises:
        RuntimeError: pip fails.
    """
    if environment is None:
        return sys.executable
    requirements = ENVIRONMENTS[environment]
    folder = FOLDER / environment
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    print(f"installing the peer {environment} ({', '.join(requirements)}) in {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"the peer {environment} could not be installed: {' '.join(command)}")
    stamp.write_text(wanted)
    return str(python)
