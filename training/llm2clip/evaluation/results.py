"""Results: a file for each model, benchmark, prompts and text format, and their tables on the terminal."""

from __future__ import annotations

import glob
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from rich.console import Console

from llm2clip.command_line.tables import in_percent, print_table, score_columns, short_name
from llm2clip.evaluation.text_formats import RAW
from llm2clip.files.atomic import write_json
from llm2clip.files.manifests import read_checked, with_checksum
from modeling_llm2clip import __version__

SCHEMA_VERSION = 1


@dataclass
class Result:
    """What was measured of a model on a benchmark: the fields of the files of `llm2clip evaluate`.

    Attributes:
        benchmark, title: Name of the benchmark on the command line and in tables.
        model: `Encoder.identity`, with `given`, how the user named the model, `fingerprint`, and `truncate_dim` and
            `precision` if embeddings were cut or rounded.
        protocol: Its `id` and options; columns of a report are of one protocol.
        scores: 0 to 1.
        compared: Names of those that reports compare.
        intervals: 95% interval of scores, `[low, high]`; see [`bootstrap_interval`].
        counts: Images, texts, queries, ties, truncated texts.
        data: `checksum` of the data, see `data_checksum`, and where it lies: `folder`, or the fields of a source.
        setup: What was asked for: protocol, its options and the text format. A finished result is compared by it.
        differences: How the data differs from the published counts, in words; empty if it does not.
        groups: Scores by kind and part: by language, length or class.
        ranks: Mean and median ranks, from 1.
        seconds: Time by part: `read`, `images`, `texts`, `measure` (the rest of the protocol) and `intervals`.
        versions: Of python and packages.
        processes: How many processes shared the work.
        schema_version: Of this file.
    """

    benchmark: str
    title: str
    model: dict[str, str]
    protocol: dict[str, Any]
    scores: dict[str, float]
    compared: list[str]
    intervals: dict[str, list[float]]
    counts: dict[str, int]
    data: dict[str, Any]
    setup: dict[str, Any]
    differences: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    processes: int = 1
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write the JSON file with its checksum, complete or not at all."""
        content = asdict(self)
        write_json(path, with_checksum({"schema_version": content.pop("schema_version"), **content}))


def read_result(path: Path) -> Result:
    """Read a file of results.

    Raises:
        ValueError: The file is no such file, is damaged, or is of another version of the schema.
    """
    content = read_checked(path, by_hand=True)
    try:
        if content.get("schema_version") != SCHEMA_VERSION:
            raise TypeError(f"its version is {content.get('schema_version')}")
        return Result(**content)
    except TypeError as error:
        raise ValueError(f"{path} is not a result of schema version {SCHEMA_VERSION}: {error}.") from error


def read_results(name: str) -> Iterator[tuple[str, Result]]:
    """Read a result file, those of a pattern, or all in a folder, with their paths.

    Raises:
        FileNotFoundError: There is none.
        ValueError: See [`read_result`].
    """
    pattern = str(Path(glob.escape(name), "*.json")) if Path(name).is_dir() else name
    # A shell that does not expand patterns hands them on.
    paths = [name] if Path(name).is_file() else sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"there is no result file {pattern}.")
    for path in paths:
        yield path, read_result(Path(path))


def result_path(output: Path, model: str, benchmark: str, text_format: str, *variants: str) -> Path:
    """Return the file of a result in a folder, such as `openai--clip-vit-large-patch14.urban1k.raw.json`.

    Args:
        variants: What the user chose instead of what model and benchmark have, such as `paper`, a set of templates.
    """
    benchmark = re.sub(r"(\[\d*%?):", r"\1to", benchmark)  # the slices [:10] and [10:] of a split
    name, of = (re.sub(r"[^\w.-]+", "--", part).strip("-.") for part in (model, benchmark))
    return output / ".".join([name, of, *filter(None, variants), text_format, "json"])


def package_versions() -> dict[str, str]:
    """Versions of python and of the packages on which numbers depend."""
    modules: Sequence[Any] = (torch, transformers, numpy)
    versions = {module.__name__: str(module.__version__) for module in modules}
    return {"llm2clip": __version__, "python": platform.python_version(), **versions}


def require_same(
    path: Path, finished: Result, model: Mapping[str, str], checksum: str, setup: Mapping[str, Any]
) -> None:
    """Check that a finished result is of the weights, the data and the protocol that are to be measured.

    Raises:
        ValueError: It is not; the message names the parts that differ.
    """
    known = {
        "weights or preprocessing of the model": (finished.model.get("fingerprint"), model["fingerprint"]),
        "dtype": (finished.model.get("dtype"), model["dtype"]),
        "data": (finished.data.get("checksum"), checksum),
        "options of the protocol": (finished.setup, setup),
    }
    changed = [part for part, (old, new) in known.items() if old != new]
    if changed:
        raise ValueError(
            f"{path} is a finished result, but since then there is a change of the {' and of the '.join(changed)}. "
            "--overwrite replaces it; another --output keeps both."
        )


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print one table for each protocol: scores in percent, and the interval of the first.

    Results of different protocols or text formats never share a table.
    """
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(f"{protocol_words(result)}|{list(result.scores)}", []).append(result)
    several = len({result.model["given"] for result in results}) > 1
    names = {(result.title, result.benchmark) for result in results}

    def title_of(result: Result) -> str:
        """Return the title, and the name where several sets have it (the files of COCO)."""
        is_one = sum(title == result.title for title, _ in names) == 1
        return result.title if is_one else f"{result.title} ({result.benchmark})"

    for rows in tables.values():
        columns = score_columns(list(rows[0].scores))
        first, *others = columns
        lines = []
        for result in rows:
            cells, interval = in_percent(result.scores, columns), result.intervals.get(next(iter(result.scores)))
            ends = "" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
            lines.append([*[result.model["given"]] * several, title_of(result), cells[0], ends, *cells[1:]])
        title = "In %" if several else f"{rows[0].model['given']}, in %"
        heads = [*["model"] * several, "benchmark", first, "95%", *others]
        print_table(console, title, heads, lines, range(1 + several))
        words = f"Protocol: {protocol_words(rows[0])}. 95%: interval of the first."
        console.print(words, markup=False, soft_wrap=True)
    for result in results:
        remarks = "; ".join(remarks_on(result))
        if remarks:
            name = f"{result.model['given']}, {title_of(result)}" if several else title_of(result)
            console.print(f"{name}: {remarks}.", markup=False, soft_wrap=True)


