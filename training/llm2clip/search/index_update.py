"""Building an index and bringing it up to date: only new and changed images or captions are embedded."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llm2clip.command_line.processes import worker_count
from llm2clip.command_line.progress import ProgressBar
from llm2clip.encoders import Encoder
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.folder_items import DIGESTS, Items
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IMAGES_AT_ONCE, IndexSettings
from llm2clip.search.store import ID, KEY, NUMBER, REASON, VECTOR, Base, IndexStore
from llm2clip.store.shards import ComputedRows
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

logger = logging.getLogger(__name__)

MAX_NAMED = 20
# Parts whose images are described in memory before they are embedded.
PARTS_AT_ONCE = 16


def update_index(store: IndexStore, items: Items, encoder: Encoder, settings: IndexSettings) -> dict[str, Any]:
    """Build an index, or bring an existing one up to date; the store has to be locked.

    Embeddings are stored in parts, which searches do not see. If the run is killed, the next one continues with them,
    and its result equals that of an uninterrupted run. The new index replaces the old one in one step at the end. The
    memory holds 50 bytes for each image that the index has at the start, 200 and the path for each file of a folder,
    and descriptions of at most 16 parts.

    Args:
        items: The images or captions.
        encoder: The model that embeds them.

    Returns:
        Counts: images or captions `embedded` in this run (including the killed run that it resumes), `kept` from and
        `removed` from the existing index, and `failed`; `images` or `captions` in the index; and its location `index`.

    Raises:
        NonFiniteError: The model's embedding of an image or caption is NaN or infinite.
        ValueError: The existing index belongs to another model or source, no image or caption can be embedded, or more
            than half of the existing ones are gone and `allow_removals` is off.
    """
    return _Update(store, items, encoder, settings).run()


class _Digests:
    """Digests of rows, sorted, with the number of each row; 25 bytes a row.

    Args:
        digests, numbers: Digests and row numbers, each `(n,)`, of some of the rows at a time.
    """

    def __init__(self, digests: Sequence[np.ndarray], numbers: Sequence[np.ndarray]) -> None:
        joined = np.concatenate(digests) if digests else np.empty(0, DIGESTS)
        joined_numbers = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        order = np.argsort(joined, kind="stable")
        self._digests, self._numbers = joined[order], joined_numbers[order]
        self._seen = np.zeros(len(order), dtype=bool)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Return the row number of each digest, `(n,)` int64, -1 where there is none, and mark it as seen."""
        numbers = np.full(len(digests), -1, dtype=np.int64)
        if not len(self._digests):
            return numbers
        positions = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        is_known = self._digests[positions] == digests
        numbers[is_known] = self._numbers[positions[is_known]]
        self._seen[positions[is_known]] = True
        return numbers

    def unseen(self) -> np.ndarray:
        """Return the numbers of the rows whose digest no call of `find` has found."""
        firsts = np.searchsorted(self._digests, self._digests)  # equal digests are seen together
        return np.sort(self._numbers[~self._seen[firsts]])

    def repeated(self) -> np.ndarray:
        """Return the numbers of all rows but one of each digest."""
        return self._numbers[1:][self._digests[1:] == self._digests[:-1]]


class _Known:
    """Which rows there are, and which of them the images or captions of this run have too."""

    def __init__(self, items: Items, rows: Iterator[pa.RecordBatch]) -> None:
        self.items = items
        ids, contents, numbers = [], [], []
        for batch in rows:
            ids.append(_id_array(batch[ID]))
            contents.append(items.contents(batch))
            numbers.append(batch[NUMBER].to_numpy().astype(np.int64))
        self.ids, self.contents = _Digests(ids, numbers), _Digests(contents, numbers)

    def count_kept(self, batch: pa.Table) -> int:
        """Count rows of a batch that have not changed."""
        ids, contents = self.ids.find(_id_array(batch[ID])), self.contents.find(self.items.contents(batch))
        return int(((contents if self.items.reuses_content else ids) >= 0).sum())


