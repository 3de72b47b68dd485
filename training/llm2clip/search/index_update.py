"""Building an index and bringing it up to date: only new and changed images or captions are embedded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from llm2clip.encoders.encoder import EncodedRows
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.image_sets import IndexedItems
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_rows import ID, KEY, NUMBER, REASON, VECTOR, IndexRows, IndexStore, UnfinishedRows
from llm2clip.search.row_digests import KnownDigests, digest_array
from llm2clip.search.table_captions import ChosenCaptions
from llm2clip.search.vector_settings import VectorSettings
from llm2clip.utils.embeddings import require_finite_rows
from llm2clip.utils.processes import worker_count
from llm2clip.utils.progress import ProgressBar
from llm2clip.utils.settings import setting
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

logger = logging.getLogger(__name__)

MAX_NAMED = 20
# Images per forward pass, by default.
IMAGES_AT_ONCE = 64
# Parts whose images are described in memory before they are embedded.
PARTS_AT_ONCE = 16


@dataclass
class UpdateSettings(VectorSettings):
    """How an index is built and updated."""

    dtype: Literal["float16", "float32"] = setting("float16", "Data type of the stored embeddings.")
    batch_size: int | None = setting(
        None,
        "Images per forward pass, by default 64; captions, which are grouped by length, by default as many as 512 "
        "tokens on a CPU and 16,384 elsewhere allow.",
    )
    num_workers: int | None = setting(None, "Processes that decode images; by default one per core, at most 8.")
    part_size: int = setting(
        4096,
        "Images or captions between two saves of an unfinished run; a killed run repeats fewer of them than this.",
    )
    overwrite: bool = setting(False, "Build an existing index again from scratch.")
    allow_removals: bool = setting(
        False, "Update the index although more than half of its images are gone, as they are when a disk is missing."
    )


def update_index(
    store: IndexStore, items: IndexedItems, encoder: OurEncoder, settings: UpdateSettings
) -> dict[str, Any]:
    """Build an index, or bring an existing one up to date.

    Embeddings are stored in parts, which searches do not see. If the run is killed, the next one goes on with them,
    and its result equals that of an uninterrupted run. The new index replaces the old one in one step at the end. The
    memory holds 50 bytes for each image that the index has at the start, and descriptions of at most 16 parts.

    Args:
        items: The images or captions.
        encoder: The model that embeds them; captions need its LLM.

    Returns:
        Counts: images or captions `embedded` in this run (including the killed run that it resumes), `kept` from and
        `removed` from the existing index, and `failed`; `images` or `captions` in the index; and its place `index`.

    Raises:
        FileExistsError: The place contains something else than an index.
        NonFiniteError: The model's embedding of an image or caption is NaN or infinite.
        ValueError: The existing index belongs to another model or source, no image or caption can be embedded, or more
            than half of the existing ones are gone and `allow_removals` is off.
    """
    store.require_own()
    with store.lock():
        try:
            return _Update(store, items, encoder, settings).run()
        finally:
            store.remove_empty()


class _Known:
    """Which rows an index has, and which of them the images or captions of this run have too."""

    def __init__(self, items: IndexedItems, rows: IndexRows | None = None) -> None:
        self.items = items
        ids, contents, numbers = [], [], []
        for batch in rows.scan([ID, *items.content_columns()]) if rows is not None else ():
            ids.append(digest_array(batch[ID]))
            contents.append(items.contents(batch))
            numbers.append(batch[NUMBER].to_numpy().astype(np.int64))
        self.ids, self.contents = KnownDigests(ids, numbers), KnownDigests(contents, numbers)

    def count_kept(self, batch: pa.Table) -> int:
        """Count rows of a batch that have not changed."""
        ids, contents = self.ids.find(digest_array(batch[ID])), self.contents.find(self.items.contents(batch))
        return int(((contents if self.items.reuses_content else ids) >= 0).sum())


class _Update:
    """One run: rows that are there, rows that are missing, rows that are left over."""

    def __init__(
        self,
        store: IndexStore,
        items: IndexedItems,
        encoder: OurEncoder,
        settings: UpdateSettings,
    ) -> None:
        self.store = store
        self.items = items
        self.encoder = encoder
        self.settings = settings
        settings.require_width(encoder.width, settings.dtype)  # before anything is embedded
        self.embeds_captions = items.embed == "caption"
        self.fingerprint = encoder.image_fingerprint()
        # Of the captions of this run: all, and those that were cut.
        self.num_captions = self.num_cut = 0
        self.manifest = IndexManifest(
            model=absolute_path(encoder.name),
            revision=encoder.revision,
            vision_fingerprint=self.fingerprint,
            width=encoder.width,
            dtype=settings.dtype,
            source=items.source,
            index={},
            metadata_columns=items.metadata_columns,
            image_backend="exact" if self.embeds_captions else encoder.image_backend,
            max_pixels=items.max_pixels,
            embed=items.embed,
            text_fingerprint=encoder.text_fingerprint() if self.embeds_captions else None,
        )
        self.complete = None if settings.overwrite else store.manifest()

    def run(self) -> dict[str, Any]:
        rows, known = self._open_readable()
        # Counted is against the index that this one replaces.
        replaced = None if self.complete is None else self.store.rows(self.complete)
        before = known if rows.is_published else _Known(self.items, replaced)
        kept = self._add_missing(rows, known, before)
        removed = self._count_removed(before)
        rows.delete(np.union1d(known.ids.unseen(), known.ids.repeated()))
        failures = self._failures(rows)
        self._report(failures)
        self.manifest.images, self.manifest.failed = rows.count(f"{REASON} IS NULL"), len(failures)
        if not self.manifest.images:
            self._undo(rows)
            place = self.items.source["path"]
            raise ValueError(f"none of the {len(failures)} files or rows of {place} can be embedded.")
        size, width = self.manifest.images, self.encoder.width
        self.manifest.index = self.settings.index_of(size, width, self.settings.dtype, self.store.index_types)
        if not self._is_current(rows, failures):
            rows.publish(self.manifest, failures)
        return {
            "embedded": self.manifest.images - kept,
            "kept": kept,
            "removed": removed,
            "failed": len(failures),
            f"{self.items.embed}s": self.manifest.images,
            "index": self.store.place,
        }

    def _open_readable(self) -> tuple[UnfinishedRows, _Known]:
        """Open the rows to add to, without those of a killed run whose files are damaged."""
        rows = self._open()
        try:
            return rows, _Known(self.items, rows)
        except ValueError as error:
            if rows.is_published:
                raise
            logger.warning("what an unfinished run has stored is dropped: %s", error)
        rows = self.store.create(self.manifest, self._schema()) if self.complete is None else self.store.revert()
        return rows, _Known(self.items, rows)

    def _open(self) -> UnfinishedRows:
        """Open the rows to add to: those of a killed run, of the complete index, or none."""
        if self.complete is not None:
            self._require_same(self.complete)
        found = None if self.settings.overwrite else self.store.unfinished()
        if found is None:
            return self.store.create(self.manifest, self._schema())
        unfinished, rows = found
        try:
            self._require_same(unfinished)
        except ValueError:
            if self.complete is None:
                raise
            logger.info("what an unfinished run of other settings has stored is dropped.")
            return self.store.revert()
        if not rows.is_published:
            logger.info("resuming an unfinished run; there are %d rows.", rows.count())
        return rows

    def _schema(self) -> pa.Schema:
        kind = pa.list_(pa.type_for_alias(self.settings.dtype), self.encoder.width)
        return pa.schema([*self.items.columns.items(), (REASON, pa.string()), (VECTOR, kind)])

    def _require_same(self, manifest: IndexManifest) -> None:
        """Raise ValueError if the model, the source, the data type or the decoding differs from that of an index."""
        text = self.manifest.text_fingerprint
        manifest.require_model(self.store.place, self.encoder, self.fingerprint, text)
        manifest.require_same(self.store.place, self.manifest)

    def _add_missing(self, rows: UnfinishedRows, known: _Known, before: _Known) -> int:
        """Add what has no row; return how many rows of all have not changed since `before`."""
        kept, todo, count = 0, [], 0
        limit = PARTS_AT_ONCE * self._part_size
        with ProgressBar(f"Indexing {self.items.embed}s", self.items.total(), self.items.embed) as bar:
            for batch in self.items.batches():
                kept += before.count_kept(batch)
                missing = batch.filter(pa.array(known.ids.find(digest_array(batch[ID])) < 0))
                numbers = known.contents.find(self.items.contents(missing))
                is_moved = (numbers >= 0) & self.items.reuses_content
                if is_moved.any():
                    stored = rows.take(numbers[is_moved], [VECTOR, REASON])
                    rows.append(_with_columns(missing.filter(pa.array(is_moved)), stored))
                todo.append(missing.filter(pa.array(~is_moved)))
                count += len(todo[-1])
                bar.update(len(batch) - len(todo[-1]))
                if count >= limit:
                    described = pa.concat_tables(todo)
                    self._embed(rows, described[:limit], bar)
                    todo, count = [described[limit:]], count - limit
            if count:
                self._embed(rows, pa.concat_tables(todo), bar)
        if self.num_cut:
            limit = self.encoder.tokenizer.model_max_length
            logger.warning("%d of %d distinct captions were cut at %d tokens.", self.num_cut, self.num_captions, limit)
        return kept

    @property
    def _part_size(self) -> int:
        """Rows in a part: whole batches, so that a resumed run forms the same batches as an uninterrupted one."""
        batch = self.settings.batch_size or IMAGES_AT_ONCE
        return max(1, self.settings.part_size // batch) * batch

    def _embed(self, rows: UnfinishedRows, todo: pa.Table, bar: ProgressBar) -> None:
        """Embed images or captions, equal ones once, and add their rows part by part."""
        owners = np.arange(len(todo))
        if self.items.reuses_content:
            _, firsts, numbers = np.unique(self.items.contents(todo), return_index=True, return_inverse=True)
            owners = firsts[numbers]
        for part in self._vectors(todo, np.unique(owners).tolist()):
            places = np.flatnonzero(np.isin(owners, part.rows))
            sources = np.searchsorted(part.rows, owners[places])
            embeds = part.embeds.numpy()[sources].astype(self.settings.dtype)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), embeds.shape[1])
            reasons = pa.array([part.reasons[source] for source in sources], pa.string())
            described = todo.take(pa.array(places))
            rows.append(_with_columns(described, pa.table({VECTOR: vectors, REASON: reasons})))
            bar.update(len(places))

    def _vectors(self, todo: pa.Table, chosen: list[int]) -> Iterator[EncodedRows]:
        items: Any = self.items.choose(todo)
        batch_size, part_size = self.settings.batch_size, self._part_size
        if self.embeds_captions:
            return self._captions(items, chosen)
        workers = min(worker_count(self.settings.num_workers), len(chosen))
        return self.encoder.encode_image_parts(
            items, chosen, batch_size or IMAGES_AT_ONCE, workers, part_size, on_error="skip",
            # A broken model is not a damaged image: all of its embeddings are in doubt.
            on_not_finite="raise",
        )  # fmt: skip

    def _captions(self, captions: ChosenCaptions, chosen: list[int]) -> Iterator[EncodedRows]:
        """Embed captions a part at a time, in batches of similar length."""
        for start in range(0, len(chosen), self._part_size):
            rows = chosen[start : start + self._part_size]
            texts = [captions.texts[row] for row in rows]
            embeds, num_cut = self.encoder.embed_and_count(texts, self.settings.batch_size)
            require_finite_rows(embeds, [captions.keys[row] for row in rows].__getitem__, "captions")
            self.num_captions, self.num_cut = self.num_captions + len(rows), self.num_cut + num_cut
            yield EncodedRows(rows, embeds, [None] * len(rows))

    def _failures(self, rows: IndexRows) -> list[dict[str, Any]]:
        failures = [{"key": key, "reason": reason} for key, reason in self.items.failures.items()]
        for batch in rows.scan([KEY, REASON], f"{REASON} IS NOT NULL"):
            failures += [{"key": row[KEY], "reason": row[REASON]} for row in batch.to_pylist()]
        return failures

    def _undo(self, rows: UnfinishedRows) -> None:
        if self.complete is not None:
            self.store.revert()
        else:
            for batch in list(rows.scan([KEY])):
                rows.delete(batch[NUMBER].to_numpy())

    def _is_current(self, rows: UnfinishedRows, failures: list[dict[str, Any]]) -> bool:
        """Return whether the existing index has the same content."""
        if self.complete is None or not rows.is_published:
            return False
        return self.complete.content() == self.manifest.content() and self.store.failures() == failures

    def _count_removed(self, before: _Known) -> int:
        """Count rows of the previous index that no longer exist: paths of a folder, content of a data set.

        Raises:
            ValueError: They are more than half, and `allow_removals` is off.
        """
        if self.items.failures and not self.items.reuses_content:  # a path that cannot be read exists
            before.contents.find(self.items.contents(pa.table({KEY: list(self.items.failures)})))
        removed, total = len(before.contents.unseen()), len(before.contents)
        if 2 * removed > total and not self.settings.allow_removals:
            raise ValueError(
                f"{removed:,} of the {total:,} images or captions of the index {self.store.place} are gone from "
                f"{self.items.source['path']}: is a disk not mounted? The index stays as it is. If they were removed "
                "on purpose, add --allow-removals."
            )
        return removed

    def _report(self, failures: list[dict[str, Any]]) -> None:
        if failures:
            logger.warning("skipped:")
        for failure in failures[:MAX_NAMED]:
            logger.warning("  %s: %s", failure["key"], failure["reason"])
        if len(failures) > MAX_NAMED:
            logger.warning("  and %d more; the index lists all", len(failures) - MAX_NAMED)


def _with_columns(rows: pa.Table, others: pa.Table) -> pa.Table:
    for name in others.column_names:
        rows = rows.append_column(name, others[name])
    return rows
