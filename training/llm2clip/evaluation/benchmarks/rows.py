"""Benchmarks as rows of a YAML file: `sets.yaml` of this package, or a file of a user's own sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm2clip.command_line.settings import nearest
from llm2clip.command_line.yaml_text import load_yaml
from llm2clip.evaluation.benchmark import Benchmark, Group, HubFiles
from llm2clip.evaluation.benchmarks.captions import (
    read_chinese_clip,
    read_dci,
    read_iiw,
    read_key_lines,
    read_sharegpt4v,
    read_tab_lines,
    read_urban1k,
    read_xm3600,
    read_xtd10,
)
from llm2clip.evaluation.benchmarks.composition import read_caption_pairs, read_mmvp, read_sugar_crepe
from llm2clip.evaluation.benchmarks.fashion_mnist import read_fashion_mnist
from llm2clip.evaluation.benchmarks.graded_coco import read_graded
from llm2clip.evaluation.benchmarks.hub_files import obtain
from llm2clip.evaluation.benchmarks.image_folder import read_image_folder
from llm2clip.evaluation.benchmarks.imagenet import read_imagenet, read_imagenet_v2, read_objectnet
from llm2clip.evaluation.benchmarks.label_maps import read_label_maps
from llm2clip.evaluation.benchmarks.parquet import Parquet
from llm2clip.evaluation.benchmarks.webdataset import Webdataset
from llm2clip.evaluation.data import SeveralSets

# What reads the files of layouts that are those of one set.
READERS: dict[str, Callable[..., Any]] = {
    "caption-pairs": read_caption_pairs,
    "chinese-clip": read_chinese_clip,
    "dci": read_dci,
    "fashion-mnist": read_fashion_mnist,
    "graded": read_graded,
    "iiw": read_iiw,
    "image-folder": read_image_folder,
    "imagenet": read_imagenet,
    "imagenet-v2": read_imagenet_v2,
    "key-lines": read_key_lines,
    "label-maps": read_label_maps,
    "mmvp": read_mmvp,
    "objectnet": read_objectnet,
    "sharegpt4v": read_sharegpt4v,
    "sugarcrepe": read_sugar_crepe,
    "tab-lines": read_tab_lines,
    "urban1k": read_urban1k,
    "xm3600": read_xm3600,
    "xtd10": read_xtd10,
}


class Files(BaseModel):
    """How a set is read by a function of its own.

    Attributes:
        reader: One of `READERS`.
        needs: The files or folders that have to be there, or patterns.
        train_needs: What else has to be there for train images.
        options: Arguments of the reader.
        captions: The parquet files from which the reader takes captions with their ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["files"]
    reader: str
    needs: tuple[str, ...] = Field(min_length=1)
    train_needs: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    captions: Parquet | None = None

    @model_validator(mode="after")
    def _check(self) -> Files:
        if self.reader not in READERS:
            raise ValueError(f"there is no reader {self.reader!r}{nearest(self.reader, READERS)}")
        try:
            inspect.signature(READERS[self.reader]).bind(Path(), **self._arguments())
        except TypeError as error:
            raise ValueError(f"reader {self.reader}: {error}") from error
        return self

    def read(self, folder: Path, with_train: bool = False) -> Any:
        """Read the files and, for a probe, the train images."""
        more = {"with_train": True} if with_train else {}
        return READERS[self.reader](folder, **self._arguments(), **more)

    def _arguments(self) -> dict[str, Any]:
        return self.options | ({} if self.captions is None else {"captions": self.captions})


class Candidate(BaseModel):
    """A copy of a set on the Hub that is not used, because its whole commit is not known or nobody has compared it.

    Attributes:
        repo: Id of the data set.
        short_revision: The digits of the commit that are known.
        files: Patterns of what is compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str
    short_revision: str | None = Field(None, pattern=r"^[0-9a-f]{7,40}$")
    files: tuple[str, ...]
    unpack: bool = False
    read: Webdataset | Parquet | Files | None = Field(None, discriminator="layout")


class Row(BaseModel):
    """A benchmark in a YAML file; see [`Benchmark`] for the fields that are not described here.

    Attributes:
        read: How its files are read, by the name of the layout.
        differs, train_differs: What of the copy that is read differs from the published set, in words.
        candidate: A copy on the Hub that `make check-sets` compares.
        sets: Names of sets whose mean is measured, in place of `read`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    groups: tuple[Group, ...] = ()
    protocol: str
    options: dict[str, Any] = {}
    counts: dict[str, int] = {}
    license: str
    source: str
    published: str = ""
    note: str = ""
    differs: str = ""
    train_differs: str = ""
    folder: str = "."
    hub: HubFiles | None = None
    candidate: Candidate | None = None
    read: Annotated[Webdataset | Parquet | Files, Field(discriminator="layout")] | None = None
    sets: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Row:
        if (self.read is None) == (not self.sets):
            raise ValueError("give either read, or the sets of a mean")
        return self