class _Update:
    """One run: rows that are there, rows that are missing, rows that are left over."""

    def __init__(self, store: IndexStore, items: Items, encoder: Encoder, settings: IndexSettings) -> None:
        self.store, self.items, self.encoder, self.settings = store, items, encoder, settings
        settings.type_of(store.index_types, encoder.width)  # before anything is embedded
        is_caption = items.embed == "caption"
        if is_caption:
            encoder.text_lengths(["a"])  # a model that embeds no texts says so
        has_images = not isinstance(encoder, OurEncoder) or encoder.is_joint
        # How many captions this run has embedded, and how many of them were cut.
        self.num_captions = self.num_cut = 0
        path, colon, function = encoder.name.rpartition(".py:")
        fingerprint = encoder.image_fingerprint() if has_images or not is_caption else None
        identity = _identity(encoder, None if is_caption else fingerprint)
        self.manifest = IndexManifest(
            model=f"{absolute_path(f'{path}.py')}:{function}" if colon else absolute_path(encoder.name),
            # The branch may have moved when the model is loaded again.
            revision=identity.get("commit"),
            image_fingerprint=fingerprint,
            width=encoder.width,
            stored_dtype=settings.stored_dtype,
            source=items.source,
            index={},
            metadata_columns=items.metadata_columns,
            image_backend="exact" if is_caption else encoder.image_backend,
            max_pixels=items.max_pixels,
            embed=items.embed,
            text_fingerprint=encoder.text_fingerprint() if is_caption else None,
            identity=identity,
        )
        kind = pa.list_(pa.type_for_alias(settings.stored_dtype), encoder.width)
        self.schema = pa.schema([*items.columns.items(), (REASON, pa.string()), (VECTOR, kind)])
        self.complete = None if settings.overwrite else store.metadata()

    def run(self) -> dict[str, Any]:
        base, known = self._begin()
        # Counted is against the index that this one replaces.
        before = known if base == "commit" else self._known(written=False)
        kept = self._add_missing(known, before)
        removed = self._count_removed(before)
        self.store.delete(np.union1d(known.ids.unseen(), known.ids.repeated()))
        self.manifest.images, failures = self._stored()
        self.manifest.failed = len(failures)
        self._report(failures)
        if not self.manifest.images:
            self.store.begin(self.manifest, self.schema, "nothing" if self.complete is None else "commit")
            location = self.items.source["path"]
            raise ValueError(f"none of the {len(failures)} files or rows of {location} can be embedded.")
        images, types = self.manifest.images, self.store.index_types
        self.manifest.index = self.settings.index_of(images, self.encoder.width, types)
        self.store.commit(self.manifest, failures)
        return {
            "embedded": self.manifest.images - kept,
            "kept": kept,
            "removed": removed,
            "failed": len(failures),
            f"{self.items.embed}s": self.manifest.images,
            "index": self.store.location,
        }

    def _begin(self) -> tuple[Base, _Known]:
        """Begin to write, on top of a killed run, of the last commit or of nothing; return that, and its rows."""
        base: Base = "nothing" if self.complete is None else "commit"
        again = base
        if self.complete is not None:
            self._require_same(self.complete)
        unfinished = None if self.settings.overwrite else self.store.metadata(unfinished=True)
        if unfinished is not None:
            try:
                self._require_same(unfinished)
                base = "unfinished"
            except ValueError:
                if self.complete is None:
                    raise
                logger.info("what an unfinished run of other settings has stored is dropped.")
        self.store.begin(self.manifest, self.schema, base)
        try:
            known = self._known()
        except ValueError as error:
            if base != "unfinished":
                raise
            logger.warning("what an unfinished run has stored is dropped: %s", error)
            self.store.begin(self.manifest, self.schema, again)
            return again, self._known()
        if base == "unfinished":
            logger.info("resuming an unfinished run; there are %d rows.", len(known.ids))
        return base, known

    def _known(self, written: bool = True) -> _Known:
        """Read what is written so far, or what the last commit has, if there is one."""
        is_there = written or self.complete is not None
        columns = [ID, self.items.content_column]
        return _Known(self.items, self.store.keys(columns, written=written) if is_there else iter(()))

    def _require_same(self, manifest: IndexManifest) -> None:
        """Raise ValueError if the model, the source, the stored type or the decoding differs from the index."""
        needs = ["image", "text"] if self.items.embed == manifest.embed == "caption" else ["image"]
        if self.manifest.image_fingerprint is None:
            needs.remove("image")
        manifest.require_model(self.store.location, self.encoder, needs)
        manifest.require_same(self.store.location, self.manifest)
        before, now = (made.identity.get("dtype") for made in (manifest, self.manifest))
        if before != now:
            logger.warning("the index was computed in %s, and new rows are in %s: --dtype chooses.", before, now)

    def _add_missing(self, known: _Known, before: _Known) -> int:
        """Add what has no row; return how many rows of all have not changed since `before`."""
        kept, todo, count = 0, [], 0
        limit = PARTS_AT_ONCE * self.settings.rows_per_part
        kind = self.items.embed
        total = None if kind == "caption" else len(self.items)  # a row may have several captions
        with ProgressBar(f"Indexing {kind}s", total, kind) as bar:
            for batch in self.items.batches():
                kept += before.count_kept(batch)
                missing = batch.filter(pa.array(known.ids.find(_id_array(batch[ID])) < 0))
                numbers = known.contents.find(self.items.contents(missing))
                is_moved = (numbers >= 0) & self.items.reuses_content
                if is_moved.any():
                    stored = self.store.vectors(numbers[is_moved])
                    self.store.upsert(_with_columns(missing.filter(pa.array(is_moved)), stored))
                todo.append(missing.filter(pa.array(~is_moved)))
                count += len(todo[-1])
                bar.update(len(batch) - len(todo[-1]))
                if count >= limit:
                    described = pa.concat_tables(todo)
                    self._embed(described[:limit], bar)
                    todo, count = [described[limit:]], count - limit
            if count:
                self._embed(pa.concat_tables(todo), bar)
        if self.num_cut:
            logger.warning(
                "%d of %d distinct captions were cut to the length that the model reads.",
                self.num_cut, self.num_captions,
            )  # fmt: skip
        return kept

    def _embed(self, todo: pa.Table, bar: ProgressBar) -> None:
        """Embed images or captions, equal ones once, and add their rows part by part."""
        owners = np.arange(len(todo))
        if self.items.reuses_content:
            _, firsts, numbers = np.unique(self.items.contents(todo), return_index=True, return_inverse=True)
            owners = firsts[numbers]
        chosen, start = np.unique(owners), 0
        for part in self._parts(self.items.choose(todo), chosen.tolist()):
            embedded = chosen[start : start + len(part.rows)]
            start += len(embedded)
            rows = np.flatnonzero(np.isin(owners, embedded))
            sources = np.searchsorted(embedded, owners[rows]).tolist()
            embeds = part.rows.numpy()[sources].astype(self.settings.stored_dtype)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), embeds.shape[1])
            skipped = {place: reason for place, _, reason in part.skipped}
            reasons = pa.array([skipped.get(source) for source in sources], pa.string())
            self.store.upsert(_with_columns(todo.take(pa.array(rows)), pa.table({VECTOR: vectors, REASON: reasons})))
            bar.update(len(rows))

    def _parts(self, items: Any, chosen: list[int]) -> Iterator[ComputedRows]:
        """Embed images, or captions in batches of similar length, a part at a time."""
        settings, size = self.settings, self.settings.batch_size or IMAGES_AT_ONCE
        if self.items.embed == "caption":
            for start in range(0, len(chosen), settings.rows_per_part):
                texts = [items[row] for row in chosen[start : start + settings.rows_per_part]]
                embeds = self.encoder.encode_text(texts, settings.batch_size)
                self.num_captions += len(texts)
                self.num_cut += int(self.encoder.text_lengths(texts)[1].sum())
                yield ComputedRows(embeds)
            return
        workers = min(worker_count(settings.num_workers), len(chosen))
        batches = self.encoder.encode_image_parts(items, chosen, size, workers, on_error="skip")
        while part := list(itertools.islice(batches, settings.rows_per_part // size)):
            skipped = [
                (number * size + place, key, reason)
                for number, batch in enumerate(part)
                for place, key, reason in batch.skipped
            ]
            yield ComputedRows(torch.cat([batch.rows for batch in part]), skipped=skipped)

    def _stored(self) -> tuple[int, list[dict[str, Any]]]:
        """Count the rows that searches will see; return keys and reasons of all that has none."""
        count, failures = 0, [{"key": key, "reason": reason} for key, reason in self.items.failures.items()]
        for batch in self.store.keys([KEY, REASON], written=True):
            count += batch[REASON].null_count
            if batch[REASON].null_count < len(batch):
                failures += [{"key": row[KEY], "reason": row[REASON]} for row in batch.to_pylist() if row[REASON]]
        return count, failures

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
                f"{removed:,} of the {total:,} images or captions of the index {self.store.location} are gone from "
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


def _identity(encoder: Encoder, image_fingerprint: str | None) -> dict[str, str]:
    """Identify a model; an LLM2CLIP model for images by that side alone, since its LLM may be large or quantised."""
    if image_fingerprint is None or not isinstance(encoder, OurEncoder):
        return encoder.identity()
    source = {"fingerprint": image_fingerprint} if encoder.commit is None else {"commit": encoder.commit}
    return {"library": encoder.library, "name": encoder.name, **source, "dtype": encoder.dtype}


def _with_columns(rows: pa.Table, others: pa.Table) -> pa.Table:
    for name in others.column_names:
        rows = rows.append_column(name, others[name])
    return rows


def _id_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return np.array(column.to_pylist(), DIGESTS)
