"""Files of results: one for each model, benchmark, prompts and text format; they say whether two may be compared."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy
import torch
import transformers

from llm2clip.evaluation.bootstrap import bootstrap_intervals, bootstrap_ratios
from llm2clip.evaluation.contracts import Measurement
from llm2clip.utils.files import write_json
from llm2clip.utils.manifests import read_checked, with_checksum
from modeling_llm2clip import __version__

SCHEMA_VERSION = 1
# A score may differ by this from the mean of its values, which are float32.
ROUNDING = 1e-5


@dataclass
class Result:
    """What was measured of a model on a benchmark: the fields of the files of `llm2clip evaluate --benchmark`.

    Attributes:
        benchmark, title: Name of the benchmark on the command line and in tables.
        model: `Encoder.identity`, with `given`, how the user named the model, and `fingerprint`.
        protocol: Name and options; columns of a table are of one protocol.
        scores: 0 to 1; the first is the one that is compared.
        intervals: 95% bootstrap interval of scores, `[low, high]`.
        counts: Images, texts, queries, ties, truncated texts.
        differences: How the data differs from the published counts, in words; empty if it does not.
        groups: Scores by kind and part: by language, length or class.
        data: `checksum` of the data, see `data_checksum`, and its `folder`.
        setup: The protocol with its options as in the code, and the text format; a finished result is compared by it.
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
    intervals: dict[str, list[float]]
    counts: dict[str, int]
    data: dict[str, str]
    setup: str
    differences: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
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
    content = read_checked(path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        given = "no version" if version is None else f"version {version}"
        raise ValueError(f"{path} is not a result of schema version {SCHEMA_VERSION}: it has {given}.")
    fault = _fault(content)
    if fault:
        raise ValueError(f"{path} is not a result of schema version {SCHEMA_VERSION}: {fault}.")
    return Result(**content)


def _fault(content: Mapping[str, Any]) -> str:
    """Say what keeps the content of a file from being a result; empty if nothing does."""
    hints = get_type_hints(Result)
    optional = {one.name for one in fields(Result) if one.default_factory is not MISSING or one.default is not MISSING}
    lacking = [name for name in hints if name not in content and name not in optional]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    unknown = [name for name in content if name not in hints]
    if unknown:
        return f"it has the unknown fields {', '.join(unknown)}"
    wrong = [name for name, value in content.items() if not _fits(value, hints[name])]
    if wrong:
        return f"its {wrong[0]} are {content[wrong[0]]!r:.80}"
    nameless = [name for name in ("given", "fingerprint") if name not in content["model"]]
    if nameless:
        return f"its model has no {' and no '.join(nameless)}"
    if not content["scores"]:
        return "it has no score"
    broken = [name for name, score in content["scores"].items() if not math.isfinite(score)]
    return f"its {broken[0]} is {content['scores'][broken[0]]}" if broken else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type, such as `dict[str, list[float]]`."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (int, float):
        return type(value) in (int, kind)
    if not isinstance(value, kind):
        return False
    if kind is dict:
        return all(_fits(item, arguments[1]) for item in value.values())
    return kind is not list or all(_fits(item, arguments[0]) for item in value)


def result_path(output: Path, model: str, benchmark: str, text_format: str, variant: str = "") -> Path:
    """Return the file of a result in a folder, such as `openai--clip-vit-large-patch14.urban1k.raw.json`.

    Args:
        variant: What the user chose instead of what the benchmark has, such as `paper`, a set of templates.
    """
    name = re.sub(r"[^\w.-]+", "--", model).strip("-.")
    return output / ".".join([name, benchmark, *filter(None, [variant]), text_format, "json"])


def package_versions() -> dict[str, str]:
    """Versions of python and of the packages on which numbers depend."""
    modules: Sequence[Any] = (torch, transformers, numpy)
    versions = {module.__name__: str(module.__version__) for module in modules}
    return {"llm2clip": __version__, "python": platform.python_version(), **versions}


def intervals_of(measurement: Measurement) -> dict[str, list[float]]:
    """Compute the intervals of the scores whose values or counts are known; see [`bootstrap_intervals`].

    Raises:
        ValueError: The values of a score do not average to it, which is an error of the protocol.
    """
    means = {name: _mean(values, measurement.strata.get(name)) for name, values in measurement.values.items()}
    summed = measurement.summed
    if summed is not None:
        means |= {name: score.item() for name, score in summed.scores(summed.counts.sum(dim=0).double()).items()}
    for name, mean in means.items():
        if not abs(mean - measurement.scores.get(name, torch.nan)) < ROUNDING:
            raise ValueError(
                f"the values of {name} average to {mean}, but its score is {measurement.scores.get(name)}."
            )
    intervals = bootstrap_intervals(measurement.values, measurement.strata)
    return intervals if summed is None else intervals | bootstrap_ratios(summed.counts, summed.scores)


def _mean(values: torch.Tensor, strata: torch.Tensor | None) -> float:
    if strata is None:
        return values.double().mean().item()
    parts, places = strata.unique(return_inverse=True)
    sums = values.new_zeros(len(parts), dtype=torch.float64).index_add_(0, places, values.double())
    return (sums / torch.bincount(places)).mean().item()


def require_same(path: Path, found: Result, model: Mapping[str, str], checksum: str, setup: str) -> None:
    """Check that a finished result is of the weights, the data and the protocol that are to be measured.

    Raises:
        ValueError: It is not; the message names the parts that differ.
    """
    known = {
        "weights or preprocessing of the model": (found.model.get("fingerprint"), model["fingerprint"]),
        "dtype": (found.model.get("dtype"), model["dtype"]),
        "data": (found.data.get("checksum"), checksum),
        "options of the protocol": (found.setup, setup),
    }
    changed = [part for part, (old, new) in known.items() if old != new]
    if changed:
        raise ValueError(
            f"{path} is a finished result, but since then there is a change of the {' and of the '.join(changed)}. "
            "--overwrite replaces it; another --output keeps both."
        )
