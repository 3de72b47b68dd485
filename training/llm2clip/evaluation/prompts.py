"""Names of classes and prompt templates of zero-shot classification, by name or from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from llm2clip.encoders.open_clip import INSTALL
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.reading import read_lines
from llm2clip.files.atomic import digest_json

PLACEHOLDER = "{c}"
ZERO_SHOT = "zero-shot-classification"
# OpenAI's 80 templates for ImageNet, the seven that it found to be nearly as good, the one of LLM2CLIP's paper,
# and OpenAI's for CIFAR. The names and templates are identical in the code of OpenAI, open_clip, CLIP_benchmark and
# LLM2CLIP, slips such as "a origami {c}." included.
TEMPLATE_SETS = ("openai-80", "openai-7", "paper", "openai-cifar")
_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
OWN_TEMPLATES = {
    "paper": ["a photo of the {c}"],
    "openai-cifar": [
        text
        for article in ("a", "the")
        for text in (
            *(f"a {kind}photo of {article} {PLACEHOLDER}." for kind in _KINDS),
            *(f"a photo of {article} {size} {PLACEHOLDER}." for size in ("small", "big")),
        )
    ],
}


@cache
def class_data(name: str) -> dict[str, Any]:
    """Return what the file `class_data/NAME.json` of the package says about classes."""
    file = resources.files("llm2clip.evaluation") / "class_data" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def _of_open_clip() -> tuple[list[str], dict[str, list[str]]]:
    """OpenAI's names of the classes of ImageNet, and its templates: MIT, which is not the license of our wheel."""
    try:
        from open_clip import zero_shot_metadata as peer
    except ImportError as error:
        raise ImportError(f"OpenAI's names and templates of ImageNet are those of open_clip: {INSTALL}") from error
    names = list(peer.IMAGENET_CLASSNAMES)
    made = (peer.OPENAI_IMAGENET_TEMPLATES, peer.SIMPLE_IMAGENET_TEMPLATES)
    many, few = ([template(PLACEHOLDER) for template in templates] for templates in made)
    if digest_json([names, many, few]) != class_data("imagenet")["checksum"]:
        raise ImportError("the open_clip that is installed has other names or templates of ImageNet than OpenAI.")
    return names, {"openai-80": many, "openai-7": few}


def imagenet_classes() -> dict[str, str]:
    """Return OpenAI's name of each of the 1,000 classes by WordNet id, in the order of the labels.

    Two names stand for two classes each, `missile` and `sunglasses`: images of these four tie.

    Raises:
        ImportError: open_clip, which has the names, is not installed.
    """
    return dict(zip(class_data("imagenet")["classes"], _of_open_clip()[0], strict=True))


def imagenet_subset(name: str) -> list[str]:
    """Return the WordNet ids of the 200 classes of ImageNet-A (`a`), -R (`r`) or -O (`o`), by label."""
    return list(class_data("imagenet")["subsets"][name])


def template_set(name: str) -> list[str]:
    """Return the templates of a set of `TEMPLATE_SETS`.

    Raises:
        ImportError: open_clip, which has those of ImageNet, is not installed.
    """
    return list(OWN_TEMPLATES[name] if name in OWN_TEMPLATES else _of_open_clip()[1][name])


def with_prompts(
    benchmarks: Sequence[Benchmark], templates: str | None = None, classnames: str | None = None
) -> list[Benchmark]:
    """Set the templates and names of the benchmarks of zero-shot classification; others stay as they are.

    Args:
        templates: A name of `TEMPLATE_SETS`, or a file with one template a line.
        classnames: A file with one name a line, in the order of the labels.

    Raises:
        BenchmarkError: No benchmark is one of zero-shot classification, or a file is broken.
    """
    given: dict[str, Any] = {}
    if templates is not None:
        given["templates"] = tuple(choose_templates(templates))
    if classnames is not None:
        given["classnames"] = tuple(read_names(Path(classnames)))
    if given and not any(benchmark.protocol == ZERO_SHOT for benchmark in benchmarks):
        raise BenchmarkError("--templates and --classnames are for benchmarks of zero-shot classification.")
    return [
        replace(benchmark, options={**benchmark.options, **given}) if benchmark.protocol == ZERO_SHOT else benchmark
        for benchmark in benchmarks
    ]


def choose_templates(name: str) -> list[str]:
    """Return the templates of a set, or of a file with one template a line.

    Args:
        name: A name of `TEMPLATE_SETS`, or a path.

    Raises:
        BenchmarkError: There is neither, or a template has no `{c}`, the place of the name.
    """
    if name in TEMPLATE_SETS:
        return template_set(name)
    if not Path(name).is_file():
        raise BenchmarkError(f"there is no template set or file {name}; the sets are {', '.join(TEMPLATE_SETS)}.")
    return read_templates(Path(name))


def read_templates(path: Path) -> list[str]:
    """Read a file with one template a line.

    Raises:
        BenchmarkError: A template has no `{c}`, or the file has none.
    """
    templates = read_names(path)
    for number, template in enumerate(templates, 1):
        if PLACEHOLDER not in template:
            raise BenchmarkError(
                f"line {number} of {path} has no {PLACEHOLDER}, the place of the class: {template!r}."
            )
    return templates


def read_names(path: Path) -> list[str]:
    """Read a file with one name a line, without blanks around it, as CLIP_benchmark does; blank lines may end it.

    Raises:
        BenchmarkError: A line between others is blank, or the file is empty.
    """
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        del names[-1]
    if "" in names or not names:
        raise BenchmarkError(f"line {names.index('') + 1 if names else 1} of {path} is blank.")
    return names


def name_of_templates(templates: Sequence[str]) -> str:
    """Identify templates in a result: the name of their set, or their number and checksum."""
    for name in TEMPLATE_SETS:
        if list(templates) == template_set(name):
            return name
    return f"{len(templates)} templates ({digest_json(list(templates))})"


def prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every name into every template: the texts of the first class, then those of the next."""
    return [template.replace(PLACEHOLDER, name) for name in classnames for template in templates]
