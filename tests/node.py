"""Programs for node, and the packages of npm that its tests need; both from this machine alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "@huggingface/transformers"


def install(folder: Path) -> Path:
    """Install transformers.js from npm's cache into a folder, and return its `node_modules`; skips without either."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node with npm; on Debian: apt-get install nodejs npm")
    # The scripts of its packages would download libraries for GPUs.
    command = ["npm", "install", "--offline", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    run = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"{PACKAGE} is not in npm's cache, where `npm install --ignore-scripts {PACKAGE}` once puts it")
    return folder / "node_modules"


def run_module(code: str, folder: Path, node_modules: Path, *arguments: str) -> Any:
    """Run a module of JavaScript in a folder; what it prints last is read as JSON."""
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(node_modules)
    script = folder / "script.mjs"
    script.write_text(code, encoding="utf-8")
    run = subprocess.run(["node", str(script), *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
