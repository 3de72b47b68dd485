"""R15: building a search index of a million embeddings."""

from __future__ import annotations

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

COUNT, CELLS = 1_000_000, 1024
FAISS = f"faiss IVF{CELLS},SQ8"


def _ours() -> Work:
    import llm2clip.search.search_index  # noqa: F401  # imports are not measured
    from benchmarks.search_inputs import Mixture, build_index
    from benchmarks.small_llama import new_folder

    folder, mixture = new_folder(), Mixture(COUNT)

    def work() -> Outcome:
        index = build_index(folder / "index", mixture, index_type="ivf_rq")
        return Outcome({"images": len(index)})

    return work


def _faiss() -> Work:
    import faiss

    from benchmarks.search_inputs import Mixture, build_faiss_index
    from benchmarks.small_llama import new_folder

    folder, mixture = new_folder(), Mixture(COUNT)

    def work() -> Outcome:
        index = build_faiss_index(mixture, CELLS)
        faiss.write_index(index, str(folder / "index.faiss"))
        return Outcome({"images": index.ntotal})

    return work


def contests(device: str) -> list[Contest]:
    contestants = {
        "ours": Contestant(_ours),
        FAISS: Contestant(_faiss),
    }
    goals = (Goal(FAISS, "cpu", 4.0), Goal(FAISS, "memory", 1.0))
    note = (
        "A mixture of 1,000 isotropic Gaussians, in memory in 16 bits. Ours is the stored embeddings, and the table "
        "with its conditions' indexes and the IVF_RQ index of 4 bits (`--index-type ivf_rq`), on disk; faiss' has "
        "neither keys nor embeddings."
    )
    return [Contest(f"{COUNT:,} embeddings", contestants, goals, {"images": 0.0}, rounds=1, note=note)]


SHORTFALL = (
    "ours writes the embeddings to the disk twice, with checksums and an index of the conditions' column; faiss keeps "
    "vectors alone, in memory."
)
ROW = Row("R15", "build a search index, width 512", contests, shortfall=SHORTFALL)
