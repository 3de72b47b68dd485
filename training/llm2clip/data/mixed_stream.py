"""Several sources as one stream, tables with random access among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

from llm2clip.data.captioned_images import CaptionImageDataset
from llm2clip.data.embedding_lookup import EmbeddingLookup
from llm2clip.data.mixing import BatchesInProportion, Mixing, Proportional, Schedule, Weighted
from llm2clip.data.opened_table import SourceError
from llm2clip.data.sample_stream import Lane, ReaderPlace, SampleStream
from llm2clip.data.sampling import SampleIndex, stable_seed
from llm2clip.data.stream_place import Layout
from llm2clip.data.stream_plan import RowPlan, TablePlan
from llm2clip.utils.files import digest_json


class TableLane:
    """A map-style source as one of the sources of a stream: its rows are permuted in each epoch.

    Args:
        dataset: A data set of one source.
        seed: Seed of the order.
    """

    def __init__(self, dataset: CaptionImageDataset, seed: int) -> None:
        self.dataset, self.seed, self.name = dataset, seed, dataset.sources[0].path

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def plan(self, first_epoch: int) -> RowPlan:
        return TablePlan([len(self.dataset)], self.seed, first_epoch=first_epoch)

    def fingerprint(self) -> str:
        return digest_json(len(self.dataset))

    def files_digest(self) -> str:
        return self.dataset.content_digest()

    def join(self, number: int) -> None:
        self.dataset.is_one_of_several, self.seed = True, stable_seed(self.seed, "source", number)

    def require_readers(self, num_readers: int, world_size: int) -> None:
        if len(self.dataset) < num_readers:
            raise SourceError(f"{self.name} has {len(self.dataset)} rows, fewer than {num_readers} readers.")

    def samples(self, place: ReaderPlace, first_epoch: int, repeat: bool) -> Iterator[Any]:
        plan, readers = cast(RowPlan, place.plan), (place.num_readers, place.reader)
        start, done = plan.locate(place.delivered, *readers)
        for epoch in itertools.count(start):
            if epoch > first_epoch and not repeat:
                return
            for part in plan.order(epoch, *readers, place.buffer).parts:
                for row in part.rows[done:]:
                    yield self.dataset[SampleIndex(epoch, int(row))]
            done = 0


class MixedStream(SampleStream):
    """Iterable data set of several sources; see [`SampleStream`].

    With `proportional`, an epoch has every row of every source once, in random order. With `weights`, the source of
    each row is drawn, and a source that ends starts its own next epoch. With `one_source_per_step`, the batches of all
    ranks in a step come from one source, which is drawn by weight, or by default in proportion to the sizes.

    Args:
        lanes: The sources.
        mixing: How they are mixed.
        weights: Weight of each source, relative to the others; None if there are none.
        lookups: Where the captions of a source are looked up; None if its samples have embeddings, or need none.
        buffers, seed, rank, world_size, repeat: See [`SampleStream`].

    Raises:
        ValueError: Weights do not fit `mixing`, or are not given for every source.
        SourceError: A number of rows is unknown that `mixing` needs.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        mixing: Mixing,
        weights: Sequence[float | None] = (),
        lookups: Sequence[EmbeddingLookup | None] = (),
        buffers: Sequence[int] = (),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
    ) -> None:
        super().__init__(lanes, buffers or [0] * len(lanes), seed, rank, world_size, repeat)
        self.mixing, self.lookups = mixing, lookups or [None] * len(lanes)
        self.weights = checked_weights([lane.name for lane in lanes], mixing, weights)
        unknown = [lane.name for lane in lanes if lane.num_rows is None]
        if unknown and (mixing == "proportional" or self.weights is None):
            raise SourceError(
                f"mixing: {mixing} needs the number of rows of every source, but that of {unknown[0]} is unknown. "
                "Embed it, which counts its rows, or give every source a weight and set mixing: weights."
            )
        for number, lane in enumerate(lanes):
            lane.join(number)

    def schedule(self, plans: Sequence[RowPlan | None], layout: Layout, reader: int, depth: int) -> Schedule:
        if self.mixing == "proportional":
            known = cast(Sequence[RowPlan], plans)
            return Proportional(known, layout.num_readers, reader, depth, self.seed)
        if self.mixing == "weights":
            assert self.weights is not None
            return Weighted(self.weights, stable_seed(self.seed, "mixing", reader, depth))
        # The workers of a number draw the same on all ranks.
        seed = stable_seed(self.seed, "mixing", reader // layout.world_size, depth)
        if self.weights is not None:
            return Weighted(self.weights, seed, layout.batch_size)
        rows = layout.num_readers * layout.batch_size
        return BatchesInProportion([cast(int, lane.num_rows) / rows for lane in self.lanes], seed, layout.batch_size)

    def finished(self, source: int, sample: Any) -> Any:
        lookup = self.lookups[source]
        if lookup is None or not isinstance(sample, dict):
            return sample
        return {**sample, "llm_embeds": lookup.lookup([sample["caption"]], dtype=None)[0]}


def checked_weights(names: Sequence[str], mixing: Mixing, weights: Sequence[float | None]) -> list[float] | None:
    """Return the weights of sources, None if there are none; see [`MixedStream`] for errors."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        if mixing == "weights":
            raise ValueError("mixing: weights needs a weight for every source.")
        return None
    if mixing == "proportional":
        raise ValueError(
            "mixing: proportional has no weights; remove weight from the sources, or set mixing: weights."
        )
    if len(given) < len(names):
        missing = next(name for name, weight in zip(names, weights, strict=True) if weight is None)
        raise ValueError(f"the source {missing} has no weight, but others have; set it for every source or for none.")
    return given
