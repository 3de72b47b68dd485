"""R15: building a search index of a million embeddings."""

from __future__ import annotations

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

COUNT, CELLS = 1_000_000, 1024
LIMITS = {"wall": 600.0, "cpu": 600.0, "memory": 2e9}
ALLOWED = "what is allowed"
FAISS = f"faiss IVF{CELLS},SQ8"


def _ours(count: int = COUNT) -> Work:
    import llm2clip.search.image_index  # noqa: F401  # imports are not measured
    from benchmarks.search_inputs import Mixture, build_index, write_vectors
    from benchmarks.stage2_inputs import temporary_folder

    folder, mixture = temporary_folder(), Mixture(count)
    write_vectors(folder / "vectors", mixture)

    def work() -> Outcome:
        index = build_index(folder / "index", folder / "vectors", mixture, index_type="ivf_rq")
        return Outcome({"images": index.rows.count()})

    return work


def _faiss(count: int = COUNT) -> Work:
    import faiss

    from benchmarks.search_inputs import Mixture, build_faiss_index, write_vectors
    from benchmarks.stage2_inputs import temporary_folder

    folder, mixture = temporary_folder(), Mixture(count)
    write_vectors(folder / "vectors", mixture)

    def work() -> Outcome:
        index = build_faiss_index(folder / "vectors", count, CELLS)
        faiss.write_index(index, str(folder / "index.faiss"))
        return Outcome({"images": index.ntotal})

    return work


def _allowed() -> Work:
    return lambda: Outcome(metrics=LIMITS)


def contests(device: str) -> list[Contest]:
    contestants = {
        "ours": Contestant(_ours),
        FAISS: Contestant(_faiss),
        ALLOWED: Contestant(_allowed, is_limit=True),
    }
    goals = (Goal(ALLOWED, "cpu", 1.0), Goal(ALLOWED, "memory", 1.0), Goal(FAISS, "cpu", 4.0))
    note = (
        "A mixture of 1,000 isotropic Gaussians, read from a file in 16 bits. Ours is the table with its conditions' "
        "indexes and the IVF_RQ index of 4 bits (`--index-type ivf_rq`), on disk; faiss' has neither keys nor "
        "embeddings. Allowed are ten minutes on one core and 2 GB."
    )
    return [Contest(f"{COUNT:,} embeddings", contestants, goals, {"images": 0.0}, rounds=1, note=note)]


ROW = Row("R15", "build a search index, width 512", contests)
