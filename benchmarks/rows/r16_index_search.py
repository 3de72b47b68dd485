"""R16: searching an index of a million embeddings, also with conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.rows.r15_index_build import CELLS, COUNT, FAISS

if TYPE_CHECKING:
    import numpy as np

QUERIES, PROBES = 100, 16
# What is measured, and the value of the column `source` that the rows must have.
CONDITIONS = {"": None, " where 10%": "ten per cent", " where 1%": "one per cent"}
EXACT = "faiss IndexFlatIP"


class _Inputs:
    """Vectors, queries of the same kind, and the ten best for each condition."""

    def __init__(self) -> None:
        import faiss
        import numpy as np

        from benchmarks.search_inputs import TOP, Mixture, build_exact_index, selection

        self.mixture = Mixture(COUNT)
        self.queries = Mixture(QUERIES, seed=1000).vectors.astype(np.float32)
        sources = self.mixture.sources
        self.allowed = {name: None if value is None else sources == value for name, value in CONDITIONS.items()}
        exact = build_exact_index(self.mixture)
        self.best = {
            name: exact.search(self.queries, TOP, params=faiss.SearchParameters(**selection(allowed)))[1]
            for name, allowed in self.allowed.items()
        }

    def measure(self, search: Callable[[np.ndarray, str], tuple[Any, Any]]) -> Outcome:
        """Search for each query under each condition; `search` returns scores and numbers, both `(1, 10)`."""
        import time

        import numpy as np

        from benchmarks.search_inputs import recall

        values, metrics = {}, {}
        for name, best in self.best.items():
            start = time.process_time()
            answers = [search(query[None], name) for query in self.queries]
            metrics[f"ms/query{name}"] = (time.process_time() - start) / len(answers) * 1000
            scores, numbers = (np.concatenate(parts) for parts in zip(*answers, strict=True))
            metrics[f"missed{name}"] = 1 - recall(numbers, best)
            values[f"score{name}"] = scores.mean()
        return Outcome(values, metrics)


def _ours() -> Work:
    import numpy as np

    from benchmarks.search_inputs import TOP, build_index
    from benchmarks.small_llama import new_folder

    inputs = _Inputs()
    index = build_index(new_folder() / "index", inputs.mixture, index_type="ivf_rq", probes=PROBES)
    del inputs.mixture  # a gigabyte
    conditions = {name: value and f"source = '{value}'" for name, value in CONDITIONS.items()}

    def search(query: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        hits = index.search(query, TOP, conditions[name])[0]
        return np.array([[hit.score for hit in hits]]), np.array([[int(hit.key) for hit in hits]])

    return lambda: inputs.measure(search)


def _faiss(kind: str) -> Work:
    import faiss

    from benchmarks.search_inputs import TOP, build_exact_index, build_faiss_index, selection

    inputs = _Inputs()
    exact = kind == EXACT
    index = build_exact_index(inputs.mixture) if exact else build_faiss_index(inputs.mixture, CELLS)

    parameters = {
        name: faiss.SearchParameters(**selection(some))
        if exact
        else faiss.SearchParametersIVF(nprobe=PROBES, **selection(some))
        for name, some in inputs.allowed.items()
    }

    def search(query: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        return index.search(query, TOP, params=parameters[name])  # type: ignore[no-any-return]

    return lambda: inputs.measure(search)


def contests(device: str) -> list[Contest]:
    from functools import partial

    contestants = {
        "ours": Contestant(_ours),
        FAISS: Contestant(partial(_faiss, FAISS)),
        EXACT: Contestant(partial(_faiss, EXACT)),
    }
    goals = [Goal(EXACT, "ms/query", 0.1), Goal(FAISS, "ms/query", 5.0)]
    goals += [Goal(FAISS, f"missed{name}", 1.0) for name in CONDITIONS]
    note = (
        f"The index of R15, with {PROBES} probes, one query at a time, including the rows' keys. *missed* is the "
        "share of the exact ten best that is not found. A condition is on a column with a "
        "bitmap index that 10% or 1% of the rows fulfil. The indexes of faiss are in memory, ours on disk."
    )
    title = f"{COUNT:,} embeddings, {QUERIES} held-out queries"
    # Few rows fulfil the last condition, in cells far from the query.
    tolerance = {"score": 0.01, "score where 10%": 0.02, "score where 1%": 0.1}
    return [Contest(title, contestants, tuple(goals), tolerance, rounds=3, note=note)]


ROW = Row("R16", "search an index for the 10 best, width 512", contests)
