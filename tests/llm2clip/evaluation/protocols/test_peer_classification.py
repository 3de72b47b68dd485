"""CLIP_benchmark's own zero-shot classification of an open_clip model, on the same files, finds the same integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.session import Session
from tests.llm2clip.encoders.models import register_open_clip

CLASSES = ["ankle boot", "bag", "coat", "dress", "sandal", "shirt", "trouser"]
IMAGES = 60


def write_set(folder: Path) -> None:
    """Write grey images of several shapes into a folder for each class; some classes have more than others."""
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / "test" / CLASSES[int(random.integers(0, len(CLASSES)) * random.random())].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        blocks = random.integers(0, 256, (5, 4), dtype=np.uint8) * (random.random((5, 4)) < random.random())
        size = (28, 28) if number % 2 else (40, 30 + number)
        Image.fromarray(blocks.astype(np.uint8)).resize(size, Image.Resampling.NEAREST).save(place / f"{number}.png")
    for name in CLASSES:
        (folder / "test" / name.replace(" ", "_")).mkdir(exist_ok=True)


def test_classification_equals_that_of_clip_benchmark(tmp_path: Path) -> None:
    write_set(tmp_path)
    name, weights = register_open_clip(tmp_path / "model")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    benchmark = all_benchmarks()["imagefolder"]
    data = benchmark.read(tmp_path)
    loader = DataLoader(ImageFolder(tmp_path / "test", transform, allow_empty=True), batch_size=16)
    tokenizer = open_clip.get_tokenizer(name)
    classes = zero_shot_classifier(model.eval(), tokenizer, CLASSES, data.templates, "cpu", amp=False)
    logits, labels = run_classification(model, classes, loader, "cpu", amp=False)
    measured = benchmark.protocol.measure(Session(load_encoder(f"open_clip:{name}/{weights}")), data)
    # The rest of its `evaluate`, which fails on NumPy 2.4.
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    assert measured.counts["tied_images"] == 0
    assert 0 < measured.scores["top1"] < measured.scores["top5"] < 1
    assert measured.scores["top1"] * IMAGES == pytest.approx(int(hits[:, 0].sum()))
    assert measured.scores["top5"] * IMAGES == pytest.approx(int(hits.sum()))
    assert measured.scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(dim=1)))
