"""Retrieval as it is published: every caption row is a query, and its own image alone is right."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.command_line.progress import track
from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.metrics import retrieval_metrics, retrieval_ranks
from llm2clip.evaluation.session import Session

logger = logging.getLogger(__name__)

# Upper ends of the buckets of caption length in tokens. CLIP's text towers end at 77 tokens.
LENGTH_BUCKETS = (16, 32, 64, 77, 128, 256, 512)
PROTOCOL = {
    "name": "retrieval",
    "positives": "rows",
    "image_hit": "any own caption",
    "ties": "expected value",
}
COMPARED = ("image_to_text_recall@1", "text_to_image_recall@1")


@dataclass(frozen=True)
class RetrievalProtocol:
    """Recall@1, 5 and 10 in both directions; ties are expected values, and repeated and empty captions stay queries.

    An image counts as found if any of its own captions is among the first k. Recall is also given by the length of
    captions in tokens of the model's tokenizer; that of images only if each has one caption.

    Args:
        positives: What is right, in words: `rows`, the own image of each caption alone; `distinct`, the images of all
            equal captions; `pairs`, the pairs of the data. The default is `pairs` for data with some, or else `rows`.
    """

    positives: str | None = None

    def measure(self, session: Session, data: RetrievalData) -> Measurement:
        """Measure both directions.

        Raises:
            BenchmarkError: There is no caption.
        """
        images = session.embed_images(data.images)
        images, data, skipped = without_unreadable(images, data)
        measured = measure_rows(session, images, session.embed_texts(data.texts), data)
        if skipped:
            measured.counts["skipped_images"] = skipped
        return (
            measured
            if self.positives is None
            else replace(measured, protocol={**PROTOCOL, "positives": self.positives})
        )


@dataclass(frozen=True)
class MultilingualRetrieval:
    """[`RetrievalProtocol`] in each of several languages, and the mean over languages.

    Args:
        mean_over: The languages of the mean; None is all. A result's protocol lists them.
    """

    mean_over: tuple[str, ...] | None = None

    def measure(self, session: Session, data: Mapping[str, RetrievalData]) -> Measurement:
        """Measure each language against its images, which are embedded once if languages share them.

        Raises:
            BenchmarkError: There is no language of the mean, or a language has no caption.
        """
        languages = [name for name in data if self.mean_over is None or name in self.mean_over]
        if not languages:
            raise BenchmarkError(f"there is no language to average: the data has {', '.join(data) or 'none'}.")
        embedded: dict[int, Tensor] = {}
        measured: dict[str, Measurement] = {}
        for language, rows in track(data.items(), "Measuring languages", "language"):
            if id(rows.images) not in embedded:
                embedded[id(rows.images)] = session.embed_images(rows.images)
            measured[language] = measure_rows(
                session, embedded[id(rows.images)], session.embed_texts(rows.texts), rows
            )
        averaged = [measured[language] for language in languages]
        names = averaged[0].scores
        sizes = {name: torch.tensor([len(part.values[name]) for part in averaged]) for name in names}
        # Languages that share their images are drawn together.
        first = {key: number << 32 for number, key in enumerate(embedded)}
        offsets = [first[id(data[language].images)] for language in languages]
        # Lengths in tokens differ between languages, so that no bucket is comparable over them.
        return Measurement(
            protocol={**PROTOCOL, "mean_over": languages},
            scores={name: sum(part.scores[name] for part in averaged) / len(averaged) for name in names},
            values={name: torch.cat([part.values[name] for part in averaged]) for name in names},
            compared=COMPARED,
            strata={name: torch.arange(len(averaged)).repeat_interleave(sizes[name]) for name in names},
            clusters={
                name: torch.cat([part.clusters[name] + at for part, at in zip(averaged, offsets, strict=True)])
                for name in names
            },
            counts={
                **{name: sum(part.counts[name] for part in measured.values()) for name in averaged[0].counts},
                "images": max(part.counts["images"] for part in measured.values()),
                "languages": len(measured),
            },
            groups={"language": {name: {**part.scores, **_queries(part.counts)} for name, part in measured.items()}},
        )


def measure_rows(session: Session, image_embeds: Tensor, text_embeds: Tensor, data: RetrievalData) -> Measurement:
    """Measure retrieval from embeddings; see [`RetrievalProtocol`].

    If the data has `qrels`, these are right instead of the own image alone, and the protocol says `pairs`.

    Args:
        image_embeds, text_embeds: Unit rows, `(images, width)` and `(texts, width)`.
    """
    if not data.texts:
        raise BenchmarkError("there is no caption.")
    texts, images, image_queries = retrieval_ranks(image_embeds, text_embeds, data.pairs)
    lengths, is_cut = session.text_lengths(data.texts)
    are_known = not (lengths < 0).any()
    text_hits = texts.recalls("text_to_image_")
    hits = text_hits | images.recalls("image_to_text_")
    # A caption of several images is the length of none.
    length_hits = hits if data.qrels is None else text_hits
    return Measurement(
        protocol=dict(PROTOCOL) if data.qrels is None else {**PROTOCOL, "positives": "pairs"},
        compared=COMPARED,
        values=hits,
        clusters={name: data.owners if name in text_hits else image_queries for name in hits},
        ranks={**texts.mean_and_median("text_to_image_"), **images.mean_and_median("image_to_text_")},
        counts={
            "images": len(data.images),
            "texts": len(data.texts),
            "image_queries": len(image_queries),
            **({"truncated_texts": int(is_cut.sum())} if are_known else {}),
            "empty_texts": sum(not text.strip() for text in data.texts),
            "tied_text_queries": int(texts.is_tied.sum()),
            "tied_image_queries": int(images.is_tied.sum()),
        },
        groups={"length": by_length(length_hits, data.owners, lengths)} if are_known else {},
    )


def by_length(hits: Mapping[str, Tensor], owners: Tensor, lengths: Tensor) -> dict[str, dict[str, float]]:
    """Average hits in buckets of caption length.

    Args:
        hits: Values by score: `text_to_image_*` of each text, `image_to_text_*` of each image that has one.
        owners: Image of each text.
        lengths: Tokens of each text.

    Returns:
        By bucket, such as `17-32`: the number of texts, and the means. Those of images are left out if one has several
        captions, because it has no one length then.
    """
    buckets = torch.bucketize(lengths, torch.tensor(LENGTH_BUCKETS))
    has_one_caption = len(owners.unique()) == len(owners)
    of_images = buckets[owners.argsort()]
    means = {}
    for bucket in buckets.unique().tolist():
        chosen = {"text_to_image": buckets == bucket, "image_to_text": of_images == bucket}
        sides = [side for side in chosen if side == "text_to_image" or has_one_caption]
        means[_bucket_name(bucket)] = {
            "texts": int(chosen["text_to_image"].sum()),
            **{
                name: hits[name][chosen[side]].mean().item()
                for side in sides
                for name in hits
                if name.startswith(side)
            },
        }
    return means


def _bucket_name(bucket: int) -> str:
    first = 0 if bucket == 0 else LENGTH_BUCKETS[bucket - 1] + 1
    return f"{first}-{LENGTH_BUCKETS[bucket]}" if bucket < len(LENGTH_BUCKETS) else f"{first}-"


def _queries(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in ("texts", "truncated_texts", "tied_text_queries", "tied_image_queries")}


def without_unreadable(images: Tensor, data: RetrievalData) -> tuple[Tensor, RetrievalData, int]:
    """Leave out the images that a session skips, and the captions that are right for no other image.

    Args:
        images: Of [`Session.embed_images`]: NaN where an image is skipped.

    Returns:
        The remaining embeddings and data, and the number of skipped images.

    Raises:
        BenchmarkError: No image can be read.
    """
    is_read = ~images.isnan().any(dim=1)
    rows = is_read.nonzero()[:, 0].tolist()
    skipped = [data.images.key(row) for row in (~is_read).nonzero()[:, 0].tolist()]
    if not skipped:
        return images, data, 0
    if not rows:
        raise BenchmarkError(f"none of the {len(skipped)} images can be read, such as {skipped[0]}.")
    logger.warning("Skipping %d images that cannot be read: %s", len(skipped), shortened(skipped))
    return images[is_read], data.select(rows), len(skipped)


def image_text_metrics(session: Session, data: RetrievalData) -> dict[str, float | int]:
    """Measure retrieval while a model trains: see [`retrieval_metrics`]."""
    images, data, _ = without_unreadable(session.embed_images(data.images), data)
    return retrieval_metrics(images, session.embed_texts(data.texts), data.pairs)
