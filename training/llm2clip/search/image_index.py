"""The index on disk: embeddings as a `datasets` folder, with a faiss index and a manifest beside them."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.embedding_store import EMBEDDING, embedding_column
from llm2clip.search.vector_index import VectorIndexSettings, build_vector_index, read_vector_index, require_faiss
from llm2clip.utils.files import read_json, write_json
from modeling_llm2clip import __version__
from modeling_llm2clip.identity_llm2clip import is_earlier_rule

MANIFEST = "manifest.json"
VECTORS = "index.faiss"
FAILURES = "failures.json"
FORMAT_VERSION = 1
REBUILD = "build it again: add --overwrite to llm2clip index."
LIBRARIES = ("torch", "transformers", "datasets", "pillow")
ACCEPTED_EARLIER = (
    "was made by an earlier release. It fits by the rule of that release, which read 1,024 values of each weight and "
    "neither the settings of the vision tower nor the preprocessing; to be sure, build it again: add --overwrite to "
    "llm2clip index."
)

logger = logging.getLogger(__name__)


@dataclass
class IndexManifest:
    """The description of an index.

    Attributes:
        model: Hub id or absolute folder of the model.
        vision_fingerprint: Identity of its vision tower, projection and preprocessing; see [`vision_fingerprint`].
        source: Where the images are.
        index: Type and parameters of the faiss index.
        max_pixels: Largest image that was decoded, width x height.
        images: Number of images.
        failed: Number of files or rows that could not be embedded.
        versions: Versions of the libraries that wrote the index; None for a library that does not state one.
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
            FileNotFoundError: The folder contains no index.
            ValueError: The manifest has a later format, or is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            overwrite = " --overwrite" if folder.is_dir() and any(folder.iterdir()) else ""
            raise FileNotFoundError(
                f"there is no index in {folder} (no {MANIFEST}); create one: llm2clip index FOLDER --model MODEL "
                f"--output-dir {folder}{overwrite}"
            )
        try:
            fields = read_json(path)
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {fields['format_version']}, and this version reads {FORMAT_VERSION}")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the manifest of an index ({error}); {REBUILD}") from error

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        write_json(folder / MANIFEST, asdict(self))

    def require_model(self, folder: Path, embedder: ImageEmbedder, fingerprint: str) -> None:
        """Raise ValueError, with both models in the message, unless this is the model that wrote the index.

        Args:
            fingerprint: That of the embedder.
        """
        is_earlier = is_earlier_rule(self.vision_fingerprint)
        if is_earlier:
            fingerprint = embedder.earlier_fingerprint()
        if (self.vision_fingerprint, self.width) != (fingerprint, embedder.width):
            name = embedder.name
            raise ValueError(
                f"the index {folder} was made by {self.model} (width {self.width}, fingerprint "
                f"{self.vision_fingerprint}), but the model is {name} (width {embedder.width}, fingerprint "
                f"{fingerprint}): other weights, other settings of the vision tower or another preprocessing, and "
                f"embeddings of different models cannot be compared. Use {self.model} as it was, or make an index "
                f"with {name}: llm2clip index {self.source['path']} --model {name} --output-dir OTHER_FOLDER"
            )
        if is_earlier:
            logger.warning("The index %s %s", folder, ACCEPTED_EARLIER)


@dataclass
class ImageIndex:
    """An index that is open for searching.

    Attributes:
        rows: One row per image: `key`, the columns of the image set, and `embedding`.
        vectors: The faiss index of those rows.
    """

    folder: Path
    manifest: IndexManifest
    rows: datasets.Dataset
    vectors: Any

    @classmethod
    def open(cls, folder: str | Path) -> ImageIndex:
        """Open an index.

        Raises:
            FileNotFoundError: The folder contains no index.
            ValueError: The index is damaged.
        """
        folder = Path(folder)
        manifest = IndexManifest.read(folder)
        rows, vectors = read_rows(folder), read_vector_index(folder / VECTORS)
        shapes = {(len(rows), manifest.width), (vectors.ntotal, vectors.d)}
        if shapes != {(manifest.images, manifest.width)}:
            raise ValueError(
                f"the index {folder} is damaged: its manifest lists {manifest.images} images of width "
                f"{manifest.width}, but its data set has {len(rows)} and {VECTORS} {vectors.ntotal} of width "
                f"{vectors.d}; {REBUILD}"
            )
        return cls(folder, manifest, rows, vectors)

    def search(self, queries: np.ndarray, top: int) -> list[list[tuple[float, dict[str, Any]]]]:
        """Find the images that are nearest to each query.

        Args:
            queries: `(n, width)` unit vectors.
            top: Number of images per query.

        Returns:
            For each query, pairs of cosine similarity and row without its embedding, best first.
        """
        scores, numbers = self.vectors.search(np.ascontiguousarray(queries, dtype=np.float32), top)
        described = self.rows.remove_columns(EMBEDDING)
        return [
            [(float(score), described[int(number)]) for score, number in zip(*found, strict=True) if number >= 0]
            for found in zip(scores, numbers, strict=True)
        ]


def read_rows(folder: Path) -> datasets.Dataset:
    """Memory-map the data set of an index; raise ValueError if it is damaged."""
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise ValueError(f"the data set of the index {folder} cannot be read ({error}); {REBUILD}") from error
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
    """Write an index into an empty folder, and the versions of the libraries into its manifest.

    Args:
        described: One row per image, without embeddings.
        embeds: `(images, width)`, in the data type to store.
        failures: Key and reason of each file or row that could not be embedded.
    """
    rows = datasets.Dataset(described.append_column(EMBEDDING, embedding_column(embeds)))
    rows.save_to_disk(str(folder))
    faiss = require_faiss()
    faiss.write_index(build_vector_index(settings, embeds), str(folder / VECTORS))
    write_json(folder / FAILURES, failures)
    # faiss is published under several distribution names, so that importlib.metadata cannot look it up.
    own = {"llm2clip": __version__, "faiss": getattr(faiss, "__version__", None)}
    manifest.versions = own | {library: version(library) for library in LIBRARIES}
    manifest.write(folder)
