"""The curves, and the work of one point of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.row import Outcome, Work
from benchmarks.rows import r04_info_nce

WIDTH = 512
# Numbers of encoded captions, of queries, and of queries whose results are compared with an exact search.
CAPTIONS, QUERIES, TRUTH = 128, 1000, 200
# Numbers of words in short and in long captions.
SHORT, LONG = (4, 12), (60, 90)
ENCODERS = ("ours", "sentence-transformers", "batches of 64 in order")


@dataclass(frozen=True)
class Line:
    """One contestant of a curve.

    Attributes:
        set_up: Prepares the work of a point.
        up_to: Largest x to measure; a larger one takes too much memory or time.
    """

    set_up: Callable[[int], Work]
    up_to: float = float("inf")


@dataclass(frozen=True)
class Curve:
    """One plot.

    Attributes:
        xs: Values of x to measure.
        quick: Values of x in a trial run.
        lines: Contestants by name.
    """

    xs: tuple[int, ...]
    quick: tuple[int, ...]
    lines: dict[str, Line]


def loss_work(make_loss: Callable[[], Callable], batch: int) -> Work:
    """Prepare loss and gradients, as in R4."""
    return r04_info_nce._against(make_loss, batch, "cpu")


def mixed_captions(percent_long: int) -> list[str]:
    """Generate captions in random order, some of them long descriptions."""
    import random

    from benchmarks.stage2_inputs import WORDS

    choose = random.Random(0)
    lengths = [LONG if number * 100 < percent_long * CAPTIONS else SHORT for number in range(CAPTIONS)]
    choose.shuffle(lengths)
    words = [choose.choices(WORDS, k=choose.randint(*each)) for each in lengths]
    return [f"{number} {' '.join(each)}" for number, each in enumerate(words)]


def encode_work(contestant: str, percent_long: int) -> Work:
    """Prepare the embedding of captions with a Llama of 27M parameters."""
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
        # Without packing, as sentence-transformers runs other decoders; our code packs short captions for it too.
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
    """Prepare building and searching an index; None searches with `top_k`, without an index."""
    import numpy as np
    import torch

    from benchmarks.search_inputs import Mixture, build_index, exact_best, read_vectors, recall, write_vectors
    from benchmarks.stage2_inputs import temporary_folder
    from llm2clip.search.top_k import top_k

    folder, mixture = temporary_folder(), Mixture(count)
    write_vectors(folder / "vectors", mixture)
    queries = mixture.queries(QUERIES)

    def exact() -> Outcome:
        vectors = torch.from_numpy(np.concatenate(list(read_vectors(folder / "vectors")))).float()
        start = time.perf_counter()
        top_k(torch.from_numpy(queries), vectors, 10)
        return Outcome(metrics={"search": (time.perf_counter() - start) / QUERIES, "build": 0.0, "found": 1.0})

    def work() -> Outcome:
        start = time.perf_counter()
        index = build_index(folder / "index", folder / "vectors", mixture, index_type=index_type)
        built = time.perf_counter()
        found = index.search(queries[:TRUTH], 10)
        searched = time.perf_counter()
        numbers = np.array([[int(row["key"]) for _, row in results] for results in found])
        share = recall(numbers, exact_best(folder / "vectors", queries[:TRUTH]))
        return Outcome(metrics={"search": (searched - built) / TRUTH, "build": built - start, "found": share})

    return exact if index_type is None else work


CURVES = {
    "loss": Curve(
        tuple(1024 * 2**power for power in range(7)),
        (1024, 2048, 4096),
        {
            "ours": Line(partial(loss_work, r04_info_nce._ours)),
            # The next batch size needs more than 12 GiB.
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
            # A search of more takes a second.
            "flat": Line(partial(search_work, "flat"), 300_000),
            "ivf_rq": Line(partial(search_work, "ivf_rq")),
            "faiss": Line(partial(search_work, "faiss")),
        },
    ),
}
