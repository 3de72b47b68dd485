"""The manifest of stored rows: who made them of what, how many there are, and the checksum of their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import transformers

from llm2clip.files.atomic import write_json
from llm2clip.files.manifests import read_checked, with_checksum
from llm2clip.files.remote_path import AnyPath, RemotePath

FORMAT, VERSION = "llm2clip-store", 1
ROWS_SUFFIX, MANIFEST_SUFFIX = ".safetensors", ".manifest"
PathT = TypeVar("PathT", Path, RemotePath, AnyPath)
StoredDtype = Literal["float16", "bfloat16", "float32"]


class StoreError(ValueError):
    """A store cannot be used."""


class StoreMismatchError(StoreError):
    """A store was made by another encoder, or of other data."""


class StoreIncompleteError(StoreError):
    """A store was not built to the end."""


class StoreDamagedError(StoreError):
    """A file of a store is missing, truncated or changed."""


class MissingCaptionError(KeyError):
    """Captions have no stored embedding."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print its message in quotes


class Kind(NamedTuple):
    """Words of messages: the name of a store, what a row belongs to, and how missing rows are computed."""

    name: str
    unit: str
    remedy: str


KINDS = {
    "captions": Kind("embedding cache", "caption", "run `llm2clip embed` again"),
    "features": Kind("image feature cache", "image", "start the training again"),
    "evaluation": Kind("evaluation store", "row", "run `llm2clip evaluate` again"),
    "images": Kind("store of an index of images", "image", "run the same `llm2clip index` again"),
    "texts": Kind("store of an index of captions", "caption", "run the same `llm2clip index` again"),
    "background": Kind("store of everyday captions", "caption", "search again with --relevant"),
    "teacher": Kind("store of a teacher's rows", "row", "start the distillation again"),
}


