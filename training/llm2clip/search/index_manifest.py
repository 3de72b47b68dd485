"""The description of an index: which model made it of which images, and what it consists of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

from llm2clip.command_line.settings import build_config
from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.encoders import Encoder
from modeling_llm2clip import __version__

FORMAT_VERSION = 3
REBUILD = "build it again: add --overwrite to llm2clip index."
# What damaged or lost tables are made of again.
REPAIR = "run the same llm2clip index again, which makes the table again from the stored embeddings."
LIBRARIES = ("torch", "transformers", "datasets", "pillow")
# What must be equal for a run to continue an index.
SAME = ("embed", "source", "stored_dtype", "image_backend")
# What must be equal for a search to go on with the index that has replaced the one which it has opened.
SAME_ROWS = ("image_fingerprint", "text_fingerprint", "width", *SAME, "metadata_columns")
# What may differ between indexes that find the same.
UNIMPORTANT = ("versions", "stored", "identity", "rows", "asked")

Embed: TypeAlias = Literal["image", "caption"]


@dataclass
class IndexManifest:
    """The description of an index.

    Attributes:
        model: What [`load_encoder`] opens: Hub id or absolute folder of the model, or another name of one.
        image_fingerprint: Identity of what its embeddings of images depend on; see [`Encoder.image_fingerprint`]. None
            if it embeds only texts.
        embed: What is embedded, image or caption.
        text_fingerprint: The same of texts, in an index of captions.
        identity: Library, version, commit or fingerprint, and dtype of the model; see [`Encoder.identity`].
        source: Where the images are.
        index: Type and parameters of the vector index.
        rows, listing: Names of the stored embeddings and of the list of rows that the table is made of, in the local
            folder of the index; see [`rows_folder`].
        asked: How the user named the model.
        metadata_columns: Columns of the data set that are stored with each row.
        max_pixels: Largest image that was decoded, width x height.
        images: Number of images or captions.
        failures: Key and reason of each file or row that could not be embedded.
        stored: What the store needs in order to find the rows.
        versions: Versions of the libraries that wrote the index.
    """

    model: str
    revision: str | None
    image_fingerprint: str | None
    width: int
    stored_dtype: str
    source: dict[str, Any]
    index: dict[str, Any]
    metadata_columns: list[str] = field(default_factory=list)
    image_backend: str = "exact"
    max_pixels: int = DEFAULT_MAX_PIXELS
    images: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] | None = None
    embed: Embed = "image"
    text_fingerprint: str | None = None
    identity: dict[str, str] = field(default_factory=dict)
    rows: str = "rows"
    listing: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_fields(cls, location: str, fields: dict[str, Any]) -> IndexManifest:
        """Build a manifest from JSON.

        Raises:
            ValueError: It has another format; the message names `location`.
        """
        try:
            if fields.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"its format is {fields.get('format_version')}, and this version reads {FORMAT_VERSION}"
                )
            return build_config(cls, fields, "it")
        except ValueError as error:
            raise ValueError(f"{location} is not the manifest of an index ({error}); {REBUILD}") from error

    def record_versions(self, **databases: str) -> None:
        """Write down the versions of this package, of the libraries, and of `databases`."""
        self.versions = {"llm2clip": __version__, **databases, **{library: version(library) for library in LIBRARIES}}

    def content(self) -> dict[str, Any]:
        """Everything but what is `UNIMPORTANT`."""
        return {name: value for name, value in asdict(self).items() if name not in UNIMPORTANT}

    def require_successor(self, location: str, other: IndexManifest | None) -> IndexManifest:
        """Return the manifest of an index that has replaced this one, which is open.

        Raises:
            ValueError: There is none, or queries and results of this one are none of it.
        """
        if other is None or any(getattr(self, name) != getattr(other, name) for name in SAME_ROWS):
            raise ValueError(f"the index {location} was replaced since it was opened; open it again.")
        return other

    def require_model(self, location: str, encoder: Encoder, needs: Collection[str]) -> None:
        """Raise ValueError, with both models in the message, unless this is the model that wrote the index.

        Args:
            location: Name of the index in the message.
            needs: What the model is asked to embed: `image`, `text` or both. Texts are compared in an index of
                captions, and what the index does not know is not.
        """
        sides = {
            "image": (self.image_fingerprint, encoder.image_fingerprint),
            "text": (self.text_fingerprint, encoder.text_fingerprint),
        }
        if encoder.width != self.width:
            raise ValueError(
                f"embeddings of {encoder.name} have {encoder.width} values, and those of the index {location}, which "
                f"{self.model} made, have {self.width}; if that is the same model, add --truncate-dim {self.width}."
            )
        for need in sorted(needs):
            recorded, fingerprint = sides[need]
            if recorded is None or recorded == (given := fingerprint()):
                continue
            parts = "another preprocessing" if need == "image" else "another LLM, tokenizer or adapter"
            raise ValueError(
                f"the index {location} was made by {self.model} (width {self.width}, fingerprint {recorded}), but the "
                f"model is {encoder.name} (width {encoder.full_width}, fingerprint {given}): other weights, "
                f"{parts}, or an index of an earlier version of llm2clip; embeddings of different models cannot be "
                f"compared. Use {self.model} as it was, or run llm2clip index with --model {encoder.name} and another "
                "--output-dir or --table."
            )

    def require_same(self, location: str, other: IndexManifest) -> None:
        """Raise ValueError if the source, the data type or the decoding of another manifest differ."""
        for name in SAME:
            there, here = getattr(self, name), getattr(other, name)
            if there != here:
                raise ValueError(
                    f"the index {location} was built with {name} {_printable(there)}, not {_printable(here)}; "
                    "choose another --output-dir or --table, or add --overwrite to build it again."
                )


def _printable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_printable(entry)}" for key, entry in value.items() if entry)
    return (", ".join(value) or "none") if isinstance(value, list) else value
