"""Runs benchmarks on a model: finds their files, checks the counts, measures, and writes a result for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm2clip.encoders import Encoder
from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.counts import check_counts
from llm2clip.evaluation.benchmarks.data import counts_of
from llm2clip.evaluation.length_plot import write_length_plot
from llm2clip.evaluation.results import Result, intervals_of, read_result, require_same, result_path
from llm2clip.evaluation.session import Session, Stopwatch
from llm2clip.evaluation.text_formats import RAW
from llm2clip.utils.processes import on_main_process, process_state
from llm2clip.utils.progress import section

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundBenchmark:
    """A benchmark whose files are there.

    Attributes:
        folder: Their folder.
    """

    benchmark: Benchmark
    folder: Path

    @cached_property
    def reading(self) -> tuple[Any, float]:
        """What the reader of the benchmark returns, and the seconds that it took; the files are read once.

        Raises:
            BenchmarkError: The files are not what was published.
        """
        start = time.monotonic()
        return self.benchmark.read(self.folder), time.monotonic() - start


@dataclass(frozen=True)
class Suite:
    """What is common to the benchmarks of a run.

    Attributes:
        output: Folder of the results.
        text_format: Name of the text format of the sessions.
        allow_counts: Measure sets with other counts than the published ones; the results say so.
        overwrite: Measure again what is finished.
    """

    output: Path
    text_format: str = RAW
    allow_counts: bool = False
    overwrite: bool = False

    def check(self, found: Sequence[FoundBenchmark]) -> None:
        """Read the benchmarks and check their counts, before a model is loaded and hours are spent on the first ones.

        Raises:
            BenchmarkError: The files of a benchmark are not what was published.
        """
        for one in found:
            check_counts(one.benchmark, one.folder, one.reading[0], self.allow_counts)

    def run(self, found: Sequence[FoundBenchmark], session: Session) -> list[Result]:
        """Measure benchmarks one after the other; each result is written when it is there.

        A finished result of the same weights, data and protocol is read instead. Every process of a distributed run
        calls this and gets all results; the first one writes them.

        Raises:
            BenchmarkError: The files of a benchmark are not what was published.
            ValueError: A finished result is of something else.
        """
        results = []
        for number, one in enumerate(found, 1):
            with section(f"{one.benchmark.title} ({number} of {len(found)})"):
                results.append(self.run_one(one, session))
        return results

    def run_one(self, found: FoundBenchmark, session: Session) -> Result:
        """Measure one benchmark, or find its result; see [`run`]."""
        benchmark, watch = found.benchmark, Stopwatch()
        session.watch = watch
        data, seconds = found.reading
        with watch.measure("read"):
            differences = check_counts(benchmark, found.folder, data, self.allow_counts)
            checksum = data_checksum(data)
        watch.seconds["read"] = round(watch.seconds["read"] + seconds, 3)
        setup, model = self.setup(benchmark), describe_model(session.encoder)
        path = self.path(benchmark, session.encoder.name)
        if on_main_process(path.is_file) and not self.overwrite:
            finished = read_finished(path)
            require_same(path, finished, model, checksum, setup)
            if process_state().is_main_process:
                write_length_plot(path.with_suffix(".png"), finished)  # which has no checksum
            logger.info("    %s is finished", path)
            return finished
        with watch.measure("measure"):
            measured = benchmark.protocol.measure(session, data)
        with watch.measure("intervals"):
            intervals = intervals_of(measured)
        result = Result(
            benchmark=benchmark.name,
            title=benchmark.title,
            model=model,
            protocol={**measured.protocol, "text_format": self.text_format},
            scores=measured.scores,
            intervals=intervals,
            counts={**counts_of(data), **measured.counts},
            differences=differences,
            groups=measured.groups,
            data={"folder": str(found.folder), "checksum": checksum},
            setup=setup,
            seconds=watch.seconds,
            processes=process_state().num_processes,
        )
        if process_state().is_main_process:
            # The result comes last: it is the mark of what is finished.
            write_length_plot(path.with_suffix(".png"), result)
            result.write(path)
        return result

    def path(self, benchmark: Benchmark, model: str) -> Path:
        """Return the file of the result of a model."""
        variant = getattr(benchmark.protocol, "variant", "")
        return result_path(self.output, model, benchmark.name, self.text_format, variant)

    def setup(self, benchmark: Benchmark) -> str:
        """Describe the protocol of a benchmark before it measures."""
        options = getattr(benchmark.protocol, "__dict__", {})
        words = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
        return f"{type(benchmark.protocol).__name__}({words}), {self.text_format}"


def find_benchmarks(benchmarks: Sequence[Benchmark], data: Path) -> list[FoundBenchmark]:
    """Find the files of benchmarks below a folder.

    Raises:
        BenchmarkError: Those of some are missing; the message says which, and where they are looked for.
    """
    if not data.is_dir():
        raise BenchmarkError(f"--data {data} is no folder.")
    found = [(benchmark, benchmark.find(data)) for benchmark in benchmarks]
    missing = [missing_files(benchmark, data) for benchmark, folder in found if folder is None]
    if missing:
        names = " ".join(benchmark.name for benchmark, folder in found if folder is None)
        needs = f"`llm2clip evaluate --list --benchmark {names}` shows what is needed."
        raise BenchmarkError(" ".join([*missing, needs]))
    return [FoundBenchmark(benchmark, folder) for benchmark, folder in found if folder is not None]


def missing_files(benchmark: Benchmark, data: Path) -> str:
    """Say what of a benchmark is missing below a folder, in a sentence or two."""
    folder = data / benchmark.folder if (data / benchmark.folder).is_dir() else data
    missing = [marker for marker in benchmark.more_markers if not (folder / marker).exists()]
    forms = benchmark.forms(folder)
    if not any(next(folder.glob(marker), None) for marker in forms):
        missing.insert(0, " or ".join(forms))
    return f"{benchmark.name} lacks {', '.join(missing)} in {folder}. (Source: {benchmark.source.rstrip('.')}.)"


def read_finished(path: Path) -> Result:
    """Read the result of an earlier run.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    try:
        return read_result(path)
    except ValueError as error:
        raise ValueError(f"{error} --overwrite measures again and replaces it.") from error


def describe_model(encoder: Encoder) -> dict[str, str]:
    """What a result says of a model."""
    return {"given": encoder.name, **encoder.identity(), "fingerprint": encoder.fingerprint()}
