"""Zero-shot segmentation: a pixel belongs to the class whose prompts its patch is closest to, after MaskCLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import prepare_ahead, run_model
from llm2clip.evaluation.benchmark import BenchmarkError, Measurement, SummedCounts
from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.prompts import class_data, name_of_templates, prompts, template_set
from llm2clip.evaluation.protocols.classification import class_embeddings
from llm2clip.evaluation.segmentation_data import IGNORED, SegmentationData
from llm2clip.evaluation.session import Session
from llm2clip.files.atomic import digest_json
from llm2clip.models.embeddings import require_finite_rows
from modeling_llm2clip.image_decoding_llm2clip import decode_image

# Scores of classes at pixels that are in memory at once: 64 MiB, and as much again while they are resized.
CHUNK = 2**24
TEMPLATES = "maskclip-85"
# Version of the rule by which pixels are counted: counts that an earlier one has stored are not found again.
RULE = 2
# Top, left, height and width of a part of an image.
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class MaskCLIPSegmentation:
    """Segmentation by the cosines between patches and the texts of classes, after MaskCLIP (arXiv 2112.01071).

    As in its code (mmsegmentation): an image is resized bilinearly to `scale` with its ratio kept; scores are resized
    bilinearly from patches to the resized image and then to the label map; the highest wins. A class of several names,
    such as a background, wins where one of them does: in MaskCLIP's `maskclip_head.py` each text is a channel, and
    mmsegmentation resizes the channels before it compares them. The mean IoU is over the classes that occur in labels
    or predictions, from the pixels of all images. Unlike there, pixels are normalised as the model's own are.

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
        embeds = class_embeddings(session, texts, len(templates))
        kind, count = self._counter(session, data, texts, embeds)
        width, title = 3 * len(data.classes), f"Segmenting {data.title}"
        counted = session.count_in_images(kind, pair_keys(data), count, width, title)
        if not counted.any():
            raise BenchmarkError(f"no pixel of {data.title} has a class.")
        protocol = {
            "name": "MaskCLIP segmentation",
            "image": "whole" if self.crop is None else f"windows of {self.crop} every {self.stride}",
            "scale": list(self.scale),
            "templates": TEMPLATES if self.templates is None else name_of_templates(templates),
        }
        counts = {"texts": len(texts), **session.count_cut(texts)}
        return measured_counts(counted, list(data.classes), protocol, counts)

    def _counter(
        self, session: Session, data: SegmentationData, texts: list[str], embeds: Tensor
    ) -> tuple[str, Callable[[Sequence[int]], Iterator[Tensor]]]:
        """Return a name for all that counts depend on, and what counts the pixels of images; see [`pixel_counts`]."""
        encoder, classes = session.encoder, len(data.classes)
        embeds = embeds.to(encoder.device)
        owners = [number for number, names in enumerate(data.classes.values()) for _ in names]
        class_of_name = torch.tensor(owners)

        def forward(inputs: tuple[Tensor, Tensor]) -> Tensor:
            windows = self._windows(inputs[0])
            parts = [inputs[0][:, top : top + height, left : left + width] for top, left, height, width in windows]
            return encoder.forward_patches({"pixel_values": torch.stack(parts)})

        def count(rows: Sequence[int]) -> Iterator[Tensor]:
            prepare = _PreparedImages(encoder, data, self.scale)
            inputs = prepare_ahead(rows, prepare, session.num_workers)
            for row, (pixels, labels), patches in run_model(encoder.model, rows, inputs, forward):
                require_finite_rows(patches[None].flatten(1), [data.images.key(row)].__getitem__, "images")
                scores = (patches.to(encoder.device) @ embeds.T).permute(0, 3, 1, 2)
                size, label_size = (pixels.shape[-2], pixels.shape[-1]), (labels.shape[0], labels.shape[1])
                predicted = predict(scores, self._windows(pixels), size, label_size).cpu()
                yield pixel_counts(labels, class_of_name[predicted], classes)

        options = [RULE, owners, self.scale, self.crop, self.stride, data.class_of.tolist(), texts]
        return f"segmentation-{digest_json(options)}", count

    def _windows(self, pixels: Tensor) -> list[Window]:
        return whole_or_windows(pixels.shape[-2], pixels.shape[-1], self.crop, self.stride)


