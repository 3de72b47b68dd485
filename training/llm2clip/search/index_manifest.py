"""The description of an index: which model made it of which images, and what it consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.embedding.image_embedder import ImageEmbedder
from modeling_llm2clip import __version__

FORMAT_VERSION = 2
REBUILD = "build it again: add --overwrite to llm2clip index."
LIBRARIES = ("torch", "transformers", "datasets", "pillow")
# What must be equal for a run to continue an index.
SAME = ("source", "dtype", "image_backend", "metadata_columns")


@dataclass
class IndexManifest:
    """The description of an index.

    Attributes:
        model: Hub id or absolute folder of the model.
        vision_fingerprint: Identity of its vision tower, projection and preprocessing; see [`vision_fingerprint`].
        source: Where the images are.
        index: Type and parameters of the vector index.
        metadata_columns: Columns of the data set that are stored with each row.
        max_pixels: Largest image that was decoded, width x height.
        images: Number of images.
        failed: Number of files or rows that could not be embedded.
        stored: What the store needs in order to find the rows.
        versions: Versions of the libraries that wrote the index.
    """

    model: str
    revision: str | None
    vision_fingerprint: str
    width: int
    dtype: str
    source: dict[str, Any]
    index: dict[str, Any]
    metadata_columns: list[str] = field(default_factory=list)
    image_backend: str = "exact"
    max_pixels: int = DEFAULT_MAX_PIXELS
    images: int = 0
    failed: int = 0
    stored: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_fields(cls, place: str, fields: dict[str, Any]) -> IndexManifest:
        """Build a manifest from JSON.

        Raises:
            ValueError: It has another format, or is damaged; the message names `place`.
        """
        try:
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {fields['format_version']}, and this version reads {FORMAT_VERSION}")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place} is not the manifest of an index ({error}); {REBUILD}") from error

    def as_fields(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    def record_versions(self, **own: str) -> None:
        """Write down the versions of this package, of the libraries, and of those in `own`."""
        self.versions = {"llm2clip": __version__, **own, **{library: version(library) for library in LIBRARIES}}

    def content(self) -> dict[str, Any]:
        """Everything but what changes whenever an index is written."""
        return self.as_fields() | {"versions": None, "stored": None}

    def require_model(self, place: str, embedder: ImageEmbedder, fingerprint: str) -> None:
        """Raise ValueError, with both models in the message, unless this is the model that wrote the index.

        Args:
            place: Name of the index in the message.
            fingerprint: That of the embedder.
        """
        if (self.vision_fingerprint, self.width) != (fingerprint, embedder.width):
            name = embedder.name
            raise ValueError(
                f"the index {place} was made by {self.model} (width {self.width}, fingerprint "
                f"{self.vision_fingerprint}), but the model is {name} (width {embedder.width}, fingerprint "
                f"{fingerprint}): other weights, other settings of the vision tower or another preprocessing, and "
                f"embeddings of different models cannot be compared. Use {self.model} as it was, or make an index "
                f"with {name}: llm2clip index {self.source['path']} --model {name} --output-dir OTHER_FOLDER "
                "(or --table OTHER)."
            )

    def require_same(self, place: str, other: IndexManifest) -> None:
        """Raise ValueError if the source, the data type, the decoding or the columns of another manifest differ."""
        for name in SAME:
            there, here = getattr(self, name), getattr(other, name)
            if there != here:
                raise ValueError(
                    f"the index {place} was built with {name} {_printable(there)}, not {_printable(here)}; choose "
                    "another --output-dir or --table, or add --overwrite to build it again."
                )


def _printable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items() if entry)
    return (", ".join(value) or "none") if isinstance(value, list) else value
