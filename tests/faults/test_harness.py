"""The harness of `make test-faults` strikes where it is meant to, and the documents have its record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import record
from tests.faults.commands import ATTACKED
from tests.faults.injection import Plan, preloaded, read_changes
from tests.processes import ENVIRONMENT

# Writes one file in place and one under another name.
WRITER = """
import json, os, sys
from tests.faults.injection import Plan
Plan(**json.loads(sys.argv[1])).arm()
os.chdir(sys.argv[2])
with open("in place", "wb", buffering=0) as file:
    file.write(b"1234")
with open("temporary", "wb", buffering=0) as file:
    file.write(b"1234")
    os.fsync(file.fileno())
os.rename("temporary", "renamed")
"""
KINDS = ["create", "write", "create", "write", "fsync", "rename"]


@pytest.mark.parametrize(
    ("plan", "status", "message", "files"),
    [
        ({"mode": "count"}, 0, "", {"in place": b"1234", "renamed": b"1234"}),
        ({"mode": "kill", "at": 2}, -9, "", {"in place": b"12"}),
        ({"mode": "kill", "at": 6}, -9, "", {"in place": b"1234", "temporary": b"1234"}),
        ({"mode": "once", "at": 5, "error": 5}, 1, "Input/output", {"in place": b"1234", "temporary": b"1234"}),
        ({"mode": "from", "at": 3, "error": 28}, 1, "No space left", {"in place": b"1234"}),
        ({"file_size": 0}, 1, "File too large", {"in place": b""}),
    ],
)
def test_a_process_is_struck_at_a_change(
    plan: dict[str, Any], status: int, message: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    made = Plan(str(work), str(tmp_path / "log"), **plan)
    command = [sys.executable, "-c", WRITER, made.to_json(), str(work)]
    done = subprocess.run(command, env=preloaded(tmp_path, ENVIRONMENT), capture_output=True, text=True)
    assert (done.returncode, {path.name: path.read_bytes() for path in work.iterdir()}) == (status, files)
    assert message in done.stderr
    assert made.mode != "count" or [change.kind for change in read_changes(made)] == KINDS


def test_the_page_has_the_last_record_of_what_it_promises() -> None:
    page = record.PAGE.read_text(encoding="utf-8")
    assert record.fill(page, record.read()) == page
    kills, faults = (sum(getattr(attacked, name) for attacked in ATTACKED.values()) for name in ("kills", "faults"))
    assert f"{kills} kills, {faults} faults, every type of file" in page