def pair_keys(data: SegmentationData) -> np.ndarray:
    """Identify images with their label maps by the bytes of both files, `(images, 2)` int64."""
    keys = [images.content_keys() for images in (data.images, BenchmarkImages(data.label_maps))]
    pairs = np.concatenate(keys, axis=1)
    digests = b"".join(hashlib.blake2b(pair.astype("<i8").tobytes(), digest_size=16).digest() for pair in pairs)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def maskclip_templates() -> list[str]:
    """Return OpenAI's 80 templates and the five of MaskCLIP."""
    return [*template_set("openai-80"), *class_data("segmentation")["templates"]]


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


def predict(scores: Tensor, windows: Sequence[Window], size: tuple[int, int], label_size: tuple[int, int]) -> Tensor:
    """Resize scores to pixels and choose the highest, for a few names at a time.

    Args:
        scores: `(windows, names, rows, columns)`, the cosines of the patches of each window with names of classes.
        size: Height and width of the resized image, in which the windows lie.
        label_size: Height and width of the label map.

    Returns:
        `label_size`, int64, the first of the names with the highest score.
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


def pixel_counts(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count the pixels of an image that have a class, `(3 * classes,)` int64.

    By class, those that are predicted rightly, those that are labelled so, and those that are predicted so.
    """
    counted = labels != IGNORED
    labels, predicted = labels[counted], predicted[counted]
    parts = (labels[labels == predicted], labels, predicted)
    return torch.cat([torch.bincount(part, minlength=classes) for part in parts])


def segmentation_scores(counts: Tensor) -> dict[str, Tensor]:
    """Compute the scores from sums of [`pixel_counts`], `(..., 3 * classes)` float64; NaN without any pixel."""
    right, labelled, predicted = counts.unflatten(-1, (3, -1)).unbind(-2)
    return {
        "miou": (right / (labelled + predicted - right)).nanmean(dim=-1),
        "mean_accuracy": (right / labelled).nanmean(dim=-1),
        "pixel_accuracy": right.sum(dim=-1) / labelled.sum(dim=-1),
    }


def measured_counts(
    pixels: Tensor, names: Sequence[str], protocol: dict[str, Any], counts: Mapping[str, int]
) -> Measurement:
    """Summarise the pixels of images, `(images, 3 * classes)` int64 of [`pixel_counts`].

    A class that occurs neither in labels nor in predictions has no IoU, and is not part of the mean; one that occurs
    in predictions alone has 0. The mean accuracy is over the classes that occur in labels.
    """
    total = pixels.sum(dim=0)
    right, labelled, predicted = total.double().view(3, -1)
    union = labelled + predicted - right
    by_class = {
        name: {"iou": (right[number] / union[number]).item(), "pixels": int(labelled[number])}
        for number, name in enumerate(names)
        if union[number] > 0
    }
    return Measurement(
        protocol=protocol,
        scores={name: score.item() for name, score in segmentation_scores(total.double()).items()},
        summed=SummedCounts(pixels, segmentation_scores),
        counts={
            "images": len(pixels),
            "classes": len(names),
            "classes_in_mean": int((union > 0).sum()),
            "pixels": int(labelled.sum()),
            **counts,
        },
        groups={"class": by_class},
    )


@dataclass
class _PreparedImages:
    """The normalised pixels `(3, height, width)` of resized images, and their label maps in full size."""

    encoder: Encoder
    data: SegmentationData
    scale: tuple[int, int]

    def __call__(self, row: int) -> tuple[Tensor, Tensor]:
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