@dataclass(frozen=True, kw_only=True)
class MeanBenchmark(Benchmark):
    """A benchmark of several sets, each in a folder of its own.

    Attributes:
        sets: The benchmarks by name.
    """

    sets: Mapping[str, Benchmark]

    @property
    def members(self) -> Sequence[Benchmark]:
        """The sets."""
        return list(self.sets.values())

    def with_train(self) -> Benchmark:
        """Return the same sets with their train images."""
        members = {name: member.with_train() for name, member in self.sets.items()}
        return mean_of(self, members)

    def find(self, data: Path) -> Path | None:
        """Return the folder below which all sets are; None if one is not."""
        return data if all(member.find(data) is not None for member in self.members) else None

    def load(self, folder: Path) -> SeveralSets:
        """Read the sets, each in its folder, or from the Hub."""
        return SeveralSets({name: member.load(obtain(member, folder)) for name, member in self.sets.items()})


def mean_of(benchmark: Benchmark, sets: Mapping[str, Benchmark]) -> MeanBenchmark:
    """Make the benchmark of several sets from what else is known of it."""
    given = {field.name: getattr(benchmark, field.name) for field in fields(Benchmark)}
    given["counts"] = {"sets": len(sets)} | {
        f"{name} {what}": count for name, member in sets.items() for what, count in member.counts.items()
    }
    given["files"] = f"the files of {', '.join(sets)}, each in its folder"
    given["needs"] = tuple(f"{member.folder}/{need}" for member in sets.values() for need in member.needs)
    given["differs"] = tuple(f"{name}: {text}" for name, member in sets.items() for text in member.differs)
    has_train = all(member.read_train is not None for member in sets.values())
    return MeanBenchmark(**given | {"read_train": given["read"] if has_train else None}, sets=dict(sets))


def read_sets(text: str, origin: str) -> dict[str, Benchmark]:
    """Read the rows of a YAML file as benchmarks by name; see [`read_rows`]."""
    benchmarks: dict[str, Benchmark] = {}
    for name, row in read_rows(text, origin).items():
        benchmarks[name] = _benchmark(name, row, benchmarks)
    return benchmarks


def read_rows(text: str, origin: str) -> dict[str, Row]:
    """Read the rows of a YAML file.

    Raises:
        ValueError: A row is not what it should be; the message names it and the field.
    """
    rows = load_yaml(text)
    if not isinstance(rows, dict):
        raise ValueError(f"{origin} has no rows: it is a mapping of names of sets to what they are.")
    found: dict[str, Row] = {}
    for name, fields_of_row in rows.items():
        try:
            found[str(name)] = row = Row.model_validate(fields_of_row)
        except ValidationError as error:
            faults = [
                ".".join(str(part) for part in fault["loc"]) + f": {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors()
            ]
            raise ValueError(f"{origin}, row {name}: {'; '.join(faults)}.") from None
        if unknown := [member for member in row.sets if member not in found]:
            raise ValueError(f"{origin}, row {name}: sets: {', '.join(unknown)} is no row above it.")
    return found


def _benchmark(name: str, row: Row, known: Mapping[str, Benchmark]) -> Benchmark:
    given = row.model_dump(include={field.name for field in fields(Benchmark)}, exclude={"read", "hub"})
    given |= {field: tuple(filter(None, [given[field]])) for field in ("differs", "train_differs")}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in row.options.items()}
    given |= {"name": name, "hub": row.hub, "options": options}
    if row.read is None:
        unread = Benchmark(**given, read=lambda _: SeveralSets())
        return mean_of(unread, {member: known[member] for member in row.sets})
    train_needs = row.read.train_needs
    return Benchmark(
        **given,
        files=", ".join([*row.read.needs, *([f"and for probes {', '.join(train_needs)}"] if train_needs else [])]),
        needs=row.read.needs,
        read=row.read.read,
        read_train=partial(row.read.read, with_train=True) if train_needs else None,
        train_needs=train_needs,
    )
