"""`llm2clip check-data`, of published sets too: what would stop an evaluation, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from llm2clip.checks import check_data
from llm2clip.checks.row_checks import (
    BROKEN,
    CaptionCheck,
    Check,
    Finding,
    ImageCheck,
    ImageFacts,
    RowFacts,
    TextFaultCheck,
    inspect_image,
)
from llm2clip.checks.token_check import CountingTokenizer, TokenCheck
from llm2clip.command_line.processes import worker_count
from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import check_choices, refuse, setting
from llm2clip.command_line.tables import print_table
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.benchmarks.hub_files import DATA, obtain, require_files
from llm2clip.evaluation.data import BenchmarkData, DataPart
from llm2clip.files.atomic import write_json
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, DamagedImageError

# Settings of a source that mean nothing for a published set.
SOURCE_SETTINGS = (
    "name", "split", "revision", "image_column", "caption_columns", "key_column", "streaming", "max_samples",
    "other_splits", "on_error",
)  # fmt: skip


@dataclass
class CheckConfig(check_data.CheckDataConfig):
    """Settings of a check: of one's own data, SOURCE, or of published sets, `benchmark`."""

    benchmark: list[str] = setting(
        [], "Published sets to check instead of SOURCE: names or groups of `llm2clip evaluate --list`, or all-found."
    )
    data: str = setting(
        DATA,
        "Folder of the published sets. One that is named and not there is fetched from the Hub, if it is there.",
    )
    download: bool = setting(False, "Fetch sets of more than 2 GB too.", affects_numbers=False)

    def __post_init__(self) -> None:
        if not self.benchmark:
            refuse(self, ["data", "download"], "it is for published sets: name them with --benchmark")
            super().__post_init__()
            return
        check_choices(self)
        if self.source:
            raise ValueError("give either SOURCE or benchmark, not both.")
        refuse(self, SOURCE_SETTINGS, "it is for a SOURCE: a published set is read as it was published")


def run(config: CheckConfig) -> None:
    """Check data and print a report; nothing in the data is changed.

    Raises:
        DataFaultsError: There is what stops a run; the report is printed and written before.
        FileNotFoundError, SourceError: The data cannot be read.
        ValueError: There is no such benchmark, or no such folder.
    """
    if not config.benchmark:
        check_data.run(config)
        return
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
        raise check_data.DataFaultsError(" ".join(stopped))


def check_benchmark(
    benchmark: Benchmark,
    data: Path,
    tokenizers: Sequence[CountingTokenizer] = (),
    with_images: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    num_workers: int | None = None,
    download: bool = False,
) -> dict[str, Any]:
    """Find out whether the files of a published set are whole, and what is in them.

    Args:
        data: The folder below which they lie.
        with_images: Decode all images.
        max_pixels: Largest image that can be used, width x height.
        num_workers: Processes that decode images, 0 for none; by default one per core, at most 8.
        download: Fetch a set of more than 2 GB too, if it is not there.

    Returns:
        As JSON values: `title`; `stops`, what would stop an evaluation, in sentences; `published` counts; and if the
        files could be read, `counts` and the parts of `check_data`, whose rows are the images.
    """
    report: dict[str, Any] = {"title": benchmark.title, "published": dict(benchmark.counts), "stops": []}
    try:
        require_files([benchmark], data, download)
        folder = obtain(benchmark, data)
        content = benchmark.load(folder)
    except (OSError, ValueError) as error:
        return report | {"stops": [str(error)]}
    report |= {"folder": str(folder), "counts": content.counts()}
    differences = benchmark.differences(content.counts())
    if differences:
        report["stops"] = [f"there are {', '.join(differences)}."]
    report |= _contents(content, tokenizers, with_images, max_pixels, worker_count(num_workers))
    unusable = report["rows"] - report["usable_rows"]
    if unusable:
        report["stops"].append(f"{unusable:,} of {report['rows']:,} images cannot be used.")
    return report


class InspectedImages(Dataset):
    """What is known about each image of a part of some data, with its key; label maps are read too."""

    def __init__(self, part: DataPart, max_pixels: int) -> None:
        assert part.images is not None
        self.images, self.label_map, self.max_pixels = part.images, part.label_map, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[str, ImageFacts]:
        key = self.images.key(row)
        facts: ImageFacts = self.images.decode(row, lambda value, key, _: inspect_image(value, key, self.max_pixels))
        if self.label_map is not None and facts.fault is None:
            try:
                self.label_map(row)
            except (BenchmarkError, DamagedImageError) as error:
                return key, ImageFacts(fault=BROKEN, reason=f"label map: {error}")
        return key, facts


def _contents(
    content: BenchmarkData,
    tokenizers: Sequence[CountingTokenizer],
    with_images: bool,
    max_pixels: int,
    num_workers: int,
) -> dict[str, Any]:
    parts = content.parts()
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))
    captions = CaptionCheck(columns)
    # Published sets contain empty captions, which stay queries.
    captions.findings["empty captions"] = empty = Finding()
    of_texts: list[Check] = [captions, TextFaultCheck(), TokenCheck(tokenizers)]
    for part in parts:
        for number, (key, *texts) in enumerate(part.rows):
            row = RowFacts(key or str(number), {name: [text] for name, text in zip(part.columns, texts, strict=True)})
            for check in of_texts:
                check.add(row)
            for column, text in zip(part.columns, texts, strict=True):
                if not text.strip():
                    empty.add(row.key, column)
    # Parts may share their images.
    with_images_of = {id(part.images): part for part in parts if part.images is not None}.values()
    sets, image_check = [InspectedImages(part, max_pixels) for part in with_images_of], ImageCheck()
    for images in sets if with_images else ():
        with ProgressBar("Checking images", len(images), "image") as bar:
            for batch in DataLoader(images, check_data.BATCH, num_workers=num_workers, collate_fn=list):
                for key, facts in batch:
                    image_check.add(RowFacts(key, {}, image=facts))
                bar.update(len(batch))
    checks = [*of_texts, *([image_check] if with_images else [])]
    report: dict[str, Any] = {"images": None}
    for check in checks:
        report |= check.summary()
    rows_found = sum(map(len, sets))
    return report | {
        "rows": rows_found,
        "usable_rows": image_check.widths.total() if with_images else rows_found,
        "findings": {name: vars(finding) for check in checks for name, finding in check.findings.items()},
    }


def print_report(report: dict[str, Any]) -> None:
    """Print a report of [`check_benchmark`] as tables."""
    console = Console(markup=False, emoji=False, highlight=False)
    if "counts" in report:
        names = dict.fromkeys([*report["published"], *report["counts"]])
        both = (report["counts"], report["published"])
        rows = [[name, *(f"{side[name]:,}" if name in side else "" for side in both)] for name in names]
        print_table(console, f"{report['title']}, counts", ("", "found", "published"), rows)
        check_data.print_tables(report, f"{report['title']} in {report['folder']}")
    for sentence in report["stops"]:
        console.print(f"{report['title']}: {sentence}", soft_wrap=True)
