"""Sets in parquet files, as data sets of the Hub are: a row for each image, or for each pair of images."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from pydantic import BaseModel, ConfigDict, model_validator

from llm2clip.data.opened_table import open_table
from llm2clip.data.rows import Columns
from llm2clip.encoders.images import ChosenImages, ImageSet, JoinedImages, TableImages
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import ClassificationData, PairData, RetrievalData
from llm2clip.evaluation.prompts import template_set


class Parquet(BaseModel):
    """How a set in this form is read.

    Attributes:
        files: Pattern of the files of the test split.
        train_files: Of the train split, for linear probes.
        image: Column of the image; two columns, of pairs.
        texts: Column of the caption, or of a list of captions; two columns, of pairs.
        first: Captions of each image that are taken; None for all.
        image_id, text_ids: Columns of the id of an image, and of those of its captions.
        kind: Column of the part that each pair belongs to.
        label: Column of the label, the position of the class in `names`.
        names: Names of the classes.
        templates: Templates of the prompts, by name.
        mean_per_class: The accuracy that is compared is the mean of the classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["parquet"]
    files: str
    train_files: str | None = None
    image: str | tuple[str, str]
    texts: str | tuple[str, str] | None = None
    first: int | None = None
    image_id: str | None = None
    text_ids: str | None = None
    kind: str | None = None
    label: str | None = None
    names: tuple[str, ...] = ()
    templates: str = "openai-80"
    mean_per_class: bool = False

    @model_validator(mode="after")
    def _check(self) -> Parquet:
        if (self.texts is None) == (self.label is None) or (self.label is not None) != bool(self.names):
            raise ValueError("give texts, or label with the names of the classes")
        if isinstance(self.image, tuple) != isinstance(self.texts, tuple):
            raise ValueError("of pairs, image and texts are two columns each")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The files that have to be there."""
        return (self.files,)

    @property
    def train_needs(self) -> tuple[str, ...]:
        """Those of train images."""
        return () if self.train_files is None else (self.train_files,)

    def read(self, folder: Path, with_train: bool = False) -> RetrievalData | ClassificationData | PairData:
        """Read the test images with what belongs to them and, for a probe, the train images."""
        if self.label is not None:
            data = self._read_labels(folder, self.files)
            if with_train and self.train_files is not None:
                data.train = self._read_labels(folder, self.train_files)
            return data
        if isinstance(self.image, tuple):
            return self._read_pairs(folder)
        table = self.table(folder)
        return RetrievalData.from_captions(self.images(table, self.image), self.captions(table))

    def table(self, folder: Path, files: str | None = None) -> datasets.Dataset:
        """Open the rows of some files, by default those of the test split.

        Raises:
            BenchmarkError: A column is missing.
        """
        pattern = f"{glob.escape(str(folder))}/{self.files if files is None else files}"
        table = open_table(pattern, None, "test", None).table
        assert isinstance(table, datasets.Dataset)
        named = (self.image, self.texts, self.image_id, self.text_ids, self.label)
        columns = [column for name in named if name for column in (name if isinstance(name, tuple) else (name,))]
        if missing := [column for column in columns if column not in table.column_names]:
            raise BenchmarkError(
                f"{pattern} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}."
            )
        return table

    def images(self, table: datasets.Dataset, column: str) -> TableImages:
        """Return the images of a column, which are decoded when they are needed."""
        table = table.cast_column(column, datasets.Image(decode=False))
        return TableImages(table, Columns(column, self.image_id, [], None))

    def captions(self, table: datasets.Dataset) -> list[list[str]]:
        """Return the captions of each row."""
        assert isinstance(self.texts, str)
        values: Sequence[Any] = table[self.texts][:]
        return [[value] if isinstance(value, str) else list(value)[: self.first] for value in values]

    def _read_labels(self, folder: Path, files: str) -> ClassificationData:
        assert isinstance(self.image, str)
        table = self.table(folder, files)
        labels = torch.tensor(table[self.label][:], dtype=torch.int64)
        if not len(labels) or labels.min() < 0 or labels.max() >= len(self.names):
            raise BenchmarkError(f"a label of {folder / files} is none of {len(self.names)} classes.")
        return ClassificationData(
            self.images(table, self.image),
            labels,
            list(self.names),
            template_set(self.templates),
            mean_per_class=self.mean_per_class,
        )

    def _read_pairs(self, folder: Path) -> PairData:
        assert isinstance(self.image, tuple)
        assert isinstance(self.texts, tuple)
        table = self.table(folder)
        pairs = len(table)
        sides: list[ImageSet] = [self.images(table, column) for column in self.image]
        order = [row + side * pairs for row in range(pairs) for side in (0, 1)]
        texts = [text for both in zip(*(table[column] for column in self.texts), strict=True) for text in both]
        has_kinds = self.kind is not None and self.kind in table.column_names
        kinds = [str(kind) for kind in table[self.kind]] if has_kinds else ["all"] * pairs
        return PairData(ChosenImages(JoinedImages(sides), order), texts, kinds)