def remarks_on(result: Result) -> list[str]:
    """Say what to know of the numbers of a result: ranks, ties, cut and empty texts, counts unlike the published."""
    remarks = [f"{short_name(name)} {value:,.4g}" for name, value in result.ranks.items()]
    ties = sum(count for name, count in result.counts.items() if name.startswith("tied_"))
    cut, empty, skipped = (result.counts.get(name, 0) for name in ("truncated_texts", "empty_texts", "skipped_images"))
    counted = [
        (ties, "tied query", "tied queries"),
        (cut, "text cut at its end", "texts cut at their end"),
        (empty, "empty text", "empty texts"),
        (skipped, "image skipped", "images skipped"),
    ]
    remarks += [f"{count:,} {singular if count == 1 else plural}" for count, singular, plural in counted if count]
    if result.differences:
        remarks.append(f"not the published set, {', '.join(result.differences)}")
    return remarks


def notes_on(result: Result) -> list[str]:
    """Say what is unusual about a result, or has no usual value: its templates, its text format, other data."""
    notes = [str(result.protocol["templates"])] if "templates" in result.protocol else []
    text_format = result.protocol.get("text_format", RAW)
    if text_format != RAW:
        notes.append(f"text format {text_format}")
    return notes + ([f"not the published set: {', '.join(result.differences)}"] if result.differences else [])


def protocol_words(result: Result) -> str:
    """Describe a protocol in words, such as `retrieval, positives rows, ties expected value, text format raw`."""
    options = {name.replace("_", " "): value for name, value in result.protocol.items() if name not in ("id", "name")}
    words = [
        f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in options.items()
    ]
    return ", ".join([str(result.protocol.get("name", "")), *words])
