"""Image vectors that exist: of an index, a Store, `.npy` with keys (clip-retrieval has these too), or parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, json, parquet
from torch import Tensor

from llm2clip.files.atomic import read_json
from llm2clip.store import Store
from llm2clip.store.store import caption_keys

KEY, CAPTION, VECTORS = ("key", "image_path"), "caption", ("vector", "embedding")
READERS = {".parquet": parquet.read_table, ".csv": csv.read_csv, ".jsonl": json.read_json}
FORMS = (
    "an index, a Store, a .npy file with its keys in a .parquet, .csv, .jsonl or .txt of the same name, a folder of "
    "clip-retrieval (img_emb/, metadata/), or parquet with the columns key and vector"
)


class Rows(Protocol):
    """Rows of numbers, by their places."""

    def read(self, rows: np.ndarray) -> Tensor:
        """Return float32 `(rows, width)`."""
        ...


@dataclass
class ImageVectors:
    """Image vectors and what is known of them.

    Attributes:
        name: Where they are.
        width: Values of each.
        rows: Reads them.
        keys: The key of each; None in a Store, which finds their hashes.
        places: The number in `rows` of each key; None if they are in its order.
        captions: The captions that are stored beside them: keys and texts.
        image_fingerprint: Identity of the model that made them; None where it is not known.
    """

    name: str
    width: int
    rows: Rows
    keys: list[str] | None = None
    places: np.ndarray | None = None
    captions: tuple[list[str], list[str]] | None = None
    image_fingerprint: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> ImageVectors:
        """Open image vectors; see `FORMS`.

        Raises:
            FileNotFoundError: There is nothing of these forms.
            ValueError: Keys and vectors do not belong together, or the index is one of captions.
        """
        path = Path(path)
        if (path / "manifest.json").is_file():
            return _of_index(path)
        if (path / "img_emb").is_dir():
            return _of_clip_retrieval(path)
        if path.suffix == ".npy" and path.is_file():
            tables = [path.with_suffix(suffix) for suffix in (*READERS, ".txt") if path.with_suffix(suffix).is_file()]
            if not tables:
                raise FileNotFoundError(f"{path} has no keys: put them into {path.with_suffix('.txt')}, one a line.")
            return _of_arrays(path, [path], tables[:1])
        parts = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
        if parts and all(part.is_file() for part in parts):
            return _of_parquet(path, parts)
        if path.is_dir():
            store = Store.open(path)
            fingerprint = store.manifest.identity.get("image_fingerprint")
            return cls(str(path), store.width, _Stored(store), image_fingerprint=fingerprint)
        raise FileNotFoundError(f"there are no image vectors in {path}; give {FORMS}.")

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the numbers of the rows of some keys.

        Raises:
            ValueError: None of them is there.
        """
        if self.keys is None:
            found = self.rows.store.find(caption_keys(keys))  # type: ignore[attr-defined]
        else:
            numbers = {key: number for number, key in enumerate(self.keys)}
            found = np.array([numbers.get(key, -1) for key in keys], np.int64)
            found = found if self.places is None else np.where(found < 0, -1, self.places[found])
        if not (found >= 0).any():
            own = "" if self.keys is None else f", which has keys such as {self.keys[0]}"
            raise ValueError(f"the pairs have keys such as {keys[0]}, but none of them is in {self.name}{own}.")
        return found


@dataclass
class _Stored:
    store: Store

    def read(self, rows: np.ndarray) -> Tensor:
        return self.store.read(rows, torch.float32)


@dataclass
class _Arrays:
    """Arrays, which may be mapped into memory, one after the other."""

    arrays: list[np.ndarray]

    def read(self, rows: np.ndarray) -> Tensor:
        ends = np.cumsum([len(array) for array in self.arrays])
        result = np.empty((len(rows), self.arrays[0].shape[1]), np.float32)
        part = np.searchsorted(ends, rows, side="right")
        for number in np.unique(part).tolist():
            chosen = part == number
            result[chosen] = self.arrays[number][rows[chosen] - (ends[number] - len(self.arrays[number]))]
        return torch.from_numpy(result)


def read_pairs(path: str | Path) -> tuple[list[str], list[str]]:
    """Read keys of images and captions: a table with the columns `key` and `caption`, a text or a list of texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no table with these columns.
    """
    pairs = _captions(_table(Path(path)))
    if pairs is None:
        raise ValueError(f"{path} needs the columns key and {CAPTION}.")
    return pairs


