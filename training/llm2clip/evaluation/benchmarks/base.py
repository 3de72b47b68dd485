"""What a benchmark is: where its files lie, its published counts, its reader and the protocol that measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llm2clip.embedding.image_batches import ContentSet

GROUPS = ("short", "long", "languages", "classification", "composition", "dense", "paper")


class BenchmarkError(ValueError):
    """The files of a benchmark are not what was published: other counts, a row without its image, a broken row."""


class Encoder(Protocol):
    """A model of images and texts in one space, whatever library it is from.

    Attributes:
        name: How the user named it.
        width: Width of its embeddings.
        device: Where it computes.
    """

    name: str
    width: int
    device: torch.device

    def identity(self) -> dict[str, str]:
        """What a result says of the model: library, name, commit on the Hub or checksum of the weights, dtype."""
        ...

    def fingerprint(self) -> str:
        """Identify weights, preprocessing and tokenizer; stored embeddings are bound to it."""
        ...

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        """Prepare the inputs of one decoded RGB image; runs in worker processes."""
        ...

    def forward_images(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embed a batch of prepared images: unit rows, float32 `(images, width)` on the CPU."""
        ...

    def forward_features(self, inputs: dict[str, Tensor], projected: bool = False) -> Tensor:
        """Pooled features before the projection, float32 `(images, hidden)` on the CPU, for linear probes.

        With `projected`, those after it, `(images, width)`: embeddings before they are scaled to unit length.
        """
        ...

    def prepare_pixels(self, image: Any) -> dict[str, Tensor]:
        """Prepare a decoded RGB image of any size without resizing or cropping it: `pixel_values`, `(3, H, W)`."""
        ...

    def forward_patches(self, inputs: dict[str, Tensor]) -> Tensor:
        """Patch embeddings in the shared space after MaskCLIP, unit rows, float32 `(images, rows, columns, width)`.

        The images have any size; their rows and columns are rounded up to whole patches.

        Raises:
            ValueError: The vision tower has no patches that MaskCLIP could embed.
        """
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: unit rows, float32 `(texts, width)` on the CPU."""
        ...

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, `(texts,)` int64, and whether it is cut, `(texts,)` bool."""
        ...


class Session(Protocol):
    """A model at work on benchmarks: its embeddings of images and texts, each computed once and stored.

    Several processes share the work, and each gets all rows.

    Attributes:
        encoder: The model.
        num_workers: Worker processes that decode images; 0 for none.
    """

    encoder: Encoder
    num_workers: int

    def embed_images(self, images: ContentSet) -> Tensor:
        """Embed images: unit rows, float32 `(images, width)` on the CPU, in their order."""
        ...

    def embed_features(self, images: ContentSet, projected: bool = False) -> Tensor:
        """Compute the features of `Encoder.forward_features`, `(images, hidden)`, or projected `(images, width)`."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, in the text format of the session: unit rows, float32 `(texts, width)`, repeats included."""
        ...

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same as that of [`Encoder`], for texts in the text format of the session."""
        ...


@dataclass
class Measurement:
    """What a protocol found.

    Attributes:
        protocol: Name and options of the protocol. Scores of two results may be compared if these are equal.
        scores: The scores, 0 to 1, in the order in which they are printed; the first is the one that is compared.
        values: The value of each query, `(queries,)`, whose mean is the score of that name, for bootstrap intervals.
        strata: The part that each value belongs to, `(queries,)` int64, if the score is the mean over parts of their
            means, as over languages or classes; the bootstrap then draws within parts.
        counts: Numbers of images, texts, queries, tied queries, truncated texts and the like.
        groups: Scores of parts by kind and part, such as `{"language": {"de": {"text_to_image_recall@1": 0.5}}}`.
    """

    protocol: dict[str, Any]
    scores: dict[str, float]
    values: dict[str, Tensor] = field(default_factory=dict)
    strata: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


class BenchmarkProtocol(Protocol):
    """How a benchmark is measured."""

    def measure(self, session: Session, data: Any) -> Measurement:
        """Measure a model on the data of a benchmark."""
        ...


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


def check_counts(title: str, found: Mapping[str, int], published: Mapping[str, int], allow: bool) -> list[str]:
    """Compare the counts of a reader with the published ones.

    Args:
        allow: Return the differences instead of raising.

    Returns:
        The differences in words; empty if there are none.

    Raises:
        BenchmarkError: A count differs.
    """
    differences = [
        f"{found.get(name, 0):,} {name} instead of {count:,}"
        for name, count in published.items()
        if found.get(name, 0) != count
    ]
    if differences and not allow:
        raise BenchmarkError(
            f"{title} has {', '.join(differences)}: its numbers could not be compared with published ones. "
            "With --allow-counts it is measured all the same, and the result says so."
        )
    return differences
