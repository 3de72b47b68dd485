"""Zero-shot segmentation: a pixel belongs to the class whose prompts its patch is closest to, after MaskCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.label_maps import IGNORED, SegmentationData, scene_templates
from llm2clip.evaluation.contracts import Encoder, Measurement, Session
from llm2clip.evaluation.prompts import name_of_templates, prompts, template_set
from llm2clip.evaluation.protocols.classification import class_embeddings
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.processes import process_rank, sum_over_processes, world_size
from llm2clip.utils.progress import track
from modeling_llm2clip.image_decoding_llm2clip import decode_image

# Scores of classes at pixels that are in memory at once: 64 MiB, and as much again while they are resized.
CHUNK = 2**24
TEMPLATES = "maskclip-85"
# Top, left, height and width of a part of an image.
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class MaskCLIPSegmentation:
    """Segmentation by the cosines between patches and the texts of classes, after MaskCLIP (arXiv 2112.01071).

    As in its code (mmsegmentation): an image is resized bilinearly to `scale` with its ratio kept; scores are resized
    bilinearly from patches to the resized image and then to the label map; the highest wins. The mean IoU is over the
    classes that occur in labels or predictions, from one confusion matrix over all images. Unlike there, pixels are
    normalised as the model's own are.

    Args:
        scale: Upper limits of the longer and the shorter side of the resized image, in pixels.
        crop, stride: Side of square windows, and the distance between them, in pixels; scores of overlapping windows
            are averaged. None is the whole image at once.
        templates: Instead of OpenAI's 80 and MaskCLIP's five.
    """

    scale: tuple[int, int] = (2048, 512)
    crop: int | None = None
    stride: int | None = None
    templates: tuple[str, ...] | None = None

    def measure(self, session: Session, data: SegmentationData) -> Measurement:
        """Measure the mean IoU, that of each class, and the accuracy of pixels.

        Raises:
            BenchmarkError: There is no pixel with a class, or a label map is none or has another size than its image.
            NonFiniteError: Embeddings of patches are NaN or infinite; the message names the image.
            ValueError: The model has no patches that MaskCLIP could embed.
        """
        templates = list(self.templates or maskclip_templates())
        names = [name for several in data.classes.values() for name in several]
        texts = prompts(names, templates)
        embeds = class_embeddings(session.embed_texts(texts), len(names))
        _, is_cut = session.text_lengths(texts)
        owners = torch.tensor([number for number, several in enumerate(data.classes.values()) for _ in several])
        confusion = self._confusion(session, data, embeds, owners)
        if not confusion.any():
            raise BenchmarkError(f"no pixel of {data.title} has a class.")
        protocol = {
            "name": "MaskCLIP segmentation",
            "image": "whole" if self.crop is None else f"windows of {self.crop} every {self.stride}",
            "scale": list(self.scale),
            "templates": TEMPLATES if self.templates is None else name_of_templates(templates),
        }
        measurement = measured_confusion(confusion, list(data.classes))
        counts = {"images": len(data.images), **measurement.counts}
        counts |= {"texts": len(texts), "truncated_texts": int(is_cut.sum())}
        return replace(measurement, protocol=protocol, counts=counts)

    def _confusion(self, session: Session, data: SegmentationData, embeds: Tensor, owners: Tensor) -> Tensor:
        """Count pixels by class and predicted class, `(classes, classes)` int64; processes share the images."""
        encoder, classes = session.encoder, len(data.classes)
        embeds, owners = embeds.to(encoder.device), owners.to(encoder.device)
        rows = range(process_rank(), len(data.images), world_size())
        prepared = _PreparedImages(encoder, data, rows, self.scale)
        loader = DataLoader(prepared, batch_size=None, num_workers=session.num_workers)
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
        images = track(loader, f"Segmenting {data.title}", len(rows), "image")
        for row, (pixels, labels) in zip(rows, images, strict=True):
            height, width = pixels.shape[-2:]
            windows = whole_or_windows(height, width, self.crop, self.stride)
            parts = torch.stack([pixels[:, top : top + h, left : left + w] for top, left, h, w in windows])
            patches = encoder.forward_patches({"pixel_values": parts}).to(encoder.device)
            require_finite_rows(patches[None].flatten(1), [data.images.key(row)].__getitem__, "images")
            scores = class_scores(patches, embeds, owners, classes)
            predicted = predict(scores, windows, (height, width), tuple(labels.shape)).cpu()
            counted = labels != IGNORED
            pairs = labels[counted] * classes + predicted[counted]
            confusion += torch.bincount(pairs, minlength=classes * classes)
        return sum_over_processes(confusion).view(classes, classes)


def maskclip_templates() -> list[str]:
    """Return OpenAI's 80 templates and the five of MaskCLIP."""
    return [*template_set("openai-80"), *scene_templates()]


# That of SAIL (CVPR 2025), as of GroupViT and TCL before.
SLIDING = MaskCLIPSegmentation(scale=(2048, 448), crop=448, stride=224)