@dataclass(frozen=True)
class SourceFile:
    """The file of a data set that the rows of a shard were computed from, if they lie beside it.

    Attributes:
        name: Its name.
        bytes, checksum: Its size, and the SHA-256 of its captions; of a remote one what its file system states, or
            None.
        rows: Rows of the file, or of its part.
        columns: Columns that were read.
        part: The fields of [`RowRange`](llm2clip.data.parquet.RowRange) if these are the rows of a part of it.
        path: Path or URL if the shard is in another folder, where another source could have a file of this name.
    """

    name: str
    bytes: int
    checksum: str | None
    rows: int
    columns: list[str]
    part: dict[str, int] | None = None
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The content of `NAME.manifest`, which is written after `NAME.safetensors`.

    Attributes:
        kind: What is stored, one of `KINDS`.
        encoder: Name of the model that computed the rows, for messages.
        identity: Everything that a row depends on; a store is only continued by a run that agrees in all of it.
        dtype: The dtype that rows are stored in.
        transformers_version: The version of transformers that computed them.
        width, rows: Shape of the rows; a width of 0 is not known yet.
        bytes, checksum: Size and SHA-256 of `NAME.safetensors`.
        counts: What was counted while the rows were computed, such as `truncated` captions.
        skipped: Row number, key and reason of rows that could not be computed, which are zero.
        source: The file that the rows were computed from.
        shards: Of an index: rows, bytes and checksum of each shard, by name, in the order of rows.
    """

    kind: str
    encoder: str
    identity: Mapping[str, Any]
    dtype: StoredDtype = "float16"
    transformers_version: str = transformers.__version__
    width: int = 0
    rows: int = 0
    bytes: int = 0
    checksum: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: Sequence[Sequence[Any]] = ()
    source: SourceFile | None = None
    shards: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identity of the weights that computed the rows."""
        return str(self.identity["fingerprint"])

    @property
    def about(self) -> Kind:
        """The words of messages."""
        return KINDS[self.kind]

    def write(self, path: AnyPath) -> None:
        """Write the manifest, after its rows."""
        write_json(path, with_checksum({"format": FORMAT, "format_version": VERSION, **asdict(self)}))

    @classmethod
    def read(cls, path: AnyPath) -> StoreManifest:
        """Read a manifest.

        Raises:
            FileNotFoundError: There is none.
            StoreDamagedError: It cannot be read, or has changed since it was written.
            StoreError: It has another format or version.
        """
        advice = f"delete {path.name} and run the command that wrote it again, which only computes what is missing"
        try:
            values = read_checked(path)
        except ValueError as error:
            raise StoreDamagedError(f"{str(error).rstrip('.')}; {advice}.") from error
        if (stated := (values.get("format"), values.get("format_version"))) != (FORMAT, VERSION):
            raise StoreError(
                f"{path} has format {stated[0]!r}, version {stated[1]!r}, but this version of llm2clip reads "
                f"{FORMAT!r}, version {VERSION}; compute it again, into another folder."
            )
        if values.get("kind") not in KINDS:
            raise StoreDamagedError(f"{path} has changed since it was written; {advice}.")
        known = {name: values[name] for name in (entry.name for entry in fields(cls))}
        if known["source"] is not None:
            source = known["source"]
            known["source"] = SourceFile(**{entry.name: source.get(entry.name) for entry in fields(SourceFile)})
        return cls(**known)

    def require_same(
        self,
        wanted: StoreManifest,
        path: AnyPath,
        advice: str = "Choose another folder, or delete what is there to start again.",
    ) -> None:
        """Raise a `StoreMismatchError` if the rows at a path are not what a run, with another manifest, computes."""
        if (difference := self.difference(wanted)) is not None:
            name, stored, new = difference
            raise StoreMismatchError(
                f"{path} was made by {self.encoder} with {name} {stored!r}, but this run has {name} {new!r} "
                f"({wanted.encoder}). {advice}"
            )

    def difference(self, other: StoreManifest) -> tuple[str, Any, Any] | None:
        """Return the first thing that rows depend on in which another manifest differs: its name and both values."""
        own = {"kind": self.kind, **self.identity, "dtype": self.dtype}
        others = {"kind": other.kind, **other.identity, "dtype": other.dtype}
        if self.width and other.width:
            own["width"], others["width"] = self.width, other.width
        for name in dict.fromkeys([*own, *others]):
            if (name in own, own.get(name)) != (name in others, others.get(name)):
                return name, own.get(name), others.get(name)
        return None


def manifest_path(rows: PathT) -> PathT:
    """Return the path of the manifest of `NAME.safetensors`."""
    return rows.with_name(rows.name.removesuffix(ROWS_SUFFIX) + MANIFEST_SUFFIX)


def rows_path(manifest: PathT) -> PathT:
    """Return the path of the rows of `NAME.manifest`."""
    return manifest.with_name(manifest.name.removesuffix(MANIFEST_SUFFIX) + ROWS_SUFFIX)


def caption_manifest(
    text_model: str,
    fingerprint: str,
    *,
    width: int,
    pooling: str,
    prompt_prefix: str,
    prompt_suffix: str,
    max_length: int,
    tokenizer_fingerprint: str | None = None,
    text_model_dtype: str = "float32",
    dtype: StoredDtype = "float16",
    normalize: bool = False,
) -> StoreManifest:
    """Describe the embeddings of captions by a text encoder.

    Args:
        text_model: Name of the text encoder in messages.
        fingerprint, tokenizer_fingerprint: Identity of its weights and of its tokenizer; None: any is accepted.
        width: Of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How it reads a caption; the prefix has an instruction too.
        text_model_dtype: The dtype that it computes in.
        dtype, normalize: The stored dtype, and whether embeddings have unit length.
    """
    identity = {
        "fingerprint": fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "pooling": pooling,
        "prompt_prefix": prompt_prefix,
        "prompt_suffix": prompt_suffix,
        "max_length": max_length,
        "text_model_dtype": text_model_dtype,
        "normalize": normalize,
    }
    return StoreManifest(kind="captions", encoder=text_model, identity=identity, dtype=dtype, width=width)
