"""Building an index and bringing it up to date: stored embeddings of what there is, and a table that is made of them.

In the local folder of an index are a [`Store`] of embeddings, by the content of each image or caption, and a list of
the rows. Both grow while the table that searches read stays as it is, and outlive a kill. The table is made of them.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm2clip.command_line.processes import worker_count
from llm2clip.command_line.progress import ProgressBar
from llm2clip.encoders import Encoder
from llm2clip.encoders.ours import OurEncoder
from llm2clip.files.atomic import remove_unfinished
from llm2clip.files.locks import LOCK, folder_lock
from llm2clip.search.folder_items import CHANGED, Items
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IMAGES_AT_ONCE, IndexSettings
from llm2clip.search.listing import PATTERN, Listing, store_keys
from llm2clip.search.location import rows_folder
from llm2clip.search.store import DIGEST, KEY, VECTOR, IndexStore
from llm2clip.store import Store, StoreError, StoreManifest, build_store
from llm2clip.store.building import drop_rows
from llm2clip.store.manifest import MANIFEST_SUFFIX
from llm2clip.store.shards import ComputedRows
from llm2clip.store.store import KeyIndex
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

logger = logging.getLogger(__name__)

MAX_NAMED = 20
# Names of the stored embeddings: those of a run that overwrites an index are beside those of the index.
STORES = ("rows", "rows-2")
# Share of stored embeddings that belong to no row any more, from which on they are dropped. The folder is at most a
# third larger than it has to be, and an image that comes back soon is not embedded again.
UNUSED = 0.25
# Libraries that decide which images can be decoded.
DECODERS = ("pillow", "pillow-heif")


def update_index(
    store: IndexStore,
    items: Items,
    open_encoder: Callable[[], Encoder],
    settings: IndexSettings,
    asked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an index, or bring an existing one up to date.

    What is new is embedded, a shard at a time, and then the table is written anew, beside the one that searches read
    meanwhile. If the run is killed, the same one goes on with the shards that are whole. A table that is lost or
    damaged is written again. The memory holds about 100 bytes for each image, and of a folder 200 and the path more.

    Args:
        items: The images or captions.
        open_encoder: Opens the model that embeds them.
        asked: How the user named the model. If the index was made by a model of this name, it is opened only if there
            is something to embed.

    Returns:
        Counts: images or captions `embedded` in this run, `kept`, whose embeddings were stored before, `removed` from
        the existing index, and `failed`; `images` or `captions` in the index; and its location `index`.

    Raises:
        FileExistsError: The location of the index contains something else.
        NonFiniteError: The model's embedding of an image or caption is NaN or infinite.
        ValueError: The existing index belongs to another model or source, no image or caption can be embedded, more
            than half of the existing ones are gone and `allow_removals` is off, or another run is using the folder.
    """
    folder = rows_folder(store, settings.rows_dir)
    store.require_own()
    with folder_lock(folder, patience=0):
        remove_unfinished(folder)
        try:
            return _Update(store, items, open_encoder, settings, asked, folder).run()
        finally:
            _remove_empty(folder)


