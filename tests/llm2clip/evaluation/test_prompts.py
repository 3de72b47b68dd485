"""Names and templates: equal, string for string, to those of open_clip and CLIP_benchmark; own files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import clip_benchmark
import pytest
from open_clip import zero_shot_metadata

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.prompts import (
    TEMPLATE_SETS,
    choose_templates,
    imagenet_classes,
    imagenet_subset,
    name_of_templates,
    read_names,
    template_set,
)

PEER = Path(clip_benchmark.__file__).parent / "datasets"


def peer_json(name: str) -> dict[str, list[str]]:
    return json.loads((PEER / f"en_{name}.json").read_text(encoding="utf-8"))


def peer_ids(name: str) -> list[str]:
    """The WordNet ids of a list in the source of CLIP_benchmark."""
    source = (PEER / "builder.py").read_text(encoding="utf-8")
    found = re.search(rf"{name}\s*=\s*[\[{{](.*?)[\]}}]", source, re.DOTALL)
    assert found is not None
    return re.findall(r"n\d{8}", found[1])


def test_names_of_imagenet_equal_those_of_open_clip_and_clip_benchmark() -> None:
    names = list(imagenet_classes().values())
    assert names == list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    assert names == peer_json("classnames")["imagenet1k"]
    assert len(names) == 1000
    assert [name for name, count in Counter(names).items() if count > 1] == ["missile", "sunglasses"]


def test_classes_and_subsets_equal_those_of_clip_benchmark() -> None:
    assert list(imagenet_classes()) == peer_ids("all_imagenet_wordnet_ids") == sorted(imagenet_classes())
    for subset in "aro":
        assert imagenet_subset(subset) == sorted(peer_ids(f"imagenet_{subset}_wnids"))
        assert len(imagenet_subset(subset)) == 200


def test_templates_equal_those_of_open_clip_and_clip_benchmark() -> None:
    peer = peer_json("zeroshot_classification_templates")
    assert template_set("openai-80") == [make("{c}") for make in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES]
    assert template_set("openai-80") == peer["imagenet1k"]
    assert template_set("openai-7") == [make("{c}") for make in zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES]
    assert template_set("openai-cifar") == peer["cifar10"] == peer["cifar100"]
    assert template_set("paper") == ["a photo of the {c}"]
    assert [len(template_set(name)) for name in TEMPLATE_SETS] == [80, 7, 1, 18]
    assert [name_of_templates(template_set(name)) for name in TEMPLATE_SETS] == list(TEMPLATE_SETS)


def test_files_of_names_and_templates_are_read_by_line(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffKüche \r\n T-shirt/top\r\n\r\n".encode())
    assert read_names(file) == ["Küche", "T-shirt/top"]
    file.write_text("a\n\nb\n")
    with pytest.raises(BenchmarkError, match=r"line 2 of .*names.txt is blank"):
        read_names(file)
    file.write_text("")
    with pytest.raises(BenchmarkError, match=r"line 1 of .*names.txt is blank"):
        read_names(file)
    file.write_text("a photo of {c}\na photo of {}\n")
    with pytest.raises(BenchmarkError, match=r"line 2 of .* has no \{c\}.*: 'a photo of \{\}'"):
        choose_templates(str(file))
    assert choose_templates("paper") == template_set("paper")
    assert name_of_templates(["a {c}"]).startswith("1 templates (")
