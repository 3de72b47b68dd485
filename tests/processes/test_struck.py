"""One rank is killed, is slow or has an error: all end within a minute and say why, and a run can be repeated."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

import pytest

from llm2clip.files.library_errors import PEER_ENDED
from tests.faults.content import content, differences
from tests.processes.jobs import OUT, STAGES, Jobs
from tests.processes.strike import Strike

pytestmark = pytest.mark.slow
ERROR = re.compile(r"^llm2clip \S+: (error|stopped by).*", re.MULTILINE)
# Who is killed, and when: in a step, in the middle of its rows, or of a write; and the number of ranks.
KILLED = {
    "stage1": (Strike(1, "disk", plan={"mode": "kill", "at": 3}), 2),
    "mntp": (Strike(1, "kill", "step", 3), 2),
    "stage2": (Strike(0, "kill", "step", 3), 2),
    "stage2-stream": (Strike(1, "kill", "step", 4), 2),
    "cache": (Strike(1, "kill", "call", 2), 2),
    "sidecars": (Strike(2, "kill", "call", 1), 4),
    "evaluate": (Strike(1, "kill", "call", 2), 2),
}
# The first rank computes when the launcher stops it; elsewhere the others wait for the one that is killed.
BUSY = {"cache": [Strike(0, "sleep", "call", 2, seconds=100)]}
# Who is slow then, if not the one that was killed: the first rank gets the only shard that is missing.
SLOW = {"evaluate": 0}


def often(names: str, *others: str) -> list:
    """Parameters: those that `.ci/run` has time for, and others."""
    return [*names.split(), *(pytest.param(name, marks=pytest.mark.nightly) for name in others)]


@pytest.mark.parametrize("name", often("stage2 sidecars", "stage1", "mntp", "stage2-stream", "cache", "evaluate"))
def test_a_killed_rank_ends_the_run_and_the_command_again_with_a_slow_rank_equals_an_unbroken_one(
    name: str, jobs: Jobs, tmp_path: Path
) -> None:
    strike, ranks = KILLED[name]
    folder = tmp_path / "run"
    strike = strike.below(folder / OUT)
    killed = jobs.run(name, folder, strike, *BUSY.get(name, []), ranks=ranks, check=False)
    assert killed.returncode != 0
    assert time.time() - strike.moment(killed.stderr) < 60
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-3000:]
    assert PEER_ENDED in killed.stderr, killed.stderr[-3000:]
    # The one of torchrun.
    assert killed.stderr.count("Traceback") == 1, killed.stderr[-6000:]
    assert not jobs.is_whole(name, folder)

    slow = Strike(SLOW.get(name, strike.rank), "stop", "step" if name in STAGES else "call")
    again = jobs.run(name, folder, slow, options=["--resume"] if name in STAGES else [], ranks=ranks)
    assert time.time() - slow.moment(again.stderr) > slow.seconds
    assert jobs.is_whole(name, folder)
    assert differences(content(folder / OUT), jobs.unbroken(name, ranks)) == []


def one_message(errors: str) -> str:
    """Return the message of the rank at fault; that of another one says that it has lost a rank."""
    assert errors.count("Traceback") == 1, errors[-6000:]  # the one of torchrun
    [message] = [found[0] for found in ERROR.finditer(errors) if PEER_ENDED not in found[0]]
    return message


@pytest.mark.parametrize("name", often("stage1", "cache", "sidecars", "evaluate"))
def test_a_full_disk_of_one_rank_ends_the_run_with_its_message(name: str, jobs: Jobs, tmp_path: Path) -> None:
    full = Strike(1, "disk", plan={"mode": "from", "at": 1, "error": errno.ENOSPC}).below(tmp_path / OUT)
    failed = jobs.run(name, tmp_path, full, check=False)
    assert failed.returncode != 0
    assert time.time() - full.moment(failed.stderr) < 60
    assert "No space left on device" in one_message(failed.stderr)
    assert not jobs.is_whole(name, tmp_path)


@pytest.mark.parametrize("name", often("stage2-damaged stage2-skipped", "frozen-damaged", "evaluate-damaged"))
def test_a_damaged_image_of_one_rank_ends_the_run_with_its_key(name: str, jobs: Jobs, tmp_path: Path) -> None:
    failed = jobs.run(name, tmp_path, check=False)
    assert failed.returncode != 0
    assert "damaged-one" in one_message(failed.stderr)
    assert not list(tmp_path.rglob("model.safetensors"))
