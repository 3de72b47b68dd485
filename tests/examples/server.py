"""The demo as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 240


@contextmanager
def served(
    script: Path | str, *arguments: str | Path, folder: Path, path: Path | None = None
) -> Iterator[tuple[str, int]]:
    """Start a script that serves the demo, wait until it answers, and stop it afterwards.

    Args:
        script: The script, or `-m` before the name of a module.
        arguments: Its arguments.
        folder: Its working directory.
        path: Where Python looks for packages first.

    Yields:
        The page's address, and the process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port)}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, script, *arguments], cwd=folder, env=environment, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait(address, process, log)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def open_page(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open a served demo in gradio's client; the pictures that it shows are stored below `folder`.

    The client leaves an empty temporary folder for each of them.
    """
    from gradio_client import Client  # the other tests need not wait for it

    scratch = folder / "downloads"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return Client(address, download_files=folder / "answers", verbose=False)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(f"no answer from {address}: {log.read_text()[-3000:]}")
