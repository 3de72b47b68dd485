"""R16: searching an index of a million embeddings, also with conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.rows.r15_index_build import ALLOWED, CELLS, COUNT, FAISS

if TYPE_CHECKING:
    import numpy as np

QUERIES, PROBES = 100, 16
# What is measured, and the value of the column `source` that the rows must have.
CONDITIONS = {"": None, " where 10%": "ten per cent", " where 1%": "one per cent"}
ALLOWED_MS, ALLOWED_MISSED = 10.0, 0.05
EXACT = "faiss IndexFlatIP"


class _Inputs:
    """Vectors in a file, queries, and the ten best for each condition."""

    def __init__(self, count: int) -> None:
        from benchmarks.search_inputs import Mixture, exact_best, write_vectors
        from benchmarks.stage2_inputs import temporary_folder

        self.folder, self.mixture, self.count = temporary_folder(), Mixture(count), count
        self.path = self.folder / "vectors"
        write_vectors(self.path, self.mixture)
        self.queries = self.mixture.queries(QUERIES)
        sources = self.mixture.sources()
        self.allowed = {name: None if value is None else sources == value for name, value in CONDITIONS.items()}
        self.best = {name: exact_best(self.path, self.queries, allowed) for name, allowed in self.allowed.items()}

    def measure(self, search: Callable[[np.ndarray, str], tuple[Any, Any]]) -> Outcome:
        """Search for each query under each condition; `search` returns scores and numbers, both `(1, 10)`."""
        import time

        import numpy as np

        from benchmarks.search_inputs import recall

        values, metrics = {}, {}
        for name, best in self.best.items():
            start = time.process_time()
            found = [search(query[None], name) for query in self.queries]
            metrics[f"ms/query{name}"] = (time.process_time() - start) / len(found) * 1000
            scores, numbers = (np.concatenate(parts) for parts in zip(*found, strict=True))
            metrics[f"missed{name}"] = 1 - recall(numbers, best)
            values[f"score{name}"] = scores.mean()
        return Outcome(values, metrics)


def _ours(count: int = COUNT) -> Work:
    import numpy as np

    from benchmarks.search_inputs import TOP, build_index

    inputs = _Inputs(count)
    index = build_index(inputs.folder / "index", inputs.path, inputs.mixture, index_type="ivf_rq", probes=PROBES)
    conditions = {name: value and f"source = '{value}'" for name, value in CONDITIONS.items()}

    def search(query: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = index.search(query, TOP, conditions[name])[0]
        return np.array([[score for score, _ in found]]), np.array([[int(row["key"]) for _, row in found]])

    return lambda: inputs.measure(search)


def _faiss(kind: str, count: int = COUNT) -> Work:
    import faiss
    import numpy as np

    from benchmarks.search_inputs import TOP, WIDTH, build_faiss_index, read_vectors

    inputs = _Inputs(count)
    if kind == EXACT:
        index = faiss.IndexFlatIP(WIDTH)
        for some in read_vectors(inputs.path):
            index.add(some.astype(np.float32))
    else:
        index = build_faiss_index(inputs.path, count, CELLS)
    packed = {name: some is not None and np.packbits(some, bitorder="little") for name, some in inputs.allowed.items()}

    def search(query: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        options: dict[str, Any] = {} if packed[name] is False else {"sel": faiss.IDSelectorBitmap(packed[name])}
        if kind == EXACT:
            return index.search(query, TOP, params=faiss.SearchParameters(**options))  # type: ignore[no-any-return]
        parameters = faiss.SearchParametersIVF(nprobe=PROBES, **options)
        return index.search(query, TOP, params=parameters)  # type: ignore[no-any-return]

    return lambda: inputs.measure(search)


def _allowed() -> Work:
    allowed = {f"ms/query{name}": ALLOWED_MS for name in CONDITIONS}
    return lambda: Outcome(metrics=allowed | {f"missed{name}": ALLOWED_MISSED for name in CONDITIONS})


def contests(device: str) -> list[Contest]:
    from functools import partial

    contestants = {
        "ours": Contestant(_ours),
        FAISS: Contestant(partial(_faiss, FAISS)),
        EXACT: Contestant(partial(_faiss, EXACT)),
        ALLOWED: Contestant(_allowed, is_limit=True),
    }
    goals = [Goal(ALLOWED, f"{what}{name}", 1.0) for what in ("ms/query", "missed") for name in CONDITIONS]
    goals += [Goal(EXACT, "ms/query", 0.1), Goal(FAISS, "ms/query", 100.0)]
    note = (
        f"The index of R15, with {PROBES} probes, one query at a time, including the rows' keys. *missed* is the "
        "share of the exact ten best that is not found; allowed are 10 ms and 0.05. A condition is on a column with a "
        "bitmap index that 10% or 1% of the rows fulfil, the same one in all searches, so that ours reads the 10,000 "
        "embeddings of the second into memory after eight of them. The indexes of faiss are in memory, ours on disk."
    )
    title = f"{COUNT:,} embeddings, {QUERIES} held-out queries"
    # Few rows fulfil the last condition, in cells far from the query.
    tolerance = {"score": 0.01, "score where 10%": 0.02, "score where 1%": 0.1}
    return [Contest(title, contestants, tuple(goals), tolerance, rounds=3, note=note)]


ROW = Row("R16", "search an index for the 10 best, width 512", contests)
