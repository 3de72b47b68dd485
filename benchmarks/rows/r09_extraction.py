"""R9: from shards of captioned images to caption embeddings on disk, in the form that stage 2 reads."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.small_llama import PROMPT, captions, new_folder, write_llm

SHARDS, IMAGES = 3, 40
COLUMNS = ("shortSV_captions", "longSV_captions")


def _rows() -> list[dict[str, str]]:
    """Generate two captions per image: a short one that many images share, and a unique long one."""
    number = SHARDS * IMAGES
    pool = sorted(captions(4 * number), key=len)
    rng = random.Random(0)
    short, long = pool[: number // 2], rng.sample(pool[-2 * number :], number)
    return [{COLUMNS[0]: rng.choice(short), COLUMNS[1]: text} for text in long]


def _write_shards() -> Path:
    folder, rows = new_folder(), iter(_rows())
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for image, row in enumerate(itertools.islice(rows, IMAGES)):
                # The images are not decoded.
                for name, content in (("jpg", bytes(20_000)), ("json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(f"{shard:05}{image:04}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _outcome(folder: Path, read: Callable[[list[str]], Any]) -> Outcome:
    """Return the bytes on disk and the embeddings of all captions."""
    shown = [row[column] for row in _rows() for column in COLUMNS]
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Outcome({"embeddings": read(shown)}, {"bytes": float(size)})


def _ours() -> Work:
    from llm2clip.data import CaptionSource, distinct_captions
    from llm2clip.encoders import OurEncoder
    from llm2clip.encoders.embed import EmbedConfig, embed_into_cache
    from llm2clip.store import EmbeddingCache
    from llm2clip.utils.processes import process_state
    from llm2clip.utils.towers import open_text_tower

    shards = _write_shards()
    model, tokenizer = open_text_tower(str(write_llm(new_folder())), dtype="float32", **PROMPT)
    encoder = OurEncoder(model.eval(), tokenizer)
    # Streaming, because `datasets` would cache a prepared copy for the next turn.
    source = CaptionSource(
        str(shards / "*.tar"), caption_columns=[f"json.{column}" for column in COLUMNS], streaming=True
    )

    def work() -> Outcome:
        folder = new_folder()
        texts = distinct_captions(source, show_progress=False)
        embed_into_cache(texts, encoder, str(folder), "benchmark", EmbedConfig(), process_state())
        return _outcome(folder, EmbeddingCache.open(folder).lookup)

    return work


def _llm2vec() -> Work:
    """One call of the encoder per tar file, and a tar file of float32 bytes, as in the original code."""
    import numpy as np
    import torch
    import webdataset
    from llm2vec import LLM2Vec

    shards = _write_shards()
    model = LLM2Vec.from_pretrained(
        str(write_llm(new_folder())), torch_dtype=torch.float32, max_length=512, doc_max_length=512
    )

    def written(folder: Path) -> Iterable[dict[str, Any]]:
        return webdataset.WebDataset(sorted(map(str, folder.iterdir())), shardshuffle=False)

    def work() -> Outcome:
        folder = new_folder()
        for shard in sorted(shards.iterdir()):
            samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
            texts = [json.loads(sample["json"])[column] for sample in samples for column in COLUMNS]
            embeddings = model.encode(texts, show_progress_bar=False).numpy().reshape(len(samples), 2, -1)
            with webdataset.TarWriter(str(folder / f"{shard.stem}_text_embeddings.tar")) as tar:
                for sample, pair in zip(samples, embeddings, strict=True):
                    columns = {column: row.tobytes() for column, row in zip(COLUMNS, pair, strict=True)}
                    tar.write({"__key__": sample["__key__"], **columns})

        def read(texts: list[str]) -> Any:
            rows = [sample[column.lower()] for sample in written(folder) for column in COLUMNS]
            return np.stack([np.frombuffer(row, dtype=np.float32) for row in rows])

        return _outcome(folder, read)

    return work


def contests(device: str) -> list[Contest]:
    peer = "llm2vec, float32 tars"
    return [
        Contest(
            f"{SHARDS} shards of {IMAGES} images with 2 captions, 23M parameters",
            {"ours": Contestant(_ours), peer: Contestant(_llm2vec, environment="llm2vec")},
            (Goal(peer, "cpu", 0.5), Goal(peer, "bytes", 0.45)),
            {"embeddings": 1e-3},
            rounds=3,
            note="The short captions are shared by several images. The limit is R2's for the distinct captions.",
        )
    ]


ROW = Row("R9", "caption extraction from shards to disk", contests)
