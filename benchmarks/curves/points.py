"""The curves, and how one point of each is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.row import Outcome, Work
from benchmarks.rows import r04_info_nce

WIDTH = 512
# Captions that are encoded, and queries that are searched for.
CAPTIONS, QUERIES, TRUTH = 128, 1000, 200
# Words of a short caption and of a long one.
SHORT, LONG = (4, 12), (60, 90)
ENCODERS = ("ours", "sentence-transformers", "batches of 64 in order")


@dataclass(frozen=True)
class Line:
    """One contestant of a curve.

    Attributes:
        set_up: Makes the work of a point ready.
        up_to: The largest x that is measured: beyond it, memory or time runs out.
    """

    set_up: Callable[[int], Work]
    up_to: float = float("inf")


@dataclass(frozen=True)
class Curve:
    """One picture.

    Attributes:
        xs: Where it is measured.
        quick: Where it is measured in a trial run.
        lines: By name.
    """

    xs: tuple[int, ...]
    quick: tuple[int, ...]
    lines: dict[str, Line]


def loss_work(make_loss: Callable[[], Callable], batch: int) -> Work:
    """Loss and gradients, as in R4."""
    return r04_info_nce._against(make_loss, batch, "cpu")


def mixed_captions(percent_long: int) -> list[str]:
    """Captions of which some are long descriptions, in random order."""
    import random

    from benchmarks.stage2_inputs import WORDS

    choose = random.Random(0)
    lengths = [LONG if number * 100 < percent_long * CAPTIONS else SHORT for number in range(CAPTIONS)]
    choose.shuffle(lengths)
    words = [choose.choices(WORDS, k=choose.randint(*each)) for each in lengths]
    return [f"{number} {' '.join(each)}" for number, each in enumerate(words)]


def encode_work(contestant: str, percent_long: int) -> Work:
    """Embeddings of captions by a Llama of 27M parameters."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks import stage2_inputs
    from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
    from modeling_llm2clip import LLM2CLIPTextModel

    folder = stage2_inputs.write_text_tower(stage2_inputs.temporary_folder(), hidden=512, layers=8)
    captions = mixed_captions(percent_long)
    if contestant == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        write_sentence_transformers_files(folder)
        peer = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        # As it runs an ordinary decoder: ours packs short captions into shared rows for it too.
        peer[0].auto_model._packing = lambda *arguments: None
        return lambda: Outcome({"embeddings": peer.encode(captions, convert_to_tensor=True)})
    model, tokenizer = LLM2CLIPTextModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if contestant == "ours":
        return lambda: Outcome({"embeddings": model.encode(captions, tokenizer)})
    model._packing = lambda *arguments: None

    @torch.no_grad()
    def padded() -> Outcome:
        rows = []
        for start in range(0, CAPTIONS, 64):
            batch = tokenizer(captions[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            rows.append(model(**batch).pooler_output)
        return Outcome({"embeddings": torch.cat(rows)})

    return padded


def search_work(index_type: str | None, count: int) -> Work:
    """Building an index and searching in it; None: `top_k`, without one."""
    import torch

    from llm2clip.search.top_k import top_k
    from llm2clip.search.vector_index import VectorIndexSettings, build_vector_index, require_faiss

    require_faiss().omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, WIDTH, generator=generator)
    vectors = torch.empty(count, WIDTH)
    for chunk in vectors.split(10_000):
        chosen = centres[torch.randint(len(centres), (len(chunk),), generator=generator)]
        chunk.copy_(torch.nn.functional.normalize(chosen + 1.5 * torch.randn(chunk.shape, generator=generator)))
    queries = vectors[torch.randint(count, (QUERIES,), generator=generator)]
    queries = torch.nn.functional.normalize(queries + 0.03 * torch.randn(queries.shape, generator=generator))

    def work() -> Outcome:
        if index_type is None:
            start = time.perf_counter()
            rows = top_k(queries, vectors, 10)[1]
            return Outcome(metrics={"search": (time.perf_counter() - start) / QUERIES, "build": 0.0, "found": 1.0})
        start = time.perf_counter()
        index = build_vector_index(VectorIndexSettings(index_type=index_type), vectors.numpy())
        built = time.perf_counter()
        rows = torch.from_numpy(index.search(queries.numpy(), 10)[1])
        searched = time.perf_counter()
        exact = top_k(queries[:TRUTH], vectors, 10)[1]
        found = (rows[:TRUTH, :, None] == exact[:, None, :]).any(dim=1).float().mean().item()
        return Outcome(metrics={"search": (searched - built) / QUERIES, "build": built - start, "found": found})

    return work


CURVES = {
    "loss": Curve(
        tuple(1024 * 2**power for power in range(7)),
        (1024, 2048, 4096),
        {
            "ours": Line(partial(loss_work, r04_info_nce._ours)),
            # The next batch would need more than 12 GiB.
            "open_clip": Line(partial(loss_work, r04_info_nce._open_clip), 16384),
            "transformers": Line(partial(loss_work, r04_info_nce._transformers), 16384),
        },
    ),
    "encode": Curve(
        (0, 5, 20, 50, 100),
        (0, 20),
        {name: Line(partial(encode_work, name)) for name in ENCODERS},
    ),
    "search": Curve(
        (10_000, 30_000, 100_000, 300_000, 1_000_000),
        (10_000, 30_000),
        {
            "top_k": Line(partial(search_work, None)),
            "flat": Line(partial(search_work, "flat")),
            "ivf": Line(partial(search_work, "ivf")),
            # Building it takes minutes from here on.
            "hnsw": Line(partial(search_work, "hnsw"), 100_000),
        },
    ),
}
