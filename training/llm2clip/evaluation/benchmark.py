"""What a benchmark is: files, published counts, a reader, a protocol; and what the protocol finds."""

from __future__ import annotations

import csv
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llm2clip.command_line.logs import shortened

if TYPE_CHECKING:
    from llm2clip.evaluation.session import Session

# What broken content raises. A bug in a reader is an error of another kind, in most cases.
DAMAGED: tuple[type[Exception], ...] = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, TypeError, ValueError),
    *(csv.Error, tarfile.TarError, zlib.error),
)
Group = Literal["short", "long", "languages", "classification", "composition", "dense", "paper"]
GROUPS: tuple[Group, ...] = get_args(Group)


class BenchmarkError(ValueError):
    """The files of a benchmark are not what was published: other counts, a row without its image, a broken row."""


class BenchmarkProtocol(Protocol):
    """How a benchmark is measured."""

    def measure(self, session: Session, data: Any) -> Measurement:
        """Measure a model on the data of a benchmark."""
        ...


class HubFiles(BaseModel):
    """The files of a set on the Hub, at one commit.

    Attributes:
        repo: Id of the data set, such as `clip-benchmark/wds_flickr30k`.
        revision: Its commit, all 40 digits: the cache finds no other without a network.
        files: Patterns of what is fetched.
        megabytes: About how large that is.
        train_files, train_megabytes: What linear probes need besides.
        gated: Its terms have to be accepted on its page first.
        unpack: The files are archives, whose content is the set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: tuple[str, ...] = Field(min_length=1)
    megabytes: int = Field(gt=0)
    train_files: tuple[str, ...] = ()
    train_megabytes: int = 0
    gated: bool = False
    unpack: bool = False

    def with_train(self) -> HubFiles:
        """Return these files and those that linear probes need."""
        return self.model_copy(
            update={
                "files": (*self.files, *self.train_files),
                "megabytes": self.megabytes + self.train_megabytes,
                "train_files": (),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: a row of `sets.yaml` of this package, or of a stranger's file, defines one.

    Attributes:
        name: Its name on the command line, such as `urban1k`.
        title: Its name in tables.
        groups: The groups of `GROUPS` that contain it.
        folder: Subfolder of `--data` that contains its files; benchmarks of the same files share one.
        needs: The files or folders below it that have to be there, or patterns of `Path.glob`.
        files: What is needed, in words.
        counts: Published counts that the reader finds, such as `{"images": 1000, "texts": 5000}`.
        license: License of the data.
        source: Where to get the files, in words.
        published: Where its numbers were published.
        read: Reads the files below a folder.
        protocol: Id of the protocol that measures what `read` returns, such as `retrieval` (see
            `llm2clip.evaluation.protocols`), or an object of one's own with `measure(session, data)`.
        options: Arguments of the protocol of an id, such as the languages of a mean.
        note: A trap, or how its numbers differ from others of the same name.
        differs: What of this copy differs from the published set, in words; results and reports say so.
        hub: Its files on the Hub, which are fetched if there are none below `--data`.
        read_train: Reads the train images too, for the linear probe of the set, `NAME-probe-sgd`; None if it has no
            train images.
        train_needs: What else has to be there for it, as `needs`.
        train_differs: As `differs`, of the train images.
    """

    name: str
    title: str
    groups: tuple[Group, ...] = ()
    folder: str = ""
    needs: tuple[str, ...] = ()
    files: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    license: str = ""
    source: str = ""
    published: str = ""
    read: Callable[[Path], Any]
    protocol: str | BenchmarkProtocol
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    differs: tuple[str, ...] = ()
    hub: HubFiles | None = None
    read_train: Callable[[Path], Any] | None = None
    train_needs: tuple[str, ...] = ()
    train_differs: tuple[str, ...] = ()

    @property
    def members(self) -> Sequence[Benchmark]:
        """The benchmarks whose files it needs: itself, or those that a mean is of."""
        return (self,)

    def with_train(self) -> Benchmark:
        """Return the same set with its train images, which linear probes need."""
        assert self.read_train is not None
        return replace(
            self,
            read=self.read_train,
            read_train=None,
            needs=(*self.needs, *self.train_needs),
            differs=(*self.differs, *self.train_differs),
            hub=self.hub and self.hub.with_train(),
        )

    def lacks(self, folder: Path) -> list[str]:
        """Return those of `needs` that a folder does not have."""
        return [need for need in self.needs if next(folder.glob(need), None) is None]

    def find(self, data: Path) -> Path | None:
        """Return the folder of its files below `data`, or `data` if that is this folder; None if there is none."""
        folder = self._folder(data)
        return folder if folder.is_dir() and not self.lacks(folder) else None

    def lacking(self, data: Path) -> str:
        """Say what is missing below a folder, and where to get it."""
        folder = self._folder(data)
        return f"{self.name} lacks {shortened(self.lacks(folder))} in {folder}. (Source: {self.source.rstrip('.')}.)"

    def _folder(self, data: Path) -> Path:
        is_own = not (data / self.folder).is_dir() and data.resolve().name == Path(self.folder).name
        return data if is_own else data / self.folder

    def load(self, folder: Path) -> Any:
        """Read the files below a folder.

        Raises:
            BenchmarkError: One is missing or damaged, or has not the form in which the set was published.
        """
        try:
            data = self.read(folder)
        except DAMAGED as error:
            # These say all themselves.
            if isinstance(error, BenchmarkError) or getattr(error, "filename", None):
                raise
            raise BenchmarkError(
                f"{self.title}: a file in {folder} is damaged, or has another form than the published one "
                f"({type(error).__name__}: {error})."
            ) from error
        for row in (row for part in data.parts() for row in part.rows):
            if other := [text for text in row[1:] if not isinstance(text, str)]:
                raise BenchmarkError(f"{self.title}: {row[0]} has {other[0]!r:.80} in place of a text, in {folder}.")
        return data

    def differences(self, counts: Mapping[str, int]) -> list[str]:
        """Say in words which counts differ from the published ones."""
        return [
            f"{counts.get(name, 0):,} {name} instead of {count:,}"
            for name, count in self.counts.items()
            if counts.get(name, 0) != count
        ]

    def describe(self, folder: Path) -> dict[str, Any]:
        """Return what a result says of the data that was found in a folder, besides its checksum."""
        if self.hub is None or self.hub.revision not in folder.parts:
            return {"folder": str(folder)}
        return {"folder": str(folder), "repo": self.hub.repo, "revision": self.hub.revision}


