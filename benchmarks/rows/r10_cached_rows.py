"""R10: reading caption embeddings for training steps: from the cache, from sidecars, and from tars of the original."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.small_llama import captions, new_folder

IMAGES, WIDTH, BATCH = 5_000, 4096, 256
COLUMNS = ("shortsv_captions", "longsv_captions")
COMPARED = tuple(f"{image:05}" for image in range(99, IMAGES, 100))


def _data() -> tuple[list[str], Any, list[int], Callable[[list[str]], tuple[Any, int]]]:
    """Two captions per image, their embeddings, which of them is drawn, and a substitute for a text encoder."""
    import torch

    texts = captions(2 * IMAGES)
    rows = torch.randn(2 * IMAGES, WIDTH, generator=torch.Generator().manual_seed(0))
    numbers = {text: number for number, text in enumerate(texts)}
    drawn = random.Random(1).choices((0, 1), k=IMAGES)
    return texts, rows, drawn, lambda batch: (rows[[numbers[text] for text in batch]], 0)


def _size(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.iterdir()))


def _consume(batches: Iterable[tuple[list[str], Any]], size: float) -> Outcome:
    """Iterate over batches of image keys and their caption embeddings (images, width)."""
    values, count = {}, 0
    for keys, embeddings in batches:
        count += len(keys)
        for key in set(keys).intersection(COMPARED):
            values[key] = embeddings[keys.index(key)].clone()
    return Outcome({**values, "images": count}, {"bytes": size})


def _manifest() -> Any:
    from llm2clip.store import caption_manifest

    prompt: dict[str, Any] = {"pooling": "mean", "prompt_prefix": "", "prompt_suffix": "", "max_length": 512}
    return caption_manifest("benchmark", "benchmark", width=WIDTH, **prompt)


def _cache() -> Work:
    """Prepare batches of the drawn caption of every image from the cache, in random order."""
    from llm2clip.store import EmbeddingCache, build_embedding_cache

    (texts, _, drawn, embed), folder = _data(), new_folder()
    build_embedding_cache(folder, texts, embed, _manifest(), show_progress_bar=False)
    cache = EmbeddingCache.open(folder, verify=False)

    def batches() -> Iterator[tuple[list[str], Any]]:
        order = random.Random(0).sample(range(IMAGES), IMAGES)
        for start in range(0, IMAGES, BATCH):
            images = order[start : start + BATCH]
            # As the collator calls it.
            embeddings = cache.lookup([texts[2 * image + drawn[image]] for image in images], dtype=None)
            yield [f"{image:05}" for image in images], embeddings

    return lambda: _consume(batches(), _size(folder))


def _tar_and_sidecar() -> Work:
    """Prepare the same from a tar of captions and its sidecar, through a shuffle buffer of 1,000 rows."""
    import torch

    from llm2clip.data import CaptionSource, Stage2Collator, StreamingCaptionImageDataset
    from llm2clip.data.shards import ShardedSource
    from llm2clip.data.sidecars import SourceSidecars
    from llm2clip.encoders.embed_shards import embed_shard, embed_shards, list_jobs

    (texts, _, drawn, embed), folder = _data(), new_folder()
    with tarfile.open(folder / "captions.tar", "w") as tar:
        for image in range(IMAGES):
            # Training draws from the column with a weight; the sidecar has the embeddings of both.
            pair = {"drawn": texts[2 * image + drawn[image]], "other": texts[2 * image + 1 - drawn[image]]}
            content = json.dumps(pair).encode()
            member = tarfile.TarInfo(f"{image:05}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    columns = {"caption_columns": ["json.drawn", "json.other"], "caption_weights": [1.0, 0.0]}
    source = CaptionSource(str(folder / "captions.tar"), streaming=True, **columns)
    embed_one = partial(embed_shard, embed=embed, encoder=_manifest())
    embed_shards(list_jobs([source], str(folder)), embed_one, show_progress_bar=False)
    beside = SourceSidecars(folder, ShardedSource(source).shards)
    stream = StreamingCaptionImageDataset(source, False, embeddings=beside, row_counts=[IMAGES])
    stream.batch_size, collator, no_pixels = BATCH, Stage2Collator(), torch.zeros(1)

    def batches() -> Iterator[tuple[list[str], Any]]:
        rows: Iterator[Any] = ({**row, "pixel_values": no_pixels} for row in stream)
        while samples := list(itertools.islice(rows, BATCH)):
            batch = collator(samples)
            yield batch["keys"], batch["llm_embeds"]

    return lambda: _consume(batches(), _size(folder))


def _webdataset() -> Work:
    import torch
    import webdataset

    (_, rows, drawn, _), folder = _data(), new_folder()
    with tarfile.open(folder / "embeddings.tar", "w") as tar:
        for number, row in enumerate(rows.numpy()):
            member = tarfile.TarInfo(f"{number // 2:05}.{COLUMNS[number % 2]}")
            member.size = row.nbytes
            tar.addfile(member, io.BytesIO(row.tobytes()))

    def decode(sample: dict[str, Any]) -> tuple[str, Any]:
        key = sample["__key__"]
        content = bytearray(sample[COLUMNS[drawn[int(key)]]])
        return key, torch.frombuffer(content, dtype=torch.float32)

    def collate(samples: list[tuple[str, Any]]) -> tuple[list[str], Any]:
        keys, embeddings = zip(*samples, strict=True)
        return list(keys), torch.stack(embeddings)

    def work() -> Outcome:
        stream = webdataset.WebDataset(str(folder / "embeddings.tar"), shardshuffle=False)
        batches = stream.shuffle(1000).map(decode).batched(BATCH, collation_fn=collate)
        return _consume(batches, _size(folder))

    return work


def contests(device: str) -> list[Contest]:
    peer = "webdataset, float32 tar"
    contestants = {"ours": Contestant(_cache), peer: Contestant(_webdataset)}
    return [
        Contest(
            f"{IMAGES:,} images with 2 captions each, one drawn, width {WIDTH}, batches of {BATCH}",
            contestants,
            (Goal(peer, "cpu", 0.1), Goal(peer, "wall", 0.1), Goal(peer, "bytes", 0.5)),
            {**dict.fromkeys(COMPARED, 5e-4), "images": 0},
            rounds=7,
            note="Ours are found by the captions' texts, in random order; the tar is read from its start to its end "
            "with both captions of each image, through a shuffle buffer of 1,000, as the original trains.",
        ),
        Contest(
            f"the same from a tar of captions and its sidecar, batches of {BATCH}",
            {**contestants, "ours": Contestant(_tar_and_sidecar)},
            (Goal(peer, "cpu", 1.0), Goal(peer, "wall", 1.0), Goal(peer, "bytes", 0.55)),
            {**dict.fromkeys(COMPARED, 5e-4), "images": 0},
            rounds=7,
            note="Both go through a shuffle buffer of 1,000; ours reads and draws the captions too.",
        ),
    ]


ROW = Row("R10", "cached caption embeddings into batches", contests)