class _Update:
    def __init__(
        self,
        store: IndexStore,
        items: Items,
        open_encoder: Callable[[], Encoder],
        settings: IndexSettings,
        asked: dict[str, Any] | None,
        folder: Path,
    ) -> None:
        self.store, self.items, self.open_encoder, self.settings = store, items, open_encoder, settings
        self.asked, self.folder = asked, folder
        self.is_caption = items.embed == "caption"
        # The index that is there, and the one that this run continues.
        self.there: IndexManifest | None = None
        with contextlib.suppress(ValueError) if settings.overwrite else contextlib.nullcontext():
            self.there = store.metadata()
        self.before = None if settings.overwrite else self.there

    @cached_property
    def encoder(self) -> Encoder:
        encoder = self.open_encoder()
        if self.is_caption:
            encoder.text_lengths(["a"])  # a model that embeds no texts says so
        if self.before is not None:
            has_images = not isinstance(encoder, OurEncoder) or encoder.is_joint
            needs = [*["image"] * has_images, *["text"] * self.is_caption]
            self.before.require_model(self.store.location, encoder, needs)
            now = _identity(encoder, self.items)["dtype"]
            if self.before.identity.get("dtype") != now:
                computed = self.before.identity.get("dtype")
                logger.warning("the index was computed in %s, and new rows are in %s: --dtype chooses.", computed, now)
        return encoder

    def run(self) -> dict[str, Any]:
        manifest = self._described()
        if self.before is not None:
            self.before.require_same(self.store.location, manifest)
        self.settings.type_of(self.store.index_types, manifest.width)
        earlier = Listing.read_all(self.folder)
        decoding = {"max_pixels": self.items.max_pixels, **_versions(DECODERS)}
        with ProgressBar(f"Listing {self.items.embed}s", None, self.items.embed) as bar:
            tables = _counted(self.items.batches(earlier), bar)
            listing = Listing.write(self.folder, tables, self.items.columns, decoding)
        removed = self._count_removed(listing, earlier)
        if not len(listing):
            raise self._nothing([*self.items.failures])
        is_retried = not earlier or any(one.decoding != decoding for one in earlier)
        rows, is_missing = self._stored(listing, manifest, is_retried)
        if "encoder" in vars(self):  # what made the new rows
            manifest = self._described()
        is_good = self._complete(manifest, listing, rows)
        if not self._is_unchanged(manifest):
            kind = pa.list_(pa.type_for_alias(manifest.stored_dtype), manifest.width)
            schema = pa.schema([*self.items.columns.items(), (VECTOR, kind)])
            self.store.replace(manifest, schema, table_batches(listing, rows, schema, is_good))
        self._clean(manifest)
        embedded = int((is_missing & is_good).sum())
        return {
            "embedded": embedded,
            "kept": manifest.images - embedded,
            "removed": removed,
            "failed": len(manifest.failures),
            f"{self.items.embed}s": manifest.images,
            "index": self.store.location,
        }

    def _complete(self, manifest: IndexManifest, listing: Listing, rows: Store) -> np.ndarray:
        """Write into the manifest what the index consists of; return which rows of the list have an embedding."""
        found, reasons = rows.find(listing.keys), {row: reason for row, _, reason in rows.manifest.skipped}
        is_good = ~np.isin(found, [*reasons])
        bad = np.flatnonzero(~is_good)
        failures = [{"key": key, "reason": reason} for key, reason in self.items.failures.items()]
        for key, row in zip(listing.take(bad)[KEY].to_pylist(), found[bad].tolist(), strict=True):
            failures.append({"key": key, "reason": reasons[row]})
        if failures:
            logger.warning("skipped:")
        for failure in failures[:MAX_NAMED]:
            logger.warning("  %s: %s", failure["key"], failure["reason"])
        if len(failures) > MAX_NAMED:
            logger.warning("  and %d more; the manifest of the index lists all", len(failures) - MAX_NAMED)
        if not is_good.any():
            if self.there is None:
                shutil.rmtree(rows.path, ignore_errors=True)
            raise self._nothing(failures)
        manifest.images, manifest.failures = int(is_good.sum()), failures
        manifest.index = self.settings.index_of(manifest.images, manifest.width, self.store.index_types)
        manifest.listing, manifest.rows = listing.path.name, rows.path.name
        return is_good

    def _nothing(self, failures: list[Any]) -> ValueError:
        place = self.items.source["path"]
        return ValueError(f"none of the {len(failures)} files or rows of {place} can be embedded.")

    def _described(self) -> IndexManifest:
        """Describe the index by its model, which is opened unless it is known to be that of the index."""
        items, is_known = self.items, self.before is not None and bool(self.asked) and self.before.asked == self.asked
        described: dict[str, Any] = {
            "source": items.source,
            "stored_dtype": self.settings.stored_dtype,
            "metadata_columns": items.metadata_columns,
            "max_pixels": items.max_pixels,
            "embed": items.embed,
            "asked": self.asked or {},
        }
        if self.before is not None and is_known and "encoder" not in vars(self):
            return replace(self.before, **described, index={}, images=0, failures=[], stored={}, versions=None)
        encoder, is_caption = self.encoder, self.is_caption
        has_images = not isinstance(encoder, OurEncoder) or encoder.is_joint
        identity = _identity(encoder, items)
        return IndexManifest(
            model=recorded_name(encoder.name),
            # The branch may have moved when the model is loaded again.
            revision=identity.get("commit"),
            image_fingerprint=encoder.image_fingerprint() if has_images or not is_caption else None,
            width=encoder.width,
            index={},
            image_backend="exact" if is_caption else encoder.image_backend,
            text_fingerprint=encoder.text_fingerprint() if is_caption else None,
            identity=identity,
            **described,
        )

    def _stored(self, listing: Listing, manifest: IndexManifest, is_retried: bool) -> tuple[Store, np.ndarray]:
        """Embed what has no stored embedding; return the store, and which rows of the list had none.

        Args:
            is_retried: Whether images that could not be decoded are tried again.
        """
        wanted = StoreManifest(
            kind="texts" if self.is_caption else "images",
            encoder=manifest.model,
            identity={
                "fingerprint": manifest.text_fingerprint if self.is_caption else manifest.image_fingerprint,
                "image_backend": manifest.image_backend,
            },
            dtype=self.settings.stored_dtype,
            width=manifest.width,
        )
        folder = self._store_folder(wanted)
        self._drop(folder, listing, is_retried)
        # The first of equal images or captions is embedded for all.
        joined = np.ascontiguousarray(listing.keys).view("S16").reshape(-1)
        _, firsts, numbers = np.unique(joined, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        firsts, is_missing = firsts[order], np.zeros(len(firsts), dtype=bool)

        def compute(positions: np.ndarray) -> Iterator[ComputedRows]:
            is_missing[order[positions]] = True
            return self._embedded(listing.take(firsts[positions]))

        def name(position: int) -> str:
            return str(listing.take(firsts[[position]])[KEY][0].as_py())

        rows: Store = build_store(
            folder,
            listing.keys[firsts],
            wanted,
            compute,
            title=f"Indexing {self.items.embed}s",
            shard_size=self.settings.shard_size,
            name=name,
        )
        return rows, is_missing[numbers]

    def _store_folder(self, wanted: StoreManifest) -> Path:
        """Return the folder of the embeddings: that of the index, or another one beside it."""
        if self.before is not None:
            folder = self.folder / self.before.rows
            if not folder.is_dir():
                logger.warning("the embeddings of the index are not in %s; all are computed again.", folder)
            return folder
        folder = next(self.folder / name for name in STORES if self.there is None or self.there.rows != name)
        if self.settings.overwrite:
            try:
                for path in folder.glob(f"*{MANIFEST_SUFFIX}"):
                    StoreManifest.read(path).require_same(wanted, path)
            except StoreError:
                shutil.rmtree(folder)  # of another run that was to overwrite the index
        return folder

    def _drop(self, folder: Path, listing: Listing, is_retried: bool) -> None:
        """Drop what is to be tried again, and, if it is much, what no row of the list has."""
        wanted, is_full = KeyIndex.of(listing.keys), False
        with contextlib.suppress(FileNotFoundError, StoreError):
            stored = Store.open(folder, verify=False)
            found = stored.find(listing.keys)
            is_full = len(stored) - len(np.unique(found[found >= 0])) > UNUSED * len(stored)

        def is_unwanted(keys: np.ndarray, reasons: Mapping[int, str]) -> np.ndarray:
            unwanted = wanted.find(keys) < 0 if is_full else np.zeros(len(keys), dtype=bool)
            unwanted[[row for row, reason in reasons.items() if is_retried or reason == CHANGED]] = True
            return unwanted

        drop_rows(folder, is_unwanted)

    def _embedded(self, rows: pa.Table) -> Iterator[ComputedRows]:
        """Embed images, or captions in batches of similar length."""
        settings, encoder, chosen = self.settings, self.encoder, self.items.choose(rows)
        if not self.is_caption:
            workers = min(worker_count(settings.num_workers), len(chosen))
            size = settings.batch_size or IMAGES_AT_ONCE
            yield from encoder.encode_image_parts(chosen, range(len(chosen)), size, workers, on_error="skip")
            return
        if num_cut := int(encoder.text_lengths(chosen)[1].sum()):
            logger.warning("%d of %d captions were cut to the length that the model reads.", num_cut, len(chosen))
        yield from encoder.encode_text_parts(chosen, settings.batch_size)

    def _count_removed(self, listing: Listing, earlier: list[Listing]) -> int:
        """Count rows of the index that no longer exist: paths of a folder, content of a data set.

        Raises:
            ValueError: They are more than half, and `allow_removals` is off.
        """
        if self.before is None:
            return 0
        listed = next((one for one in earlier if one.path.name == self.before.listing), None)
        if listed is None:  # it is lost, or on another machine
            removed = max(0, self.before.images - len(listing))
        else:
            now = [self.items.unreadable(), *(self.items.identities(batch) for batch in listing.batches())]
            index, removed = KeyIndex.of(np.concatenate(now)), 0
            without_row = pa.array([failure["key"] for failure in self.before.failures], pa.string())
            for batch in listed.batches():
                kept = pc.invert(pc.is_in(batch[KEY], value_set=without_row))
                removed += int((index.find(self.items.identities(batch.filter(kept))) < 0).sum())
        if 2 * removed > self.before.images and not self.settings.allow_removals:
            raise ValueError(
                f"{removed:,} of the {self.before.images:,} images or captions of the index {self.store.location} are "
                f"gone from {self.items.source['path']}: is a disk not mounted? The index stays as it is. If they "
                "were removed on purpose, add --allow-removals."
            )
        return removed

    def _is_unchanged(self, manifest: IndexManifest) -> bool:
        """Tell whether the table is what this run would write."""
        if self.before is None or self.before.content() != manifest.content():
            return False
        try:
            return self.store.open() is not None
        except (ValueError, ConnectionError) as error:
            logger.warning("the table is made again: %s", error)
            return False

    def _clean(self, manifest: IndexManifest) -> None:
        """Delete lists and embeddings that the index is not made of."""
        for path in self.folder.glob(PATTERN):
            if path.name != manifest.listing:
                path.unlink()
        for name in STORES:
            if name != manifest.rows:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def table_batches(listing: Listing, rows: Store, schema: pa.Schema, is_good: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table: those of a list that are good, with their embeddings.

    Args:
        schema: Columns of the list, and `VECTOR`.
        is_good: Which rows of the list have an embedding, `(rows,)` bool.
    """
    start = 0
    for batch in listing.batches():
        chosen = batch.filter(pa.array(is_good[start : start + len(batch)]))
        start += len(batch)
        embeds = rows.read(rows.find(store_keys(chosen[DIGEST]))).numpy()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), rows.width)
        yield pa.RecordBatch.from_arrays([*chosen.columns, vectors], schema=schema)


def _counted(tables: Iterator[pa.Table], bar: ProgressBar) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        bar.update(len(table))


def recorded_name(model: str) -> str:
    """Return the name of a model with the absolute path of a local one."""
    path, colon, function = model.rpartition(".py:")
    return f"{absolute_path(f'{path}.py')}:{function}" if colon else absolute_path(model)


def _identity(encoder: Encoder, items: Items) -> dict[str, str]:
    """Identify a model; an LLM2CLIP model for images by that side alone, since its LLM may be large or quantised."""
    if items.embed == "caption" or not isinstance(encoder, OurEncoder):
        return encoder.identity()
    source = {"fingerprint": encoder.image_fingerprint()} if encoder.commit is None else {"commit": encoder.commit}
    return {"library": encoder.library, "name": encoder.name, **source, "dtype": encoder.dtype}


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def _remove_empty(folder: Path) -> None:
    """Delete what a run has begun, if it has stored no embeddings and there is nothing else."""
    if any(any((folder / name).glob(f"*{MANIFEST_SUFFIX}")) for name in STORES):
        return
    for path in folder.glob(PATTERN) if not any(folder.glob("*.json")) else ():
        path.unlink()
    for place in (*(folder / name for name in STORES), folder):
        remove_unfinished(place)
        with contextlib.suppress(OSError):  # there is something else, or nothing
            if {path.name for path in place.iterdir()} <= {LOCK}:
                (place / LOCK).unlink(missing_ok=True)
                place.rmdir()
