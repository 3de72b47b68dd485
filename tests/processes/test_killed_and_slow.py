"""A rank is killed: the others end, and say why. The same command again, with a slow rank: an equal result."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llm2clip.utils.library_errors import PEER_ENDED
from tests.faults.content import content, differences
from tests.processes.jobs import OUT, STAGES, Jobs
from tests.processes.strike import Strike

pytestmark = pytest.mark.slow

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
# Of these, those that `.ci/run` has time for.
OFTEN = ("stage2", "sidecars")
# The first rank computes when the launcher stops it; elsewhere the others wait for the one that is killed.
BUSY = {"cache": [Strike(0, "sleep", "call", 2, seconds=100)]}
# Who is slow then, if not the one that was killed: the first rank gets the only shard that is missing.
SLOW = {"evaluate": 0}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.nightly) for name in KILLED]
)
def test_a_killed_rank_ends_the_run_and_the_command_again_with_a_slow_rank_equals_an_unbroken_one(
    name: str, jobs: Jobs, tmp_path: Path
) -> None:
    strike, ranks = KILLED[name]
    folder = tmp_path / "run"
    strike = strike.below(folder / OUT)
    killed = jobs.run(name, folder, strike, *BUSY.get(name, []), ranks=ranks, check=False)
    ended = time.time()
    assert killed.returncode != 0
    assert ended - strike.moment(killed.stderr) < 60
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
