"""The `llm2clip evaluate` command: a model on published benchmarks, or on a data set of one's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.listing import list_benchmarks, overview
from llm2clip.evaluation.evaluate_config import OWN_DATA, EvaluateConfig
from llm2clip.evaluation.own_data import described, measure_caption_retrieval, measure_retrieval
from llm2clip.evaluation.protocols.classification import with_prompts
from llm2clip.evaluation.results import Result
from llm2clip.evaluation.results_table import print_results
from llm2clip.evaluation.session import Session
from llm2clip.evaluation.suite import Suite, find_benchmarks
from llm2clip.evaluation.text_formats import choose_text_format
from llm2clip.utils.files import read_json, require_writable, write_json
from llm2clip.utils.manifests import with_checksum
from llm2clip.utils.processes import process_state, worker_count

DATA_FOLDER, RESULTS_FOLDER = "benchmarks", "results"


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model.

    Returns:
        On one's own data the protocol and the metrics; see `retrieval_metrics` and `caption_retrieval_metrics`.
        Benchmarks print tables, and the list prints itself.

    Raises:
        ValueError: A required setting is missing, or the output is of the wrong kind.
        OSError: The output cannot be written, or is a file that is no result.
    """
    if config.list:
        print(describe_list(config))
        return {}
    for name in ("model",) if config.benchmark else ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"evaluate needs {name}; give it as an option (--{name}).")
    if config.benchmark:
        run_benchmarks(config)
        return {}
    if config.output:
        if Path(config.output).is_dir():
            raise ValueError(f"output is the folder {config.output}, but results on your own data are a JSON file.")
        _refuse_other_file(Path(config.output))
        require_writable(Path(config.output).parent)
    metrics = measure_retrieval(config) if config.task == "retrieval" else measure_caption_retrieval(config)
    if config.output and process_state().is_main_process:
        write_json(config.output, with_checksum(described(config, metrics)))
    return {"protocol": config.protocol or OWN_DATA, **metrics}


def _refuse_other_file(path: Path) -> None:
    if not path.exists():
        return
    try:
        is_result = "task" in read_json(path)
    except ValueError:
        is_result = False
    if not is_result:
        raise FileExistsError(f"{path} exists and is no result of evaluate, so it is not replaced; name another file.")


def describe_list(config: EvaluateConfig) -> str:
    """Describe the chosen benchmarks in detail, or all in a line each.

    Raises:
        ValueError: A benchmark is unknown.
    """
    data = _benchmark_folder(config)
    if config.benchmark:
        return list_benchmarks(choose_benchmarks(config.benchmark, data, missing_too=True), data)
    # What reads the lines of a file or a pipe gets them whole.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return overview(all_benchmarks().values(), data, width)


def run_benchmarks(config: EvaluateConfig) -> list[Result]:
    """Measure benchmarks and print the results, which are also written; see [`Suite`].

    Raises:
        ValueError: A benchmark is unknown, its files are missing or not what was published, or a finished result is of
            something else.
        OSError: Results cannot be written.
    """
    data, output = _benchmark_folder(config), Path(config.output or RESULTS_FOLDER)
    text_format = choose_text_format(config.text_format)
    chosen = with_prompts(choose_benchmarks(config.benchmark, data), config.templates, config.classnames)
    found = find_benchmarks(chosen, data)
    suite = Suite(output, config.text_format, config.allow_counts, config.overwrite)
    suite.check(found)
    store = Path(config.embeddings) if config.embeddings else output / "embeddings"
    # Finished results are also shown from a folder that is read-only.
    if config.overwrite or not all(suite.path(one.benchmark, config.model).is_file() for one in found):
        for folder in (output, store):
            require_writable(folder)
    encoder = load_encoder(config.model, config.revision, config.dtype, process_state().device)
    session = Session(
        encoder,
        store,
        text_format,
        config.batch_size,
        worker_count(config.num_workers),
    )
    results = suite.run(found, session)
    if process_state().is_main_process:
        print_results(Console(), results)
        print(f"Results: {output}")
    return results


def _benchmark_folder(config: EvaluateConfig) -> Path:
    if isinstance(config.data, dict):
        raise ValueError("data has to be the folder of the benchmarks with --benchmark or --list.")
    return Path(config.data or DATA_FOLDER)
