"""Contests are fair: values are compared before times, each contestant has its own process."""

import numpy as np
import pytest

from benchmarks.contest import UnequalError, check_equal, run_contest, summarise
from benchmarks.row import Contest, Contestant, load_row, row_modules
from tests.benchmarks import tiny_row

MODULE = "tests.benchmarks.tiny_row"


def test_each_contestant_is_measured_in_its_own_process():
    turns = run_contest(MODULE, "cpu", tiny_row.contests("cpu")[0])
    assert [len(measured) for measured in turns.values()] == [3, 3]
    figures = summarise(turns)
    assert 7 * 2**20 < figures["ours"]["memory"] < 16 * 2**20 < figures["peer"]["memory"]
    assert figures["ours"]["bytes"] / figures["peer"]["bytes"] == 0.25
    assert all(turn["wall"] > 0 and turn["cpu"] >= 0 for measured in turns.values() for turn in measured)


def test_unequal_values_or_a_failure_stop_the_contest():
    with pytest.raises(UnequalError, match=r"sum: ours differs from that of peer by 0\.5"):
        run_contest(MODULE, "cpu", tiny_row.contests("cpu")[1])
    with pytest.raises(RuntimeError, match="contestant 'ours' ended with status 1"):
        run_contest(MODULE, "cpu", Contest("absent", {"ours": Contestant(dict)}, ()))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"x": np.zeros(3)}, {"y": np.zeros(3)}, r"x: ours is \(3,\), that of peer nothing"),
        ({"x": np.zeros(3)}, {"x": np.zeros((3, 1))}, r"ours is \(3,\), that of peer \(3, 1\)"),
        ({"x": np.array([np.nan])}, {"x": np.ones(1)}, "differs from that of peer by nan"),
        ({"x": np.array([1.02])}, {"x": np.ones(1)}, "0.01 of that is allowed"),
    ],
    ids=["missing", "shape", "nan", "different"],
)
def test_missing_differing_or_misshapen_values_are_unequal(tmp_path, ours, theirs, message):
    np.savez(tmp_path / "ours.npz", **ours)
    np.savez(tmp_path / "theirs.npz", **theirs)
    with pytest.raises(UnequalError, match=message):
        check_equal(tmp_path / "ours.npz", tmp_path / "theirs.npz", {"x": 0.01}, "peer")
    with pytest.raises(UnequalError, match="compares no values"):
        check_equal(tmp_path / "ours.npz", tmp_path / "ours.npz", {}, "peer")


@pytest.mark.parametrize("name", list(row_modules()))
def test_every_row_compares_its_values_and_has_goals_against_its_contestants(name):
    row = load_row(row_modules()[name])
    contests = [contest for device in row.devices for contest in row.contests(device)]
    assert contests
    for contest in contests:
        assert next(iter(contest.contestants)) == "ours"
        if len(contest.contestants) == 1:  # it says itself what it has to reach, and fails below that
            assert contest.note
            continue
        assert contest.goals
        assert {goal.against for goal in contest.goals} <= set(contest.contestants)
        assert contest.tolerance
