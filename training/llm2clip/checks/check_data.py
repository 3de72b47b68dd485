"""The `llm2clip check-data` command: what is in a data set or a published set, and what is wrong with it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from llm2clip.checks.check_benchmark import check_benchmark, print_report
from llm2clip.checks.near_duplicates import HashCheck, near_duplicates, perceptual_hash
from llm2clip.checks.row_checks import (
    BATCH,
    CaptionCheck,
    Check,
    ImageCheck,
    RowCheck,
    RowReader,
    TextFaultCheck,
    report_of,
)
from llm2clip.checks.tables import print_tables
from llm2clip.checks.token_check import CountingTokenizer, TokenCheck
from llm2clip.command_line.processes import worker_count
from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import check_choices, refuse, setting
from llm2clip.data import CaptionImageDataset, CaptionSource, OnError
from llm2clip.data.rows import captioned_row
from llm2clip.data.shards import ShardedSource
from llm2clip.data.streams import data_worker
from llm2clip.data.table_identity import data_revision
from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.benchmarks.hub_files import DATA, require_files
from llm2clip.files.atomic import write_json
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS

# Settings of a source that mean nothing for a published set.
SOURCE_SETTINGS = (
    "name", "split", "revision", "image_column", "caption_columns", "key_column", "streaming", "max_samples",
    "other_splits", "on_error",
)  # fmt: skip


class DataFaultsError(ValueError):
    """The data was checked, and has faults that stop a run."""

    exit_status = 1


@dataclass
class CheckDataConfig:
    """Settings of a check: of one's own data, SOURCE, or of published sets, `benchmark`.

    A field of the source that is not set is that of SOURCE or the default of CaptionSource.
    """

    source: dict[str, Any] | str = setting(
        "", "The data: a path or Hub id, or a mapping with the fields of CaptionSource."
    )
    name: str | None = setting(None, "Configuration, if the data set has several.")
    split: str | None = setting(None, "Split; by default train.")
    revision: str | None = setting(None, "Branch, tag or commit on the Hub.")
    image_column: str | None = setting(
        None, "Column of the images; by default image, or jpg, png, ... of webdataset shards."
    )
    caption_columns: list[str] | None = setting(None, "Columns of the captions; by default caption, txt or text.")
    key_column: str | None = setting(
        None, "Column that identifies a row; by default key or __key__, else the row number."
    )
    streaming: bool | None = setting(None, "Read the data as a stream instead of preparing a local copy.")
    max_samples: int | None = setting(None, "Check only the first rows.")
    no_images: bool = setting(False, "Check the captions alone.")
    max_pixels: int = setting(DEFAULT_MAX_PIXELS, "Largest image that can be used, width x height.")
    num_workers: int | None = setting(
        None, "Processes that read rows and decode images; by default one per core, at most 8."
    )
    on_error: OnError = setting(
        "raise",
        "raise: end with status 1 if rows cannot be used, as a run with on_error: raise does; skip: only if none can.",
    )
    tokenizer: list[str] = setting(
        [], "Tokenizers: Hub ids or folders; NAME:512 sets a length. How many captions does each of them cut?"
    )
    other_splits: list[str] = setting(
        [], "Splits, such as test, whose pictures must not be in this one; they are found by perceptual hash."
    )
    output: str | None = setting(None, "JSON file to which the report is also written.")
    benchmark: list[str] = setting(
        [], "Published sets to check instead of SOURCE: names or groups of `llm2clip evaluate --list`, or all-found."
    )
    data: str = setting(
        DATA,
        "Folder of the published sets. One that is named and not there is fetched from the Hub, if it is there.",
    )
    download: bool = setting(False, "Fetch sets of more than 2 GB too.", affects_numbers=False)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.benchmark:
            if self.source:
                raise ValueError("give either SOURCE or benchmark, not both.")
            refuse(self, SOURCE_SETTINGS, "it is for a SOURCE: a published set is read as it was published")
            return
        refuse(self, ["data", "download"], "it is for published sets: name them with --benchmark")
        if not self.source:
            raise ValueError("the data is missing: llm2clip check-data SOURCE, or --benchmark NAME --data FOLDER")
        if self.other_splits and self.no_images:
            raise ValueError("other_splits compares pictures, which no_images leaves out; drop one of them.")

    def caption_source(self) -> CaptionSource:
        """Return the source with the fields that are set here."""
        fields = dict(self.source) if isinstance(self.source, dict) else {"path": self.source}
        names = ("name", "split", "revision", "image_column", "caption_columns", "key_column", "streaming")
        given = {name: getattr(self, name) for name in (*names, "max_samples")}
        return CaptionSource.from_dict(fields | {name: value for name, value in given.items() if value is not None})


def run(config: CheckDataConfig) -> None:
    """Check data and print a report; nothing in the data is changed.

    Raises:
        DataFaultsError: There is what stops a run; the report is printed and written before.
        FileNotFoundError, SourceError: The data cannot be read.
        ValueError: There is no such benchmark, or no such folder.
    """
    if config.benchmark:
        _check_benchmarks(config)
    else:
        _check_source(config)


def _check_benchmarks(config: CheckDataConfig) -> None:
    folder = Path(config.data)
    benchmarks = choose_benchmarks(config.benchmark, folder)
    if not folder.is_dir():
        require_files(benchmarks, folder, config.download)
    tokenizers = [CountingTokenizer(name) for name in config.tokenizer]
    reports = {
        benchmark.name: check_benchmark(
            benchmark,
            folder,
            tokenizers,
            not config.no_images,
            config.max_pixels,
            config.num_workers,
            config.download,
        )
        for benchmark in benchmarks
    }
    if config.output:
        write_json(config.output, {"benchmarks": reports})
    for report in reports.values():
        print_report(report)
    stopped = [f"{name}: {' '.join(report['stops'])}" for name, report in reports.items() if report["stops"]]
    if stopped:
        raise DataFaultsError(" ".join(stopped))


def _check_source(config: CheckDataConfig) -> None:
    source = config.caption_source()
    report = check_data(
        source, not config.no_images, config.max_pixels, config.num_workers, config.tokenizer, config.other_splits
    )
    if config.output:
        write_json(config.output, report)
    print_tables(report, f"{source.path}, split {source.split}")
    rows, usable = report["rows"], report["usable_rows"]
    if rows == 0:
        raise DataFaultsError(f"{source.path} (split {source.split}) has no rows.")
    if usable < rows and (config.on_error == "raise" or usable == 0):
        raise DataFaultsError(
            f"{rows - usable:,} of {rows:,} rows cannot be used. They stop a run with on_error: raise; on_error: skip "
            "leaves them out."
        )


def check_data(
    source: CaptionSource,
    with_images: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    num_workers: int | None = None,
    tokenizers: Sequence[str] = (),
    other_splits: Sequence[str] = (),
) -> dict[str, Any]:
    """Find out what is in a data set of captions and images, and what is wrong with it.

    Args:
        with_images: Decode all images.
        max_pixels: Largest image that can be used, width x height.
        num_workers: Processes that read rows and decode images, 0 for none; by default one per core, at most 8.
        tokenizers: Hub ids or folders of tokenizers, with which the captions' tokens are counted.
        other_splits: Splits whose pictures are looked for in this one.

    Returns:
        The report, as JSON values: `data` (fields of the source and its revision), `rows`, `usable_rows`, `captions`,
        `tokens` (by tokenizer), `images` (without images None) and `findings` (number, whether such a row cannot be
        used, first examples).

    Raises:
        FileNotFoundError, SourceError: The data cannot be read.
        ModuleNotFoundError: Splits are to be compared, and the library of perceptual hashes is not installed.
        OSError, ValueError: There is no such tokenizer.
    """
    token_check = TokenCheck([CountingTokenizer(name) for name in tokenizers])
    hashes, others = HashCheck(), {split: HashCheck() for split in other_splits}
    if others:
        importlib.import_module("imagehash")
    reader = RowReader(max_pixels, perceptual_hash if others else None)
    for split, other in others.items():
        feed_rows(open_rows(replace(source, split=split), with_images), reader, source.path, [other], num_workers)
    rows = open_rows(source, with_images)  # says which the columns are
    checks: list[Check] = [RowCheck(), CaptionCheck(source.caption_columns), TextFaultCheck(), token_check]
    if with_images:
        checks.append(ImageCheck())
    feed_rows(rows, reader, source.path, [*checks, hashes], num_workers)
    report = {"data": {**vars(source), "revision": data_revision(vars(source))}, **report_of(checks)}
    for split, other in others.items():
        report["findings"][f"images that are also in {split}"] = vars(near_duplicates(hashes, other))
    return report


class StreamedRows(IterableDataset):
    """The rows of a stream, whose files, or first rows, the DataLoader workers share."""

    def __init__(self, source: CaptionSource, with_images: bool) -> None:
        self.files = ShardedSource(source, with_images=with_images)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file, number, values in self.files.share(*data_worker()):
            yield captioned_row(values, self.files.columns, self.files.row_name(file, number))


def open_rows(source: CaptionSource, with_images: bool) -> CaptionImageDataset | StreamedRows:
    """Open a source; see [`check_data`] for errors."""
    return StreamedRows(source, with_images) if source.streaming else CaptionImageDataset(source, 0, with_images)


def feed_rows(
    rows: CaptionImageDataset | StreamedRows,
    reader: RowReader,
    name: str,
    checks: Sequence[Check],
    num_workers: int | None,
) -> None:
    """Feed all rows of a source to checks; the order of a stream depends on the number of workers."""
    workers, total = worker_count(num_workers), None
    if isinstance(rows, CaptionImageDataset):
        total = len(rows)
    elif rows.files.source.max_samples is None:
        workers = min(workers, len(rows.files.files))
    with ProgressBar(f"Checking {name}", total, "row") as bar:
        for batch in DataLoader(rows, BATCH, num_workers=workers, collate_fn=reader.read_all):
            for row in batch:
                for check in checks:
                    check.add(row)
            bar.update(len(batch))
