"""The DataLoaders of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

from llm2clip.data.formats import SourceError
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.streams import SampleStream
from llm2clip.trainers.base_config import StageConfig, require_batch
from llm2clip.utils.stopping import worker_init

# Arguments of a DataLoader that transformers 5.6 has no settings for.
NEWER = {"multiprocessing_context": "dataloader_multiprocessing_context", "in_order": "dataloader_in_order"}


def refuse_unused_by_loader(args: StageConfig, dataset: Any) -> None:
    """Raise a ValueError if a setting would have no effect on how a data set is read."""
    is_ours = isinstance(dataset, EpochDataset | SampleStream)
    if is_ours and getattr(args, "train_sampling_strategy", "random") != "random":
        raise ValueError("train_sampling_strategy is not for this package's data sets, which bring their order.")
    if args.auto_find_batch_size and isinstance(dataset, SampleStream):
        raise ValueError("auto_find_batch_size does not work with streams, whose order depends on the batch.")


def data_inputs(dataset: Any) -> dict[str, Any]:
    """Identify the rows that a run reads, by name in words, as far as they can be; see [`RunContext`]."""
    values: dict[str, Any] = {}
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        values["rows of the training data"] = len(dataset)
    if isinstance(dataset, EpochDataset | SampleStream):
        values["content of the training data"] = dataset.content_digest()
    return values


def loader_options(args: StageConfig, collator: Callable[..., Any], persistent: bool = False) -> dict[str, Any]:
    """Return the arguments of a DataLoader that the settings give.

    Args:
        persistent: Keep the worker processes between epochs.
    """
    workers = args.dataloader_num_workers
    newer = {name: getattr(args, field) for name, field in NEWER.items() if workers and hasattr(args, field)}
    return {
        "collate_fn": collator,
        "num_workers": workers,
        "worker_init_fn": worker_init(workers),
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        "persistent_workers": persistent and workers > 0,
        "prefetch_factor": args.dataloader_prefetch_factor if workers > 0 else None,
        **newer,
    }


def epoch_loader(dataset: EpochDataset, sampler: Any, accelerator: Accelerator, options: dict[str, Any]) -> DataLoader:
    """Make the loader of one of this package's map-style data sets, of which accelerate gives each process its share.

    Args:
        sampler: An [`EpochBatchSampler`] of the data set.
        options: Further arguments of the loader.

    Raises:
        ValueError: The sampler has no batch.
    """
    loader = accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, **options))
    require_batch(len(sampler), sampler.global_batch_size)
    return loader


def stream_loader(stream: SampleStream, batch_size: int, options: dict[str, Any]) -> DataLoader:
    """Make the loader of a stream, which is split by process already: accelerate must not split it again.

    Args:
        batch_size: Rows in a batch of a process.
        options: Further arguments of the loader.

    Raises:
        SourceError: The stream has fewer rows than one batch of all processes, in which rows would be each other's
            negatives.
    """
    stream.batch_size, rows = batch_size, stream.num_rows
    if rows < batch_size * stream.world_size:
        names = " + ".join(source.name for source in stream.sources)
        raise SourceError(
            f"the stream {names} has {rows} rows, fewer than one batch of {batch_size * stream.world_size} "
            f"({batch_size} on each of {stream.world_size} processes). Lower per_device_train_batch_size, or add data."
        )
    # A resumed run draws as many random numbers of torch's own generator as an unbroken one: none here.
    return DataLoader(stream, batch_size, drop_last=True, generator=torch.Generator(), **options)


def rows_that_count(batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Drop the rows with which accelerate fills the last batch of an evaluation on several processes.

    They are those that `gather_for_metrics` drops. A data set without a length keeps them, as it does there.

    Args:
        batch: Tensors of this process, (rows, ...) each, or None.
    """
    state, index = accelerator.gradient_state, accelerator.process_index
    if not state.end_of_dataloader or state.remainder <= 0:
        return dict(batch)
    return {
        name: rows if rows is None else rows[: max(0, state.remainder - index * len(rows))]
        for name, rows in batch.items()
    }
