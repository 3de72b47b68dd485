"""R17: a whole zero-shot evaluation of 10,000 small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

IMAGES, CLASSES, BATCH, WORKERS = 10_000, 10, 64, 1
NAME = "bench-clip"
# Size of random weights: small ones give nearly the same embedding to all images.
SPREAD = 2
# Images of CLIP's size, and towers so small that reading images costs as much of the time as beside an accelerator.
ARCHITECTURE = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def _pictures(count: int) -> tuple[Any, Any]:
    """Blocks on black, few or many, `(count, 28, 28)` uint8, and a label of each."""
    import numpy as np

    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (count, 7, 7), dtype=np.uint8)
    blocks *= generator.random((count, 7, 7)) < generator.random((count, 1, 1))
    return blocks.repeat(4, axis=1).repeat(4, axis=2), generator.integers(0, CLASSES, count)


def _inputs(count: int) -> tuple[Path, str]:
    """Write PNGs into a folder for each class, and random weights; register the architecture with open_clip.

    Returns:
        The folder of the images and the file of the weights.
    """
    import json

    import open_clip
    import torch
    from PIL import Image

    from benchmarks.small_llama import new_folder

    folder = new_folder()
    for number, (pixels, label) in enumerate(zip(*_pictures(count), strict=True)):
        folder_of_class = folder / "images" / "test" / str(label)
        folder_of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder_of_class / f"{number:05}.png")
    (folder / "images" / "classnames.txt").write_text("".join(f"thing {label}\n" for label in range(CLASSES)))
    (folder / f"{NAME}.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=SPREAD * weight.shape[-1] ** -0.5)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "images", str(folder / "weights.pt")


def _ours(count: int = IMAGES) -> Work:
    from llm2clip.encoders.load import load_encoder
    from llm2clip.evaluation.benchmarks.image_folder import read_image_folder
    from llm2clip.evaluation.protocols.classification import ZeroShotClassification
    from llm2clip.evaluation.session import Session

    folder, weights = _inputs(count)
    encoder = load_encoder(f"open_clip:{NAME}/{weights}", device="cpu")

    def work() -> Outcome:
        session = Session(encoder, batch_size=BATCH, num_workers=WORKERS)
        scores = ZeroShotClassification().measure(session, read_image_folder(folder)).scores
        return Outcome({name: scores[name] * count for name in ("top1", "top5")})

    return work


def _clip_benchmark(count: int = IMAGES) -> Work:
    """CLIP_benchmark's functions; its `evaluate` only adds the counting of hits, which fails on NumPy 2.4."""
    import open_clip
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from llm2clip.evaluation.benchmarks.image_folder import read_image_folder

    folder, weights = _inputs(count)
    model, _, transform = open_clip.create_model_and_transforms(NAME, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(NAME)
    data = read_image_folder(folder)
    model.eval()

    def work() -> Outcome:
        loader = DataLoader(ImageFolder(folder / "test", transform), BATCH, num_workers=WORKERS)
        classes = zero_shot_classifier(model, tokenizer, data.classnames, data.templates, "cpu", amp=False)
        logits, labels = run_classification(model, classes, loader, "cpu", amp=False)
        hits = logits.topk(5, dim=1).indices == labels[:, None]
        return Outcome({"top1": hits[:, 0].sum().double(), "top5": hits.sum().double()})

    return work


def contests(device: str) -> list[Contest]:
    note = (
        "Blocks on black, as grey PNGs of 28 pixels; OpenAI's 80 templates; the same open_clip model, so small that "
        "images are most of the work, as beside an accelerator; one process that reads images. The hits are equal in "
        "number, except that an image whose right class ties with another within 1e-6 counts half: one or two do."
    )
    goals = (Goal("CLIP_benchmark", "wall", 0.8), Goal("CLIP_benchmark", "cpu", 0.8))
    contestants = {"ours": Contestant(_ours), "CLIP_benchmark": Contestant(_clip_benchmark)}
    tolerance = {"top1": 2e-3, "top5": 1e-3}
    return [Contest(f"{IMAGES:,} images, {CLASSES} classes", contestants, goals, tolerance, rounds=3, note=note)]


ROW = Row("R17", "zero-shot classification, from files to accuracy", contests)
