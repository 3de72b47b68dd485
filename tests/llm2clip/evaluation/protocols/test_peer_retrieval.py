"""CLIP_benchmark's own retrieval of an open_clip model, from its own files, finds the same integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
from clip_benchmark.metrics import zeroshot_retrieval
from PIL import Image
from torch.utils.data import DataLoader

from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.session import Session
from tests.llm2clip.encoders.models import register_open_clip

IMAGES, CAPTIONS = 40, 5
KS = [1, 5, 10]
WORDS = ("red", "blue", "small", "old", "dog", "cat", "train", "house", "tree", "runs", "sits", "stands,", "a", "two")


def write_set(folder: Path) -> None:
    """Write a set as CLIP_benchmark's txt of Flickr30k, with captions that differ: it breaks ties by position."""
    random = np.random.default_rng(0)
    lines, seen = ["image,caption"], set[str]()
    for number in range(IMAGES):
        pixels = random.integers(0, 255, (5, 4, 3), dtype=np.uint8)
        size = (40 + number, 75 - number)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        for _ in range(CAPTIONS):
            caption = next(
                text
                for text in (" ".join(random.choice(WORDS, random.integers(2, 12))) for _ in range(100))
                if text not in seen
            )
            seen.add(caption)
            lines.append(f"{number}.jpg,{caption}")
    (folder / "flickr30k_test_karpathy.txt").write_text("\n".join(lines))


def test_retrieval_equals_that_of_clip_benchmark(tmp_path: Path) -> None:
    write_set(tmp_path)
    name, weights = register_open_clip(tmp_path / "model")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    dataset = build_dataset("flickr30k", root=str(tmp_path), transform=transform, task="zeroshot_retrieval")
    loader = DataLoader(dataset, batch_size=16, collate_fn=get_dataset_collate_fn("flickr30k"))
    peer = zeroshot_retrieval.evaluate(
        model.eval(), loader, open_clip.get_tokenizer(name), "cpu", amp=False, recall_k_list=KS
    )
    benchmark = all_benchmarks()["flickr30k-clip-benchmark"]
    session = Session(load_encoder(f"open_clip:{name}/{weights}"))
    measured = benchmark.protocol.measure(session, benchmark.read(tmp_path))
    assert measured.counts["tied_text_queries"] == measured.counts["tied_image_queries"] == 0
    for k in KS:
        texts, images = measured.scores[f"text_to_image_recall@{k}"], measured.scores[f"image_to_text_recall@{k}"]
        assert 0 < texts < 1
        assert texts * IMAGES * CAPTIONS == pytest.approx(
            round(peer[f"image_retrieval_recall@{k}"] * IMAGES * CAPTIONS)
        )
        assert images * IMAGES == pytest.approx(round(peer[f"text_retrieval_recall@{k}"] * IMAGES))
