"""One rank has an error: all end within a minute, and its message is there once; the others say that they lost it."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

import pytest

from llm2clip.utils.library_errors import PEER_ENDED
from tests.processes.jobs import OUT, Jobs
from tests.processes.strike import Strike

pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly

ERROR = re.compile(r"^llm2clip \S+: (error|stopped by).*", re.MULTILINE)


def one_message(errors: str) -> str:
    """Return the message of the rank at fault; that of another one says that it has lost a rank."""
    assert errors.count("Traceback") == 1, errors[-6000:]  # the one of torchrun
    [message] = [found[0] for found in ERROR.finditer(errors) if PEER_ENDED not in found[0]]
    return message


@pytest.mark.parametrize(
    "name", ["stage1", *(pytest.param(name, marks=NIGHTLY) for name in ("cache", "sidecars", "evaluate"))]
)
def test_a_full_disk_of_one_rank_ends_the_run_with_its_message(name: str, jobs: Jobs, tmp_path: Path) -> None:
    full = Strike(1, "disk", plan={"mode": "from", "at": 1, "error": errno.ENOSPC}).below(tmp_path / OUT)
    failed = jobs.run(name, tmp_path, full, check=False)
    ended = time.time()
    assert failed.returncode != 0
    assert ended - full.moment(failed.stderr) < 60
    assert "No space left on device" in one_message(failed.stderr)
    assert not jobs.is_whole(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["stage2-damaged", *(pytest.param(name, marks=NIGHTLY) for name in ("frozen-damaged", "evaluate-damaged"))]
)
def test_a_damaged_image_of_one_rank_ends_the_run_with_its_key(name: str, jobs: Jobs, tmp_path: Path) -> None:
    failed = jobs.run(name, tmp_path, check=False)
    assert failed.returncode != 0
    assert "damaged-one" in one_message(failed.stderr)
    assert not list(tmp_path.rglob("model.safetensors"))
