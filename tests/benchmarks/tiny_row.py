"""A row whose work takes no time."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work


def add(offset: float, mebibytes: int) -> Work:
    def work() -> Outcome:
        held = np.ones((mebibytes, 2**20), dtype=np.uint8)
        return Outcome({"sum": np.arange(4.0) + offset}, {"bytes": float(held.nbytes)})

    return work


def contests(device: str) -> list[Contest]:
    contestants = {
        "ours": Contestant(partial(add, 0.0, 8)),
        "peer": Contestant(partial(add, 0.0, 32)),
    }
    goals = (Goal("peer", "memory", 0.5), Goal("peer", "bytes", 0.1))
    equal = Contest("equal", contestants, goals, {"sum": 0.0}, rounds=2)
    wrong = {"ours": Contestant(partial(add, 0.0, 1)), "peer": Contestant(partial(add, 0.5, 1))}
    return [equal, Contest("unequal", wrong, (Goal("peer", "cpu", 1.0),), {"sum": 0.1}, rounds=1)]


ROW = Row("R99", "sums", contests)
