"""R11: exact search by inner product."""

from __future__ import annotations

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

CANDIDATES, QUERIES, WIDTH, K = 100_000, 1000, 512, 10


def _vectors() -> tuple:
    import torch

    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(CANDIDATES, WIDTH, generator=generator)
    queries = candidates[:QUERIES] + 3 * torch.randn(QUERIES, WIDTH, generator=generator)
    return torch.nn.functional.normalize(queries, dim=1), torch.nn.functional.normalize(candidates, dim=1)


def _ours() -> Work:
    from llm2clip.search.top_k import top_k

    queries, candidates = _vectors()

    def work() -> Outcome:
        scores, rows = top_k(queries, candidates, K)
        return Outcome({"scores": scores, "rows": rows})

    return work


def _faiss() -> Work:
    import faiss

    faiss.omp_set_num_threads(1)
    queries, candidates = (vectors.numpy() for vectors in _vectors())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(candidates)

    def work() -> Outcome:
        scores, rows = index.search(queries, K)
        return Outcome({"scores": scores, "rows": rows})

    return work


def contests(device: str) -> list[Contest]:
    peer = "faiss IndexFlatIP"
    contestants = {"ours": Contestant(_ours), peer: Contestant(_faiss)}
    title = f"{QUERIES:,} queries, {CANDIDATES:,} candidates"
    note = "Building faiss' index is not counted."
    return [Contest(title, contestants, (Goal(peer, "cpu", 1.1),), {"scores": 1e-6, "rows": 0.0}, note=note)]


SHORTFALL = (
    "the matrix product of torch (MKL) alone takes as long as the search of faiss (OpenBLAS); selecting the best adds "
    "a third, or a tenth on an AMD EPYC."
)
ROW = Row("R11", f"top {K} of inner products, exact, width {WIDTH}", contests, shortfall=SHORTFALL)
