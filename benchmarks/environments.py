"""Virtual environments for peers whose requirements conflict with ours."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import venv
from pathlib import Path

from packaging.utils import canonicalize_name

ENVIRONMENTS: dict[str, list[str]] = {
    # The last release, with the last version of transformers that it supports.
    "llm2vec": ["llm2vec==0.2.3", "transformers==4.44.2", "numpy<2", "torch"],
    # The last release; its requirements bring a transformers that it supports.
    "infinity": ["infinity-emb[torch,server]==0.0.78"],
}
FOLDER = Path(sys.prefix) / "peers"
LIBRARIES = (
    "torch",
    "transformers",
    "timm",
    "open_clip_torch",
    "sentence-transformers",
    "faiss-cpu",
    "clip-benchmark",
    "llm2vec",
    "onnxruntime",
    "webdataset",
    "torchvision",
    "pillow",
)


def python_of(environment: str | None) -> str:
    """Return the interpreter of an environment, which is created on first use.

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


def versions_of(environment: str | None) -> dict[str, str]:
    """Return the versions of Python and of the relevant libraries that are installed in an environment."""
    command = [python_of(environment), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    installed = {canonicalize_name(entry["name"]): entry["version"] for entry in listed}
    versions = {name: installed.get(canonicalize_name(name)) for name in LIBRARIES}
    # All environments use the Python version of this process.
    return {"python": platform.python_version(), **{name: version for name, version in versions.items() if version}}
