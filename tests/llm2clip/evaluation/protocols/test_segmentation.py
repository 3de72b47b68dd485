"""Zero-shot segmentation against loops over pixels, on label maps in folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from llm2clip.encoders.load import load_encoder
from llm2clip.encoders.patches import patch_embeddings
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.label_maps import class_table
from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.evaluate import evaluate
from llm2clip.evaluation.prompts import template_set
from llm2clip.evaluation.protocols import segmentation
from llm2clip.evaluation.protocols.segmentation import (
    MaskCLIPSegmentation,
    maskclip_templates,
    whole_or_windows,
)
from llm2clip.evaluation.segmentation_data import IGNORED, SegmentationData
from llm2clip.models.embeddings import NonFiniteError
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.evaluation.fake_session import FakeSession

PATCH = 4
# No pixel is labelled `unseen` or `twin`; the latter is never predicted either, because `sky` comes before it.
NAMES = ["sky", "sea", "sand", "tree", "unseen", "twin"]
GENERATOR = torch.Generator().manual_seed(0)
TEXTS = {name: torch.randn(3, generator=GENERATOR) for name in NAMES}
TEXTS["twin"] = TEXTS["sky"]


def colours(inputs: dict[str, Tensor]) -> Tensor:
    """Embed a patch as its mean colour, less grey; zeros complete the last patches."""
    pixels = inputs["pixel_values"]
    pixels = F.pad(pixels, (0, -pixels.shape[-1] % PATCH, 0, -pixels.shape[-2] % PATCH))
    return F.avg_pool2d(pixels, PATCH).permute(0, 2, 3, 1) - 100.0


def folder_of(folder: Path, sizes: list[tuple[int, int]], names: list[str] = NAMES) -> SegmentationData:
    """Write noise and random labels, among them ignored ones, in images of some heights and widths."""
    random = np.random.default_rng(0)
    images, labels = [], []
    for number, (height, width) in enumerate(sizes):
        images.append(folder / f"{number}.png")
        labels.append(folder / f"{number}-labels.png")
        coarse = random.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(images[-1])
        values = random.choice([0, 1, 2, 3, IGNORED], (height, width)).astype(np.uint8)
        Image.fromarray(values).save(labels[-1])
    table = class_table(range(len(names)))
    return SegmentationData("Noise", BenchmarkImages(images), labels, {name: (name,) for name in names}, table)


def one_image(folder: Path, pixels: Any, labels: Any, classes: dict[str, tuple[str, ...]]) -> SegmentationData:
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "image.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "labels.png")
    images = BenchmarkImages([folder / "image.png"])
    return SegmentationData("One", images, [folder / "labels.png"], classes, class_table(range(len(classes))))


def by_loops(data: SegmentationData, maps: list[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """The scores, and the IoU of each class, by counting pixel for pixel."""
    names = list(data.classes)
    both, either, labelled = (dict.fromkeys(names, 0) for _ in range(3))
    for row, predicted in enumerate(maps):
        labels = np.array(Image.open(data.label_maps[row]))
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                if labels[y, x] == IGNORED:
                    continue
                right, found = names[labels[y, x]], names[int(predicted[y, x])]
                labelled[right] += 1
                both[right] += right == found
                for name in {right, found}:
                    either[name] += 1
    iou = {name: both[name] / either[name] for name in names if either[name]}
    accuracy = {name: both[name] / labelled[name] for name in names if labelled[name]}
    return {
        "miou": sum(iou.values()) / len(iou),
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "pixel_accuracy": sum(both.values()) / sum(labelled.values()),
    }, iou


def by_interpolation(image: Path, scale: tuple[int, int], windows: tuple[int, int] | None) -> Tensor:
    """Resize the scores of all classes to the image, then to the label map, and take the highest.

    Those of windows, of a side and a stride, are averaged where they overlap.
    """
    picture = Image.open(image)
    factor = min(scale[0] / max(picture.size), scale[1] / min(picture.size))
    size = [int(side * factor + 0.5) for side in (picture.height, picture.width)]
    pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size, mode="bilinear").round()
    total, count = torch.zeros(1, len(TEXTS), *size), torch.zeros(size)
    for top, left, height, width in whole_or_windows(*size, *(windows or (None, None))):
        part = resized[..., top : top + height, left : left + width]
        patches = F.normalize(colours({"pixel_values": part}), dim=-1)
        scores = torch.einsum("irce,ke->ikrc", patches, F.normalize(torch.stack([*TEXTS.values()]), dim=1))
        scores = F.interpolate(scores, part.shape[2:], mode="bilinear")
        total[..., top : top + height, left : left + width] += scores
        count[top : top + height, left : left + width] += 1
    return F.interpolate(total / count, pixels.shape[2:], mode="bilinear")[0].argmax(dim=0)


def protocol(**fields: Any) -> MaskCLIPSegmentation:
    return MaskCLIPSegmentation(**{"scale": (64, 24), "templates": ("{c}",), **fields})


@pytest.mark.parametrize("windows", [None, (16, 6)])
@pytest.mark.parametrize("chunk", [1, 2**24], ids=["class by class", "all classes at once"])
def test_mean_iou_is_that_of_loops_over_pixels(
    chunk: int, windows: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "CHUNK", chunk)
    data = folder_of(tmp_path, [(21, 30), (50, 61), (40, 17), (24, 24)])
    options = {"crop": windows[0], "stride": windows[1]} if windows else {}
    found = protocol(**options).measure(FakeSession([], TEXTS, patches=colours), data)
    scores, iou = by_loops(data, [by_interpolation(image, (64, 24), windows) for image in data.images.images])
    assert found.scores == pytest.approx(scores, abs=1e-12)
    assert {name: row["iou"] for name, row in found.groups["class"].items()} == pytest.approx(iou, abs=1e-12)
    assert next(iter(found.scores)) == "miou"
    assert iou["unseen"] == found.groups["class"]["unseen"]["pixels"] == 0
    labelled = sum(int((data.labels(row) != IGNORED).sum()) for row in range(4))
    counts = {"images": 4, "classes": 6, "classes_in_mean": 5, "pixels": labelled, "texts": 6, "truncated_texts": 0}
    assert found.counts == counts


def test_windows_overlap_and_end_at_the_edges() -> None:
    assert whole_or_windows(448, 700, 448, 224) == [(0, 0, 448, 448), (0, 224, 448, 448), (0, 252, 448, 448)]
    assert whole_or_windows(700, 448, 448, 224) == [(0, 0, 448, 448), (224, 0, 448, 448), (252, 0, 448, 448)]
    assert whole_or_windows(448, 448, 448, 224) == [(0, 0, 448, 448)]
    assert whole_or_windows(400, 672, 448, 224) == [(0, 0, 400, 448), (0, 224, 400, 448)]
    assert whole_or_windows(448, 700, None, None) == [(0, 0, 448, 700)]


@pytest.mark.parametrize("chunk", [1, 2**24], ids=["class by class", "all classes at once"])
def test_of_several_names_the_closest_counts_and_the_first_of_equal_classes_wins(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch is red; the background, named blue and red, and the last class are as close."""
    monkeypatch.setattr(segmentation, "CHUNK", chunk)
    texts = {"blue": [0, 0, 1], "red": [1, 0, 0], "green": [0, 1, 0], "rose": [1, 0, 0]}
    classes = {"grass": ("green",), "background": ("blue", "red"), "rose": ("rose",)}
    data = one_image(tmp_path, np.full((8, 8, 3), (255, 100, 100)), np.full((8, 8), 1), classes)
    found = protocol().measure(FakeSession([], texts, patches=colours), data)
    assert found.scores == {"miou": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}
    assert found.groups == {"class": {"background": {"iou": 1.0, "pixels": 64}}}
    assert found.counts["texts"] == 4


