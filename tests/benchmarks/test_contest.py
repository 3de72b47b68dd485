import numpy as np
import pytest

from benchmarks.contest import UnequalError, check_equal, ratio, run_contest, summarise
from benchmarks.row import Contest, Contestant, load_row, row_modules
from tests.benchmarks import tiny_row

MODULE = "tests.benchmarks.tiny_row"


def test_each_contestant_is_measured_in_its_own_process():
    contest = tiny_row.contests("cpu")[0]
    turns = run_contest(MODULE, "cpu", contest)
    assert [len(measured) for measured in turns.values()] == [3, 3, 3]
    figures = summarise(turns)
    assert figures["ours"]["bytes"] == 8 * 2**20
    assert 7 * 2**20 < figures["ours"]["memory"] < 16 * 2**20 < figures["peer"]["memory"]
    assert ratio(turns, "peer", "bytes") == 0.25
    assert 0.2 < ratio(turns, "peer", "memory") < 0.5
    assert all(turn["wall"] > 0 and turn["cpu"] >= 0 for measured in turns.values() for turn in measured)


def test_unequal_values_stop_the_contest():
    with pytest.raises(UnequalError, match=r"sum: ours differs from that of peer by 0\.5"):
        run_contest(MODULE, "cpu", tiny_row.contests("cpu")[1])


def test_a_contestant_that_fails_is_named():
    contest = Contest("absent", {"ours": Contestant(tiny_row.limit)}, ())
    with pytest.raises(RuntimeError, match="contestant 'ours' ended with status 1"):
        run_contest(MODULE, "cpu", contest)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"x": np.zeros(3)}, {"y": np.zeros(3)}, r"x: ours is \(3,\), that of peer nothing"),
        ({"x": np.zeros(3)}, {"x": np.zeros((3, 1))}, r"ours is \(3,\), that of peer \(3, 1\)"),
        ({"x": np.array([np.nan])}, {"x": np.ones(1)}, "differs from that of peer by nan"),
        ({"x": np.array([1.02])}, {"x": np.ones(1)}, "0.01 of that is allowed"),
    ],
)
def test_missing_differing_or_misshapen_values_are_unequal(tmp_path, ours, theirs, message):
    np.savez(tmp_path / "ours.npz", **ours)
    np.savez(tmp_path / "theirs.npz", **theirs)
    with pytest.raises(UnequalError, match=message):
        check_equal(tmp_path / "ours.npz", tmp_path / "theirs.npz", {"x": 0.01}, "peer")


def test_a_contest_without_compared_values_is_an_error(tmp_path):
    np.savez(tmp_path / "values.npz", x=np.zeros(1))
    with pytest.raises(UnequalError, match="compares no values"):
        check_equal(tmp_path / "values.npz", tmp_path / "values.npz", {}, "peer")


def test_the_ratio_is_the_median_of_the_ratios_within_rounds():
    turns = {"ours": [{"cpu": 9.0}, {"cpu": 1.0}, {"cpu": 3.0}], "peer": [{"cpu": 1.0}, {"cpu": 2.0}, {"cpu": 4.0}]}
    assert ratio(turns, "peer", "cpu") == 0.625


@pytest.mark.parametrize("name", list(row_modules()))
def test_every_row_lists_valid_contests(name):
    row = load_row(row_modules()[name])
    assert row.id == name
    for device in row.devices:
        contests = row.contests(device)
        assert len({contest.title for contest in contests}) == len(contests) > 0
        for contest in contests:
            assert next(iter(contest.contestants)) == "ours"
            assert contest.goals
            assert {goal.against for goal in contest.goals} <= set(contest.contestants)
            assert all(goal.at_most < 10 for goal in contest.goals), "a goal has to be one that can be missed"
            peers = [peer for peer, entry in contest.contestants.items() if peer != "ours" and not entry.is_limit]
            assert not peers or contest.tolerance
