"""What a benchmark is: where its files lie, its published counts, its reader and the protocol that measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.evaluation.contracts import BenchmarkProtocol
from llm2clip.utils.logs import shortened

GROUPS = ("short", "long", "languages", "classification", "composition", "dense", "paper")


class BenchmarkError(ValueError):
    """The files of a benchmark are not what was published: other counts, a row without its image, a broken row."""


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
        read_train: Reads the train images too, for the linear probes of the set, which have the names
            `NAME-probe-sgd`, `NAME-probe-lbfgs` and `NAME-probe-openai`; None if it has no train images.
        train_needs: What else has to be there for those, as `needs`.
    """

    name: str
    title: str
    groups: tuple[Literal["short", "long", "languages", "classification", "composition", "dense", "paper"], ...] = ()
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

    def describe(self, folder: Path) -> dict[str, Any]:
        """Return what a result says of the data that was found in a folder, besides its checksum."""
        return {"folder": str(folder)}