def test_names_of_a_class_are_compared_after_their_scores_are_resized(tmp_path: Path) -> None:
    """A red and a green patch: between them neither name of the background is as close as yellow, 0.71 to both.

    The maximum of the two names at the patches, 1 and 1, would win everywhere.
    """
    texts = {"red": [1, 0, 0], "green": [0, 1, 0], "yellow": [1, 1, 0]}
    pixels = np.full((4, 8, 3), 100)
    pixels[:, :4, 0] = pixels[:, 4:, 1] = 255
    # From red to green: 1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0.
    labels = np.array([[0, 0, 0, 1, 1, 0, 0, 0]] * 4)
    data = one_image(tmp_path, pixels, labels, {"background": ("red", "green"), "yellow": ("yellow",)})
    found = protocol(scale=(8, 4)).measure(FakeSession([], texts, patches=colours), data)
    assert found.scores == {"miou": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}


def test_prompts_are_the_85_of_maskclip(tmp_path: Path) -> None:
    templates = maskclip_templates()
    assert len(set(templates)) == 85
    assert set(templates) >= {*template_set("openai-80"), "this is one {c} in the scene.", "a origami {c}."}
    texts = {template.replace("{c}", name): TEXTS[name] for name in NAMES for template in templates}
    session = FakeSession([], texts, patches=colours)
    data = folder_of(tmp_path, [(24, 24)])
    found = MaskCLIPSegmentation(scale=(64, 24)).measure(session, data)
    assert found.protocol["templates"] == "maskclip-85"
    assert found.counts["texts"] == 510
    # A class's prompts all have the embedding of its name here.
    assert found.scores == protocol().measure(FakeSession([], TEXTS, patches=colours), data).scores
    assert session.embedded == [[template.replace("{c}", name) for name in NAMES for template in templates]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_model_is_evaluated(num_workers: int, tmp_path: Path) -> None:
    """A tiny CLIP on images of whole patches, so that there is nothing to resize but its scores."""
    save_transformers("clip", tmp_path / "model")
    encoder = load_encoder(str(tmp_path / "model"))
    benchmark = replace(
        all_benchmarks()["ade20k"],
        folder="",
        needs=(),
        read=lambda _: folder_of(tmp_path, [(28, 42), (28, 28)]),
        options={"scale": (2048, 28), "templates": ("a {c}.", "the {c}")},
    )
    (result,) = evaluate(encoder, benchmark, data=str(tmp_path), allow_counts=True, num_workers=num_workers)
    data, maps = folder_of(tmp_path, [(28, 42), (28, 28)]), []
    texts = torch.stack([encoder.encode_text([f"a {name}.", f"the {name}"]).mean(dim=0) for name in NAMES])
    for image in data.images.images:
        pixels = encoder.prepare_pixels(Image.open(image))["pixel_values"][None]
        patches = patch_embeddings(encoder.model, pixels, values_only=True)
        scores = (patches @ F.normalize(texts, dim=1).T).permute(0, 3, 1, 2)
        maps.append(F.interpolate(scores, pixels.shape[2:], mode="bilinear")[0].argmax(dim=0))
    assert result.scores == pytest.approx(by_loops(data, maps)[0], abs=1e-12)
    assert set(result.intervals) == set(result.scores)
    assert {"texts", "images"} <= set(result.seconds)
    assert result.differences == ["2 images instead of 2,000", "6 classes instead of 150"]
    assert result.counts["truncated_texts"] == 0


def test_counts_are_not_found_again_by_other_images_labels_texts_or_options(tmp_path: Path) -> None:
    data = folder_of(tmp_path, [(21, 30), (40, 17)])

    def segmented_by(changed: MaskCLIPSegmentation) -> int:
        patches = Mock(side_effect=colours)
        changed.measure(FakeSession([], TEXTS, tmp_path / "store", patches=patches), data)
        return patches.call_count

    assert segmented_by(protocol()) == 2
    assert segmented_by(protocol(scale=(60, 24))) == 2
    assert segmented_by(protocol(crop=64, stride=6)) == 2
    assert segmented_by(protocol(templates=("{c}", "{c}"))) == 2
    assert segmented_by(protocol()) == 0
    labels = np.array(Image.open(data.label_maps[1]))
    Image.fromarray(np.flipud(labels)).save(data.label_maps[1])
    assert segmented_by(protocol()) == 1
    image = Image.open(data.images.images[0])
    image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(data.images.images[0])
    assert segmented_by(protocol()) == 1
    data.class_of = class_table([1, 0, 2, 3])
    assert segmented_by(protocol()) == 2


def test_what_cannot_be_counted_is_an_error_that_names_it(tmp_path: Path) -> None:
    data, session = folder_of(tmp_path, [(24, 24), (12, 24)]), FakeSession([], TEXTS, patches=colours)

    def broken(inputs: dict[str, Tensor]) -> Tensor:
        patches = colours(inputs)
        return patches.where(torch.tensor(patches.shape[1] == patches.shape[2]), torch.nan)

    with pytest.raises(NonFiniteError, match=r"1 of 1 images are NaN or infinite: .*1\.png"):
        protocol().measure(FakeSession([], TEXTS, patches=broken), data)
    for path in data.label_maps:
        Image.new("L", Image.open(path).size, IGNORED).save(path)
    with pytest.raises(BenchmarkError, match="no pixel of Noise has a class"):
        protocol().measure(session, data)
    Image.new("L", (24, 23)).save(data.label_maps[0])
    with pytest.raises(BenchmarkError, match=r"0-labels\.png has 24 x 23 pixels, but its image .*0\.png 24 x 24"):
        protocol().measure(session, data)