@dataclass
class SummedCounts:
    """Scores that are ratios of sums over images, such as a mean IoU, for bootstrap intervals.

    Attributes:
        counts: Of each image, `(images, columns)` int64.
        scores: Computes the scores by name, `(...)` float64, from sums of counts `(..., columns)` float64; NaN where
            there is nothing to measure.
    """

    counts: Tensor
    scores: Callable[[Tensor], dict[str, Tensor]]


@dataclass
class Measurement:
    """What a protocol found.

    Attributes:
        protocol: Name and options of the protocol. Scores of two results may be compared if these are equal.
        scores: The scores, 0 to 1, in the order in which they are printed; by default the means of `values`.
        compared: Those that reports compare, in the order of papers; by default the first.
        values: The value of each query, `(queries,)`, whose mean is the score of that name, for bootstrap intervals.
        strata: The part that each value belongs to, `(queries,)` int64, if the score is the mean over parts of their
            means, as over languages or classes.
        clusters: The image that each value belongs to, `(queries,)` int64, if images have several queries; see
            [`bootstrap_interval`].
        summed: What the scores without `values` are computed from, if they are ratios of sums.
        ranks: Mean and median ranks, from 1.
        counts: Numbers of images, texts, queries, tied queries, truncated texts and the like.
        groups: Scores of parts by kind and part, such as `{"language": {"de": {"text_to_image_recall@1": 0.5}}}`.
    """

    protocol: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict)
    strata: dict[str, Tensor] = field(default_factory=dict)
    clusters: dict[str, Tensor] = field(default_factory=dict)
    summed: SummedCounts | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = self.scores or {name: values.mean().item() for name, values in self.values.items()}
        self.compared = self.compared or tuple(self.scores)[:1]
