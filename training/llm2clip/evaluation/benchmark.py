"""What a benchmark is: files, published counts, a reader, a protocol; and what the protocol finds."""

from __future__ import annotations

import csv
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

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


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: one small file of this package, or of a stranger, defines one or several.

    Attributes:
        name: Its name on the command line, such as `urban1k`.
        title: Its name in tables.
        groups: The groups of `GROUPS` that contain it.
        folder: Subfolder of `--data` that contains its files, by default; benchmarks of the same images share one.
        needs: The files or folders below it that have to be there, or patterns of `Path.glob`; each may be a tuple of
            alternatives, where a set is distributed in several forms. One that begins with `./` says little by its
            name, as `./test.json`, and counts only in a folder with the name of `folder`.
        files: What else is needed, in words, with the layout below `folder`.
        counts: Published counts that the reader finds, such as `{"images": 1000, "texts": 5000}`.
        license: License of the data.
        source: Where to get the files, in words.
        read: Reads the files below a folder.
        protocol: Id of the protocol that measures what `read` returns, such as `retrieval` (see
            `llm2clip.evaluation.protocols`), or an object of one's own with `measure(session, data)`.
        options: Arguments of the protocol of an id, such as the languages of a mean.
        note: A trap, or how its numbers differ from others of the same name.
        read_train: Reads the train images too, for the linear probe of the set, `NAME-probe-sgd`; None if it has no
            train images.
        train_needs: What else has to be there for it, as `needs`.
    """

    name: str
    title: str
    groups: tuple[Group, ...] = ()
    folder: str = ""
    needs: tuple[str | tuple[str, ...], ...] = ()
    files: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    license: str = ""
    source: str = ""
    read: Callable[[Path], Any]
    protocol: str | BenchmarkProtocol
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    read_train: Callable[[Path], Any] | None = None
    train_needs: tuple[str | tuple[str, ...], ...] = ()

    def located(self, folder: Path) -> list[Path | None]:
        """Return the path of each of `needs` in a folder, or None where it is not there."""
        return [
            next((path for form in self._forms(need, folder) for path in folder.glob(form)), None)
            for need in self.needs
        ]

    def find(self, data: Path) -> Path | None:
        """Return the folder of its files below `data`, or `data` itself if they lie there; None if there are none."""
        folders = (data / self.folder, data)
        return next((folder for folder in folders if folder.is_dir() and all(self.located(folder))), None)

    def lacking(self, data: Path) -> str:
        """Say what is missing below a folder, and where it is looked for."""
        folder = data / self.folder if (data / self.folder).is_dir() else data
        missing = [
            " or ".join(self._forms(need, folder) or [self.folder])
            for need, path in zip(self.needs, self.located(folder), strict=True)
            if path is None
        ]
        return f"{self.name} lacks {shortened(missing)} in {folder}. (Source: {self.source.rstrip('.')}.)"

    def _forms(self, need: str | tuple[str, ...], folder: Path) -> list[str]:
        """Return the alternatives of one of `needs` that count in a folder."""
        forms = [need] if isinstance(need, str) else need
        is_own = folder.resolve().name == Path(self.folder).name
        return [form.removeprefix("./") for form in forms if is_own or not form.startswith("./")]

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
        return {"folder": str(folder)}


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
