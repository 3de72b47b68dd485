"""The description of an index: which model made it of which images, and what it consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.encoders import Encoder
from llm2clip.utils.settings import build_config
from modeling_llm2clip import __version__

FORMAT_VERSION = 2
REBUILD = "build it again: add --overwrite to llm2clip index."
LIBRARIES = ("torch", "transformers", "datasets", "pillow")
# What must be equal for a run to continue an index.
SAME = ("embed", "source", "dtype", "image_backend", "metadata_columns")


Embed: TypeAlias = Literal["image", "caption"]


# Types of what stores record.
STORED: dict[str, type] = {"version": int, "trained": int, "faiss": str, "columns": dict}


@dataclass
class IndexManifest:
    """The description of an index.

    Attributes:
        model: Hub id or absolute folder of the model.
        vision_fingerprint: Identity of its vision tower, projection and preprocessing; see [`vision_fingerprint`].
        embed: What is embedded, image or caption.
        text_fingerprint: In an index of captions, identity of the model's LLM, tokenizer and adapter; see
            [`OurEncoder.text_fingerprint`].
        source: Where the images are.
        index: Type and parameters of the vector index.
        metadata_columns: Columns of the data set that are stored with each row.
        max_pixels: Largest image that was decoded, width x height.
        images: Number of images or captions.
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
    embed: Embed = "image"
    text_fingerprint: str | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_fields(cls, place: str, fields: dict[str, Any], is_unfinished: bool = False) -> IndexManifest:
        """Build a manifest from JSON.

        Args:
            is_unfinished: It is that of an unfinished run, which has no vector index yet.

        Raises:
            ValueError: It has another format, or is damaged; the message names `place`.
        """
        try:
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {fields['format_version']}, and this version reads {FORMAT_VERSION}")
            manifest = build_config(cls, fields, "it")
            _require_entries("source", manifest.source, {"kind": str, "path": str})
            kinds: dict[str, type] = {} if is_unfinished and "type" not in manifest.index else {"type": str}
            kinds |= {name: int for name, value in manifest.index.items() if name != "type" and value is not None}
            _require_entries("index", manifest.index, kinds)
            found = manifest.stored
            _require_entries("stored", found, {name: kind for name, kind in STORED.items() if name in found})
            return manifest
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place} is not the manifest of an index ({error}); {REBUILD}") from error

    def as_fields(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    def record_versions(self, **own: str) -> None:
        """Write down the versions of this package, of the libraries, and of those in `own`."""
        self.versions = {"llm2clip": __version__, **own, **{library: version(library) for library in LIBRARIES}}

    @property
    def has_images(self) -> bool:
        """Whether the rows have images: all but captions of a source without."""
        return self.source["kind"] == "folder" or self.source.get("image_column") is not None

    def content(self) -> dict[str, Any]:
        """Everything but what changes whenever an index is written."""
        return self.as_fields() | {"versions": None, "stored": None}

    def require_model(
        self, place: str, encoder: Encoder, fingerprint: str, text_fingerprint: str | None = None
    ) -> None:
        """Raise ValueError, with both models in the message, unless this is the model that wrote the index.

        Args:
            place: Name of the index in the message.
            fingerprint, text_fingerprint: Those of the encoder; None where its texts are not compared.
        """
        name = encoder.name
        if (self.vision_fingerprint, self.width) != (fingerprint, encoder.width):
            prints: tuple[str | None, ...] = (self.vision_fingerprint, fingerprint)
            parts = "other settings of the vision tower or another preprocessing"
        elif None not in (self.text_fingerprint, text_fingerprint) and self.text_fingerprint != text_fingerprint:
            prints, parts = (self.text_fingerprint, text_fingerprint), "another LLM, tokenizer or adapter"
        else:
            return
        raise ValueError(
            f"the index {place} was made by {self.model} (width {self.width}, fingerprint {prints[0]}), but the model "
            f"is {name} (width {encoder.width}, fingerprint {prints[1]}): other weights, {parts}, and embeddings of "
            f"different models cannot be compared. Use {self.model} as it was, or make an index with {name}: llm2clip "
            f"index {self.source['path']} --model {name} --output-dir OTHER_FOLDER (or --table OTHER)."
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


def _require_entries(name: str, fields: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        value = fields.get(key)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} has {key} {value!r:.80}")


def _printable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_printable(entry)}" for key, entry in value.items() if entry)
    return (", ".join(value) or "none") if isinstance(value, list) else value
