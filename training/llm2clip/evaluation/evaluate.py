"""The `llm2clip evaluate` command: models on published benchmarks and on your own data."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.command_line.logs import print_whole
from llm2clip.command_line.processes import on_main_process, process_state, worker_count
from llm2clip.command_line.progress import section
from llm2clip.command_line.settings import build_config, refuse
from llm2clip.data import CaptionSource, PairSource
from llm2clip.data.sources import Source
from llm2clip.encoders import Encoder, OurEncoder
from llm2clip.encoders.load import load_encoder
from llm2clip.encoders.stored import open_stored_encoder
from llm2clip.evaluation.benchmark import GROUPS, Benchmark, BenchmarkError, BenchmarkProtocol
from llm2clip.evaluation.benchmarks import ALL_FOUND, all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.hub_files import obtain, require_files
from llm2clip.evaluation.benchmarks.listing import list_benchmarks, overview
from llm2clip.evaluation.bootstrap import intervals_of
from llm2clip.evaluation.evaluate_config import OWN_DATA, EvaluateConfig
from llm2clip.evaluation.own_data import OwnData, is_own_data, own_benchmark, plain_path
from llm2clip.evaluation.prompts import with_prompts
from llm2clip.evaluation.protocols import open_protocol
from llm2clip.evaluation.results import Result, print_results, read_result, require_same, result_path
from llm2clip.evaluation.session import Session
from llm2clip.evaluation.text_formats import RAW, format_captions
from llm2clip.files.atomic import require_writable
from llm2clip.models.places import OPEN_CLIP, is_repo, require_model_place
from llm2clip.models.repos import RepoKind, inspect_repo
from llm2clip.models.towers import open_text_tower

logger = logging.getLogger(__name__)

# Settings by which a model is opened.
NAMED_MODEL_SETTINGS = ("revision", "dtype", "truncate_dim", "precision", "embedding_cache")
# Protocols that read the vision tower before its embedding.
WITHOUT_EMBEDDINGS = ("linear-probe", "maskclip")
Measured = str | Path | Benchmark | CaptionSource | PairSource


@dataclass
class LoadedBenchmark:
    """A benchmark whose data has been read and checked.

    Attributes:
        folder: Where the data was found.
        data: What the benchmark's reader returned, in the text format of the run.
        checksum: Of what it returned; see [`data_checksum`].
        text_format: RAW for data without captions.
        differences: How the data differs from what was published, in words.
        seconds: How long reading took.
    """

    benchmark: Benchmark
    protocol: BenchmarkProtocol
    folder: Path
    data: Any
    checksum: str
    text_format: str
    differences: list[str]
    seconds: float

    @property
    def protocol_id(self) -> str:
        """The stable id of the protocol; of one of your own its `id`, or else the name of its class."""
        given = self.benchmark.protocol
        return given if isinstance(given, str) else getattr(given, "id", type(given).__name__)

    @property
    def setup(self) -> dict[str, Any]:
        """The protocol by its id, its options and the text format, as JSON values."""
        options = dict(sorted(getattr(self.protocol, "__dict__", {}).items()))
        return json.loads(
            json.dumps({"protocol": self.protocol_id, "options": options, "text_format": self.text_format})
        )

    def path(self, output: Path, model: str, cut: Iterable[Any]) -> Path:
        """Return the file of the result of a model, whose embeddings may be cut (the values of [`Encoder.cut`])."""
        variants = *map(str, cut), getattr(self.protocol, "variant", "")
        return result_path(output, model, self.benchmark.name, self.text_format, *variants)


def evaluate(
    model: str | Path | Encoder | Sequence[str | Path | Encoder],
    benchmark: Measured | Sequence[Measured],
    *,
    output: str | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure models on published benchmarks and on your own data, as `llm2clip evaluate` does.

    Args:
        model: Models, one or several: names as on the command line, or encoders of [`load_encoder`].
        benchmark: Names as on the command line, a `CaptionSource` of your own images and captions, a `PairSource` of
            your own captions, or benchmarks; one or several.
        output: Folder of the results and embeddings, which later calls find again; None writes nothing.
        settings: Other fields of `llm2clip evaluate`, such as `data`, the folder of the published sets.

    Returns:
        A result for each model and benchmark: `scores` by name, 0 to 1, their `intervals`, `counts` and `protocol`.

    Raises:
        BenchmarkError: The files of a benchmark are missing, or are not what was published.
        OSError: There is no such model, or results cannot be written.
        ValueError: A setting or name is wrong, or a finished result is of something else.
    """
    models: Sequence[Any] = [model] if isinstance(model, str | Path | Encoder) else model
    chosen: Sequence[Any] = [benchmark] if isinstance(benchmark, str | Path | Benchmark | Source) else benchmark
    models, chosen = (
        [str(entry) if isinstance(entry, Path) else entry for entry in entries] for entries in (models, chosen)
    )
    names = [entry if isinstance(entry, str) else entry.name for entry in models]
    given = [name for name in NAMED_MODEL_SETTINGS if settings.get(name) is not None]
    if given and not all(isinstance(entry, str) for entry in models):
        raise ValueError(f"{given[0]} is for models by name; load_encoder has opened yours with settings of its own.")
    fields = {"model": names, "output": output, **settings}
    return list(_measure(build_config(EvaluateConfig, fields, "evaluate"), models, chosen))


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure models and print the results, which are also written; or print the list of the published sets.

    Raises:
        BenchmarkError, OSError, ValueError: See [`evaluate`].
    """
    if config.list:
        data = Path(config.data)
        # What reads the lines of a file or a pipe gets them whole.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        if config.benchmark:
            print_whole(list_benchmarks(choose_benchmarks(config.benchmark, data, missing_too=True), data))
        else:
            print_whole(overview(all_benchmarks().values(), data, width))
        return {}
    if not config.model or not config.benchmark:
        raise ValueError(
            "evaluate needs a model and what to measure: llm2clip evaluate MODEL --benchmark NAME_OR_PATH "
            "(`llm2clip evaluate --list` shows the published sets)."
        )
    results = list(_measure(config, config.model, config.benchmark))
    if process_state().is_main_process:
        print_results(Console(), results)
    return {"results": config.output} if config.output else {}


def _measure(config: EvaluateConfig, models: Sequence[Any], benchmarks: Sequence[Any]) -> Iterator[Result]:
    """Measure models on benchmarks one after the other; each result is written when it is there.

    A finished result of the same weights, data and protocol is read instead. Every process of a distributed run gets
    all results; the first one writes them.
    """
    if config.revision is not None and len(models) > 1:
        raise ValueError(f"revision is {config.revision}, but there are {len(models)} models: give one.")
    # Names first, then data, before a model is loaded and hours are spent. `runs/a/` is `runs/a`.
    models = [plain_path(model) if isinstance(model, str) else model for model in models]
    chosen = _choose(config, benchmarks)
    for model in models:
        if isinstance(model, str):
            inspect_repo(model, config.revision) if is_repo(model) else require_model_place(model)
    loaded = load_benchmarks(config, chosen)
    output = None if config.output is None else Path(config.output)
    store = Path(config.embeddings) if config.embeddings else output and output / "embeddings"
    if output is not None and store is not None:
        kept: Any = [value for value in (config.truncate_dim, config.precision) if value not in (None, "float32")]
        names = [(model, kept) if isinstance(model, str) else (model.name, model.cut.values()) for model in models]
        paths = [entry.path(output, name, values) for entry in loaded for name, values in names]
        # What is finished is shown from folders that are read-only too.
        if config.overwrite or not all(path.is_file() for path in paths):
            require_writable(output)
            require_writable(store)
    is_main = process_state().is_main_process
    texts_alone = all(entry.protocol_id == "caption-retrieval" for entry in loaded)
    for model in models:
        encoder = model
        if isinstance(model, str):
            encoder = _open_encoder(config, model, texts_alone).truncate(config.truncate_dim, config.precision)
        session = Session(encoder, store, config.batch_size, worker_count(config.num_workers), config.on_error)
        cut = {name: str(value) for name, value in encoder.cut.items()}
        described = {"given": encoder.name, **encoder.identity(), "fingerprint": encoder.fingerprint(), **cut}
        for number, entry in enumerate(loaded, 1):
            path = None if output is None else entry.path(output, encoder.name, cut.values())
            session.seconds = {"read": entry.seconds}
            with section(f"{entry.benchmark.title} ({number} of {len(loaded)})"):
                if path is not None and on_main_process(path.is_file) and not config.overwrite:
                    yield _finished(path, described, entry.checksum, entry.setup)
                    continue
                with session.timed("measure"):
                    measured = entry.protocol.measure(session, entry.data)
                with session.timed("intervals"):
                    intervals = intervals_of(measured)
            skipped = measured.counts.get("skipped_images", 0)
            unread = [f"{skipped:,} images cannot be read"] if skipped and entry.benchmark.counts else []
            result = Result(
                benchmark=entry.benchmark.name,
                title=entry.benchmark.title,
                model=described,
                protocol={"id": entry.protocol_id, **measured.protocol, "text_format": entry.text_format},
                scores=measured.scores,
                compared=list(measured.compared),
                intervals=intervals,
                counts={**entry.data.counts(), **measured.counts},
                differences=entry.differences + unread,
                groups=measured.groups,
                ranks=measured.ranks,
                data={**entry.benchmark.describe(entry.folder), "checksum": entry.checksum},
                setup=entry.setup,
                seconds=session.seconds,
                processes=process_state().num_processes,
            )
            if path is not None and is_main:
                result.write(path)
            yield result
        del encoder, session  # the next model may need their memory


def _finished(path: Path, model: Mapping[str, str], checksum: str, setup: Mapping[str, Any]) -> Result:
    try:
        finished = read_result(path)
    except ValueError as error:
        raise ValueError(f"{error} --overwrite measures again and replaces it.") from error
    require_same(path, finished, model, checksum, setup)
    logger.info("    %s is finished", path)
    return finished


def _choose(config: EvaluateConfig, given: Sequence[Any]) -> list[Benchmark]:
    settings = {name: getattr(config, name) for name in OWN_DATA}
    chosen: dict[str, Benchmark] = {}
    by_path, require_files = False, config.on_error == "raise"
    for entry in given:
        if isinstance(entry, Benchmark):
            benchmarks = [entry]
        elif isinstance(entry, CaptionSource | PairSource):
            task = "retrieval" if isinstance(entry, CaptionSource) else "caption_retrieval"
            benchmarks = [own_benchmark(vars(entry), task, config.positives, require_files)]
        elif entry not in (*all_benchmarks(), *GROUPS, ALL_FOUND) and is_own_data(entry):
            by_path = True
            anchors = {"anchor_column": settings["query_column"], "positive_column": settings["target_column"]}
            fields = {name: settings[name] for name in ("split", "image_column", "caption_columns")}
            source = json.loads(entry) if entry.startswith("{") else entry
            benchmarks = [own_benchmark(source, config.task, config.positives, require_files, **fields, **anchors)]
        else:
            benchmarks = choose_benchmarks([entry], Path(config.data))
        for benchmark in benchmarks:
            known = chosen.setdefault(benchmark.name, benchmark)
            if isinstance(benchmark, OwnData) and isinstance(known, OwnData) and benchmark.fields != known.fields:
                raise ValueError(f"two sources are called {benchmark.name}, as their results would be: use two calls.")
    # A source has all but the rule of what is right.
    followed = OWN_DATA if by_path else ("positives",)[: any(isinstance(entry, CaptionSource) for entry in given)]
    names = [name for name in OWN_DATA if name not in followed]
    refuse(config, names, f"none of {', '.join(chosen)} is your own data by path")
    return with_prompts(list(chosen.values()), config.templates, config.classnames)


def load_benchmarks(config: EvaluateConfig, benchmarks: Sequence[Benchmark]) -> list[LoadedBenchmark]:
    """Find, read and check the data of benchmarks.

    Raises:
        BenchmarkError: Files are missing (the message says which, and where they are looked for), or are not what was
            published.
        ValueError: A setting does nothing for these benchmarks.
    """
    located = find_benchmarks(benchmarks, Path(config.data), config.download)
    loaded = []
    for benchmark, folder in located:
        start = time.monotonic()
        data = benchmark.load(folder)
        differences = benchmark.differences(data.counts())
        if differences and not config.allow_counts:
            raise BenchmarkError(
                f"{benchmark.title} in {folder} has {', '.join(differences)}: its numbers could not be compared with "
                "published ones. With --allow-counts it is measured all the same, and the result says so."
            )
        formatted = format_captions(data, config.text_format)
        text_format = RAW if formatted is data else config.text_format
        protocol, checksum = open_protocol(benchmark.protocol, benchmark.options), data_checksum(data)
        seconds = round(time.monotonic() - start, 3)
        told = [*benchmark.differs, *differences]
        loaded.append(LoadedBenchmark(benchmark, protocol, folder, formatted, checksum, text_format, told, seconds))
    names = ", ".join(benchmark.name for benchmark in benchmarks)
    if config.text_format != RAW and all(entry.text_format == RAW for entry in loaded):
        raise ValueError(f"text_format is {config.text_format}, but {names} has no captions: leave it out.")
    others = [entry.benchmark.name for entry in loaded if entry.protocol_id != "retrieval"]
    without = [
        entry.benchmark.name
        for entry in loaded
        if getattr(entry.protocol, "each", entry.protocol_id).startswith(WITHOUT_EMBEDDINGS)
    ]
    if without and (config.truncate_dim is not None or config.precision != "float32"):
        raise ValueError(f"{', '.join(without)} compares no embeddings: leave out truncate_dim and precision.")
    if config.on_error == "skip" and others:
        raise ValueError(f"on_error is skip, but {', '.join(others)} needs every image: leave it out.")
    return loaded


def find_benchmarks(
    benchmarks: Sequence[Benchmark], data: Path, download: bool = False
) -> list[tuple[Benchmark, Path]]:
    """Find the files of benchmarks, or fetch them; see [`load_benchmarks`].

    Args:
        download: Sets of more than 2 GB are fetched too.
    """
    require_files(benchmarks, data, download)
    return [(benchmark, obtain(benchmark, data)) for benchmark in benchmarks]


def _open_encoder(config: EvaluateConfig, name: str, texts_alone: bool) -> Encoder:
    device = process_state().device
    if config.embedding_cache is not None:
        return open_stored_encoder(name, config.embedding_cache, config.revision, config.dtype, device)
    if texts_alone and not name.startswith(OPEN_CLIP) and ".py:" not in name:
        repo = inspect_repo(name, config.revision)
        if repo.kind in (RepoKind.OTHER, RepoKind.ADAPTER) and "vision_config" not in repo.config:
            llm: Any
            llm, tokenizer = open_text_tower(name, revision=config.revision, dtype=config.dtype)  # a plain LLM
            return OurEncoder(llm.to(device).eval(), tokenizer, name, config.revision)
    return load_encoder(name, config.revision, config.dtype, device)