def _table(path: Path) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix == ".txt":
        return pa.table({"key": path.read_text(encoding="utf-8").splitlines()})
    if path.suffix not in READERS:
        raise ValueError(f"{path} is no table; give a file in {', '.join(READERS)}.")
    return READERS[path.suffix](path)


def _captions(table: pa.Table) -> tuple[list[str], list[str]] | None:
    """Return the captions of a table and the key of each; None if it has none."""
    if CAPTION not in table.column_names or not set(KEY) & set(table.column_names):
        return None
    keys, texts = list[str](), list[str]()
    for key, entry in zip(_keys(table, ""), table[CAPTION].to_pylist(), strict=True):
        found = [text.strip() for text in (entry if isinstance(entry, list) else [entry or ""])]
        keys += [key] * sum(map(bool, found))
        texts += filter(None, found)
    return keys, texts


def _keys(table: pa.Table, name: Any) -> list[str]:
    column = next((column for column in KEY if column in table.column_names), None)
    if column is None:
        raise ValueError(f"{name} needs the column key; it has {', '.join(table.column_names)}.")
    return [str(key) for key in table[column].to_pylist()]


def _with_table(name: Path, rows: Rows, width: int, count: int, table: pa.Table) -> ImageVectors:
    keys = _keys(table, name)
    if len(keys) != count:
        raise ValueError(f"{name} has {count} vectors, but {len(keys)} keys; key i is that of vector i.")
    return ImageVectors(str(name), width, rows, keys, captions=_captions(table))


def _of_arrays(name: Path, arrays: list[Path], tables: list[Path]) -> ImageVectors:
    opened = [np.load(path, mmap_mode="r") for path in arrays]
    if any(array.ndim != 2 or array.shape[1] != opened[0].shape[1] for array in opened):
        raise ValueError(f"{name} has to have rows of one width, and has {[array.shape for array in opened]}.")
    table = pa.concat_tables([_table(path) for path in tables], promote_options="permissive")
    return _with_table(name, _Arrays(opened), opened[0].shape[1], sum(map(len, opened)), table)


def _of_clip_retrieval(path: Path) -> ImageVectors:
    """Open what `clip-retrieval inference` wrote: `img_emb/img_emb_0.npy`, `metadata/metadata_0.parquet`, ..."""

    def numbered(folder: str, suffix: str) -> list[Path]:
        return sorted((path / folder).glob(f"*{suffix}"), key=lambda file: int(re.findall(r"\d+", file.stem)[-1]))

    arrays, tables = numbered("img_emb", ".npy"), numbered("metadata", ".parquet")
    if not arrays or len(arrays) != len(tables):
        raise ValueError(
            f"{path} has {len(arrays)} files in img_emb/ and {len(tables)} in metadata/; each needs the other."
        )
    return _of_arrays(path, arrays, tables)


def _of_parquet(path: Path, parts: list[Path]) -> ImageVectors:
    table = pa.concat_tables([parquet.read_table(part) for part in parts], promote_options="permissive")
    column = next((column for column in VECTORS if column in table.column_names), None)
    if column is None:
        raise ValueError(f"{path} needs a column vector; it has {', '.join(table.column_names)}.")
    rows = np.stack([np.asarray(row, np.float32) for row in table[column].to_pylist()])
    return _with_table(path, _Arrays([rows]), rows.shape[1], len(rows), table)


def _of_index(path: Path) -> ImageVectors:
    """Open the stored embeddings of an index and its list of rows."""
    manifest = read_json(path / "manifest.json")
    if manifest["embed"] != "image":
        raise ValueError(f"the index {path} is one of captions; give one of images.")
    with pa.ipc.open_file(path / manifest["listing"]) as file:
        table = file.read_all()
    store = Store.open(path / manifest["rows"])
    digests = np.frombuffer(b"".join(table["_digest"].to_pylist()), dtype="<i8").reshape(-1, 2)
    places = store.find(digests.astype(np.int64))
    places[np.isin(places, [row for row, *_ in store.manifest.skipped])] = -1  # images that could not be embedded
    return ImageVectors(
        str(path),
        manifest["width"],
        _Stored(store),
        _keys(table, path),
        places,
        _captions(table),
        manifest["image_fingerprint"],
    )
