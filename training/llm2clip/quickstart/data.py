"""The data of the quickstart: the splits of a set of captioned images, and word-gloss pairs for stage 1."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from llm2clip.data import CaptionSource, PairSource, caption_id, distinct_captions, load_source
from llm2clip.data.formats import SourceError
from llm2clip.data.table_identity import data_revision
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.files.bundled import bundled_data

logger = logging.getLogger(__name__)

# Columns of words and their definitions.
GLOSSES = ("lemmas", "gloss")
# Languages of translated captions: those of the tables, and others that only `results.json` lists.
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "zh": "Chinese", "ja": "Japanese", "hi": "Hindi"}
OTHER_LANGUAGES = {"ru": "Russian", "ar": "Arabic"}
# Those that have a line of their own.
SHOWN_LANGUAGES = ("German", "Chinese")
# How often a translation is drawn in training, relative to a caption of the drawing.
TRANSLATION_WEIGHT = 0.1
# The queries of the tables, beside those of each language.
QUERY = "captions"


@dataclass(frozen=True)
class QuickstartData:
    """Captioned images in three splits.

    Attributes:
        path: Folder or Hub id.
        caption_columns: Caption columns; the first is the query of the retrieval tables.
    """

    path: str
    caption_columns: list[str]
    image_column: str
    train: str
    validation: str
    test: str

    @classmethod
    def find(cls, path: str | None, caption_columns: list[str], image_column: str = "image") -> QuickstartData:
        """Find the splits of a data set, by default the bundled concepts.

        Missing validation and test splits are replaced by held-out parts of `train`.
        """
        path = path or str(bundled_data("concepts", "give --data a folder or Hub id"))
        held_out = []
        for split in ("validation", "test"):
            try:
                load_source(CaptionSource(path, split=split, caption_columns=caption_columns[:1]), with_images=False)
                held_out.append(split)
            except SourceError as error:
                logger.info("%s", error)
        splits = {"train": "train", "validation": "train[80%:90%]", "test": "train[90%:]"}
        if held_out:
            splits |= {"validation": held_out[0], "test": held_out[-1]}
        else:
            splits["train"] = "train[:80%]"
            logger.info("%s has no validation and test split: the last fifth of its rows is held out for them.", path)
        return cls(path, caption_columns, image_column, **splits)

    @property
    def query_column(self) -> str:
        """The caption column that queries images."""
        return self.caption_columns[0]

    def source(self, split: str, caption_columns: list[str]) -> CaptionSource:
        """Return the images of a split with the captions of some columns."""
        return CaptionSource(self.path, split=split, image_column=self.image_column, caption_columns=caption_columns)

    def gloss_pairs(self, split: str) -> PairSource:
        """Return bundled pairs of words and their definitions."""
        path, (anchor, positive) = _glosses(), GLOSSES
        return PairSource(path=path, split=split, anchor_column=anchor, positive_column=positive, weight=1)

    def caption_pairs(self, split: str) -> PairSource:
        """Return pairs of captions of one image, with twice the weight of glosses: stage 2 embeds captions."""
        return PairSource(path=self.path, split=split, caption_columns=self.caption_columns, weight=2)

    def pair_sources(self) -> list[PairSource]:
        """Return the training data of stage 1: the glosses, and the captions of images that have several."""
        captions = [self.caption_pairs(self.train)] if "name_to_keywords" in self.caption_sets else []
        return [self.gloss_pairs("train"), *captions]

    @cached_property
    def caption_sets(self) -> dict[str, CaptionPairData]:
        """The caption retrieval sets of the results table; that of captions only if some image has two."""
        sets = {"lemma_to_gloss": CaptionPairData.from_source(self.gloss_pairs("test"))}
        try:
            sets["name_to_keywords"] = CaptionPairData.from_source(self.caption_pairs(self.test))
        except SourceError:
            raise
        except ValueError as error:
            logger.info("stage 1 trains on the bundled glosses only: %s", error)
        return sets

    def test_source(self, column: str | None = None) -> CaptionSource:
        """Return the test images with the captions of one column, by default the query column."""
        return self.source(self.test, [column or self.query_column])

    @cached_property
    def translations(self) -> dict[str, str]:
        """The columns with translations of the query caption, by language."""
        columns = {}
        for code, name in (LANGUAGES | OTHER_LANGUAGES).items():
            column = f"{self.query_column}_{code}"
            try:
                load_source(self.test_source(column), with_images=False)
                columns[name] = column
            except SourceError:
                logger.info("%s has no column %s: no row for %s captions.", self.path, column, name)
        return columns

    @cached_property
    def trained_translations(self) -> list[str]:
        """The columns of these that the training images have too."""
        columns = []
        for column in self.translations.values():
            with contextlib.suppress(SourceError):
                load_source(self.source(self.train, [column]), with_images=False)
                columns.append(column)
        return columns

    def trained(self, kind: str, weights: Sequence[float] | None = None) -> CaptionSource:
        """Return what a text encoder of a kind is aligned on: the training images with their captions.

        An embedding model knows other languages, and also gets the captions' translations, at a tenth of the weight.

        Args:
            weights: Of the caption columns; by default all the same.
        """
        columns = [*self.caption_columns, *(self.trained_translations if kind == "ready" else [])]
        source = self.source(self.train, columns)
        if weights is not None or len(columns) > len(self.caption_columns):
            shares = list(weights) if weights is not None else [1.0] * len(self.caption_columns)
            added = len(columns) - len(self.caption_columns)
            source.caption_weights = [*shares, *[TRANSLATION_WEIGHT * fmean(shares)] * added]
        return source

    def queries(self, kind: str) -> dict[str, str]:
        """Return the columns that query the test images with a text encoder of a kind, by what they are.

        A plain LLM answers only in its own language, which stage 1 hardly changes; an embedding model in all.
        """
        every = tuple((LANGUAGES | OTHER_LANGUAGES).values())
        languages = {"raw": (), "tuned": SHOWN_LANGUAGES, "ready": every}[kind]
        columns = {name: self.translations[name] for name in languages if name in self.translations}
        return {QUERY: self.query_column, **columns}

    def embedded(self, kind: str) -> list[CaptionSource]:
        """Return what a text encoder of a kind embeds: the captions, and the texts of the caption retrieval."""
        pairs = [CaptionSource(_glosses(), split="test", caption_columns=[column]) for column in GLOSSES]
        if "name_to_keywords" in self.caption_sets:
            pairs.append(self.source(self.test, self.caption_columns))
        return [
            self.source(self.train, self.trained(kind).caption_columns),
            self.source(self.validation, [self.query_column]),
            self.source(self.test, [*self.queries(kind).values()]),
            *pairs,
        ]

    def seen_captions(self) -> tuple[int, int]:
        """Count the test captions that are also captions of training images, and all test captions, distinct ones."""
        trained, tested = (
            {caption_id(text) for text in distinct_captions(source, show_progress=False)}
            for source in (self.source(self.train, self.caption_columns), self.test_source())
        )
        return len(tested & trained), len(tested)

    def settings(self) -> dict[str, Any]:
        """Return JSON values that identify the data and its splits."""
        return {
            "data": self.path,
            "content": data_revision(self.path),
            "splits": [self.train, self.validation, self.test],
            "caption_columns": self.caption_columns,
        }


def _glosses() -> str:
    return str(bundled_data("glosses", "train both stages on your own data (llm2clip stage1, stage2)"))