def sliding(benchmark: Benchmark) -> Benchmark:
    """Return the same benchmark by the protocol of SAIL: shorter side 448, windows of 448 every 224 pixels."""
    return replace(
        benchmark,
        name=f"{benchmark.name}-sliding",
        title=f"{benchmark.title}, windows",
        groups=("dense",),
        protocol=SLIDING,
        note="SAIL's protocol: shorter side 448 pixels, windows of 448 every 224",
    )


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the largest image of the same ratio within `scale`, as mmcv rounds them."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def whole_or_windows(height: int, width: int, crop: int | None, stride: int | None) -> list[Window]:
    """Return the windows of an image, as mmsegmentation places them: the last ones end at its edges.

    All have the same size, at most that of the image.
    """
    if crop is None or stride is None:
        return [(0, 0, height, width)]
    tops, lefts = (
        [
            max(min(step * stride + crop, side) - crop, 0)
            for step in range(max(side - crop + stride - 1, 0) // stride + 1)
        ]
        for side in (height, width)
    )
    return [(top, left, min(crop, height), min(crop, width)) for top in tops for left in lefts]


def class_scores(patches: Tensor, names: Tensor, owners: Tensor, classes: int) -> Tensor:
    """Compute the cosine of each patch with each class: with the closest of its names.

    Args:
        patches: Unit rows, `(windows, rows, columns, width)`.
        names: Unit rows, `(names, width)`.
        owners: `(names,)` int64, the class of each name.

    Returns:
        `(windows, classes, rows, columns)`.
    """
    cosines = (patches @ names.T).permute(0, 3, 1, 2)
    scores = cosines.new_full((len(cosines), classes, *cosines.shape[2:]), -torch.inf)
    return scores.scatter_reduce_(1, owners[None, :, None, None].expand_as(cosines), cosines, "amax")


def predict(scores: Tensor, windows: Sequence[Window], size: tuple[int, int], label_size: tuple[int, int]) -> Tensor:
    """Resize scores to pixels and choose the highest, for a few classes at a time.

    Args:
        scores: `(windows, classes, rows, columns)`, of the patches of each window.
        size: Height and width of the resized image, in which the windows lie.
        label_size: Height and width of the label map.

    Returns:
        `label_size`, int64, the first of the classes with the highest score.
    """
    best = scores.new_full(label_size, -torch.inf)
    predicted = torch.zeros(label_size, dtype=torch.int64, device=scores.device)
    chunk = max(1, CHUNK // max(size[0] * size[1], label_size[0] * label_size[1]))
    for start in range(0, scores.shape[1], chunk):
        pixels = _pixel_scores(scores[:, start : start + chunk], windows, size)
        if label_size != size:
            pixels = F.interpolate(pixels[None], label_size, mode="bilinear", align_corners=False)[0]
        highest, number = pixels.max(dim=0)
        better = highest > best
        best = torch.where(better, highest, best)
        predicted = torch.where(better, number + start, predicted)
    return predicted


def _pixel_scores(scores: Tensor, windows: Sequence[Window], size: tuple[int, int]) -> Tensor:
    """Resize the scores of windows to their pixels, and average them where windows overlap: `(classes, *size)`."""
    if len(windows) == 1:
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)[0]
    total, count = scores.new_zeros(scores.shape[1], *size), scores.new_zeros(size)
    for part, (top, left, height, width) in zip(scores, windows, strict=True):
        pixels = F.interpolate(part[None], (height, width), mode="bilinear", align_corners=False)[0]
        total[:, top : top + height, left : left + width] += pixels
        count[top : top + height, left : left + width] += 1
    return total / count


def measured_confusion(confusion: Tensor, names: Sequence[str]) -> Measurement:
    """Summarise a confusion matrix `(classes, classes)` of pixels, right class by predicted class.

    A class that occurs neither in labels nor in predictions has no IoU, and is not part of the mean; one that occurs
    in predictions alone has 0. The mean accuracy is over the classes that occur in labels.
    """
    right, labelled = confusion.diagonal().double(), confusion.sum(dim=1)
    union = labelled + confusion.sum(dim=0) - confusion.diagonal()
    iou, accuracy = right / union, right / labelled
    by_class = {
        name: {"iou": iou[number].item(), "pixels": int(labelled[number])}
        for number, name in enumerate(names)
        if union[number] > 0
    }
    return Measurement(
        protocol={},
        scores={
            "miou": iou[union > 0].mean().item(),
            "mean_accuracy": accuracy[labelled > 0].mean().item(),
            "pixel_accuracy": (right.sum() / labelled.sum()).item(),
        },
        counts={
            "classes": len(names),
            "classes_in_mean": int((union > 0).sum()),
            "pixels": int(labelled.sum()),
        },
        groups={"class": by_class},
    )


class _PreparedImages(Dataset[tuple[Tensor, Tensor]]):
    """The normalised pixels `(3, height, width)` of resized images, and their label maps in full size."""

    def __init__(self, encoder: Encoder, data: SegmentationData, rows: Sequence[int], scale: tuple[int, int]) -> None:
        self.encoder, self.data, self.rows, self.scale = encoder, data, rows, scale

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        image: Any = self.data.images.decode(row, decode_image)
        labels = self.data.labels(row)
        if tuple(labels.shape) != (image.height, image.width):
            raise BenchmarkError(
                f"{self.data.label_maps[row]} has {labels.shape[1]} x {labels.shape[0]} pixels, but its image "
                f"{self.data.images.key(row)} {image.width} x {image.height}."
            )
        size = resized_size(image.height, image.width, self.scale)
        if size != (image.height, image.width):
            # Without antialiasing, as OpenCV resizes, on which the published numbers rest; as float, because bytes are
            # resized with other roundings on some processors.
            pixels = V.pil_to_tensor(image).float()
            pixels = V.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=False)
            image = V.to_pil_image(pixels.round().to(torch.uint8))
        return self.encoder.prepare_pixels(image)["pixel_values"], labels
