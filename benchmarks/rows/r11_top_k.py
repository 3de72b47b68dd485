"""R11: exact search by inner product."""

from __future__ import annotations

from functools import partial

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


def _faiss(threads: int) -> Work:
    import faiss

    faiss.omp_set_num_threads(threads)
    queries, candidates = (vectors.numpy() for vectors in _vectors())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(candidates)

    def work() -> Outcome:
        scores, rows = index.search(queries, K)
        return Outcome({"scores": scores, "rows": rows})

    return work


def _product() -> Work:
    """Compute every score once, in tiles that are discarded."""
    import torch

    queries, candidates = _vectors()
    tile = torch.empty(256, 1024)

    def work() -> Outcome:
        for some in queries.split(256):
            for others in candidates.split(1024):
                torch.mm(some, others.T, out=tile[: len(some), : len(others)])
        return Outcome()

    return work


def contests(device: str) -> list[Contest]:
    threads = 1
    contestants = {
        "ours": Contestant(_ours),
        "faiss IndexFlatIP": Contestant(partial(_faiss, threads)),
        "matrix product": Contestant(_product, is_limit=True),
    }
    note = "The limit is the matrix product in torch; faiss brings another BLAS. Building faiss' index is not counted."
    title = f"{QUERIES:,} queries, {CANDIDATES:,} candidates"
    goals = (Goal("faiss IndexFlatIP", "cpu", 1.1),)
    return [Contest(title, contestants, goals, {"scores": 1e-6, "rows": 0.0}, threads=threads, note=note)]


SHORTFALL = (
    "the matrix product of torch (MKL) alone takes as long as the whole search of faiss (OpenBLAS): 0.97 of it "
    "here, 1.06 on an AMD EPYC; selecting the best adds a third (a tenth there). Tried: tiles of 256 to 1,000 "
    "queries x 256 to 32,768 candidates, products in columns of 512 to 2,048, both orders of the product and of "
    "the selection, groups of 8 to 64 candidates, a transposed copy, numpy's product. The product of oneDNN is "
    "10% faster on the EPYC, but torch offers it for float32 only through a private function."
)
ROW = Row("R11", f"top {K} of inner products, exact, width {WIDTH}", contests, shortfall=SHORTFALL)
