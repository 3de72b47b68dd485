"""What a benchmark is: where its files lie, its published counts, its reader and the protocol that measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.evaluation.contracts import BenchmarkProtocol

GROUPS = ("short", "long", "languages", "classification", "composition", "dense", "paper")


class BenchmarkError(ValueError):
    """The files of a benchmark are not what was published: other counts, a row without its image, a broken row."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: one small file of this package, or of a stranger, defines one or several.

    Attributes:
        name: Its name on the command line, such as `urban1k`.
        title: Its name in tables.
        groups: The groups of `GROUPS` that contain it.
        folder: Subfolder of `--data` that contains its files, by default; benchmarks of the same images share one.
        marker: The file or folder below it that must be there.
        files: What else is needed, in words, with the layout below `folder`.
        counts: Published counts that the reader finds, such as `{"images": 1000, "texts": 5000}`.
        license: License of the data.
        source: Where to get the files, in words.
        read: Reads the files below a folder.
        protocol: Measures what `read` returns.
        note: A trap, or how its numbers differ from others of the same name.
        more_markers: Further files or folders that must be there.
        other_markers: Files or folders, or patterns of `Path.glob`, of which one may stand in for `marker`, where a
            set is distributed in several forms.
        own_markers: The same, but only below a folder named `folder`, because their names alone say little, such as
            `test.json`.
        read_train: Reads the train images too, for the linear probes of the set, which have the names
            `NAME-probe-sgd`, `NAME-probe-lbfgs` and `NAME-probe-openai`; None if it has no train images.
        train_markers: Further files or folders that must be there for those.
        languages: The languages of a set whose reader returns data by language.
    """

    name: str
    title: str
    groups: tuple[Literal["short", "long", "languages", "classification", "composition", "dense", "paper"], ...]
    folder: str
    marker: str
    files: str
    counts: Mapping[str, int]
    license: str
    source: str
    read: Callable[[Path], Any]
    protocol: BenchmarkProtocol
    note: str = ""
    more_markers: tuple[str, ...] = ()
    other_markers: tuple[str, ...] = ()
    own_markers: tuple[str, ...] = ()
    read_train: Callable[[Path], Any] | None = None
    train_markers: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def forms(self, folder: Path) -> tuple[str, ...]:
        """Return the files, folders and patterns of which one has to be in a folder, so that it has the set."""
        is_own = folder.resolve().name == Path(self.folder).name
        return (self.marker, *self.other_markers, *(self.own_markers if is_own else ()))

    def find(self, data: Path) -> Path | None:
        """Return the folder of its files below `data`, or `data` itself if they lie there; None if there are none."""
        for folder in (data / self.folder, data):
            has_form = any(next(folder.glob(marker), None) for marker in self.forms(folder))
            if has_form and all((folder / marker).exists() for marker in self.more_markers):
                return folder
        return None
