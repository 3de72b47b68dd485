"""An index on disk: a `datasets` folder of embeddings with a faiss index and a manifest beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.search.store import EMBEDDING, embedding_column
from llm2clip.search.vectors import (
    VectorIndexSettings,
    build_vector_index,
    read_vector_index,
    require_faiss,
    write_vector_index,
)
from llm2clip.utils.files import write_json
from modeling_llm2clip import __version__

MANIFEST = "manifest.json"
VECTORS = "index.faiss"
FAILURES = "failures.json"
FORMAT_VERSION = 1
LIBRARIES = ("torch", "transformers", "datasets", "pillow")


@dataclass
class IndexManifest:
    """What an index is.

    Attributes:
        model: Hub id or absolute folder of the model.
        revision: Its revision on the Hub.
        vision_fingerprint: Identity of its vision tower and projection.
        width: Length of an embedding.
        dtype: In which embeddings are stored.
        source: Where the images are.
        index: Type and settings of the faiss index.
        image_backend: How images were decoded and resized.
        max_pixels: Largest image that was decoded.
        images: Number of images.
        failed: Number of files or rows that could not be embedded.
        versions: Of the libraries that made it; None where one does not say.
        format_version: Of this layout.
    """

    model: str
    revision: str | None
    vision_fingerprint: str
    width: int
    dtype: str
    source: dict[str, Any]
    index: dict[str, Any]
    image_backend: str = "exact"
    max_pixels: int = DEFAULT_MAX_PIXELS
    images: int = 0
    failed: int = 0
    versions: dict[str, str | None] | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> IndexManifest:
        """Read the manifest of an index.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: It was written by a later version, or is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            anew = " --overwrite" if folder.is_dir() and any(folder.iterdir()) else ""
            raise FileNotFoundError(
                f"there is no index in {folder} (no {MANIFEST}); make one: llm2clip index FOLDER --model MODEL "
                f"--output-dir {folder}{anew}"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {fields['format_version']}, and this version reads {FORMAT_VERSION}")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no manifest of an index ({error}); make the index anew: add --overwrite to llm2clip index."
            ) from error

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        write_json(folder / MANIFEST, asdict(self))

    def require_model(self, folder: Path, name: str, fingerprint: str, width: int) -> None:
        """Refuse another model than the one that made the index.

        Raises:
            ValueError: It is another; the message names both.
        """
        if (self.vision_fingerprint, self.width) == (fingerprint, width):
            return
        raise ValueError(
            f"the index {folder} was made by {self.model} (width {self.width}, vision weights "
            f"{self.vision_fingerprint}), but the model is {name} (width {width}, vision weights {fingerprint}), "
            f"whose embeddings cannot be compared with those. Use {self.model}, or make an index with {name}: "
            f"llm2clip index {self.source['path']} --model {name} --output-dir OTHER_FOLDER"
        )


@dataclass
class ImageIndex:
    """An index that is open.

    Attributes:
        folder: Where it is.
        manifest: What it is.
        rows: One row per image: `key`, what it is known by, `embedding`.
        vectors: The faiss index over those rows.
    """

    folder: Path
    manifest: IndexManifest
    rows: datasets.Dataset
    vectors: Any

    @classmethod
    def open(cls, folder: str | Path) -> ImageIndex:
        """Open an index for searching.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged.
        """
        folder = Path(folder)
        manifest = IndexManifest.read(folder)
        rows, vectors = read_rows(folder), read_vector_index(folder / VECTORS)
        shapes = {(len(rows), manifest.width), (vectors.ntotal, vectors.d)}
        if shapes != {(manifest.images, manifest.width)}:
            raise ValueError(
                f"the index {folder} is damaged: its manifest says {manifest.images} images of width "
                f"{manifest.width}, its data set has {len(rows)} and {VECTORS} {vectors.ntotal} of width {vectors.d}; "
                "make it anew: add --overwrite to llm2clip index."
            )
        return cls(folder, manifest, rows, vectors)

    def search(self, queries: np.ndarray, top: int) -> list[list[tuple[float, dict[str, Any]]]]:
        """The images nearest to queries.

        Args:
            queries: `(n, width)` unit rows.
            top: How many for each.

        Returns:
            For each query its best images with their cosine, best first.

        Raises:
            ValueError: The queries have another width.
        """
        if queries.shape[1] != self.manifest.width:
            raise ValueError(
                f"the queries have width {queries.shape[1]}, but the index {self.folder} has {self.manifest.width}."
            )
        scores, numbers = self.vectors.search(np.ascontiguousarray(queries, dtype=np.float32), top)
        described = self.rows.remove_columns(EMBEDDING)
        return [
            [
                (float(score), described[int(number)])
                for score, number in zip(row_scores, row_numbers, strict=True)
                if number >= 0
            ]
            for row_scores, row_numbers in zip(scores, numbers, strict=True)
        ]


def read_rows(folder: Path) -> datasets.Dataset:
    """The data set of an index.

    Raises:
        ValueError: It is damaged.
    """
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"the data set of the index {folder} cannot be read ({error}); make it anew: add --overwrite to llm2clip "
            "index."
        ) from error
    assert isinstance(rows, datasets.Dataset)
    return rows


def write_index(
    folder: Path,
    manifest: IndexManifest,
    settings: VectorIndexSettings,
    described: pa.Table,
    embeds: np.ndarray,
    failures: list[dict[str, Any]],
) -> None:
    """Write an index into an empty folder.

    Args:
        folder: The folder.
        manifest: What it is.
        settings: Of the faiss index.
        described: A row per image, without its embedding.
        embeds: `(images, width)`, as they are to be stored.
        failures: What could not be embedded, and why.
    """
    rows = datasets.Dataset(described.append_column(EMBEDDING, embedding_column(embeds)))
    rows.save_to_disk(str(folder))
    write_vector_index(build_vector_index(settings, embeds), folder / VECTORS)
    write_json(folder / FAILURES, failures)
    # faiss comes under several names of distributions.
    own = {"llm2clip": __version__, "faiss": getattr(require_faiss(), "__version__", None)}
    manifest.versions = own | {library: version(library) for library in LIBRARIES}
    manifest.write(folder)
