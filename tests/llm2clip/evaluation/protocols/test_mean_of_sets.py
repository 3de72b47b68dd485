"""The mean over sets of classification, as ProCLIP reports it, and the 11 sets of which it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.bootstrap import intervals_of
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData, SeveralSets
from llm2clip.evaluation.protocols import open_protocol
from tests.llm2clip.evaluation.benchmarks.samples import write
from tests.llm2clip.evaluation.fake_session import FakeSession

TEXTS = {"a photo of a dog.": [1.0, 0.0], "a photo of a cat.": [0.0, 1.0]}
EMBEDS = {b"dog": [1.0, 0.0], b"cat": [0.0, 1.0]}


def labelled(pictures: list[bytes], labels: list[int], **fields: Any) -> ClassificationData:
    return ClassificationData(BenchmarkImages(pictures), torch.tensor(labels), ["dog", "cat"], **fields)


def test_each_set_counts_once_by_the_score_that_is_compared_of_it() -> None:
    # 3 of 4 of the first set are right, and of the second both dogs and no cat.
    data = SeveralSets(
        {
            "one": labelled([b"dog", b"cat", b"cat", b"dog"], [0, 1, 1, 1]),
            "two": labelled([b"dog", b"dog", b"dog"], [0, 0, 1], mean_per_class=True),
        }
    )
    found = open_protocol("mean-of-sets", {}).measure(FakeSession(EMBEDS, TEXTS), data)
    assert found.scores["mean"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.scores["top1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert next(iter(found.scores)) == "mean"
    assert found.protocol["sets"] == {"one": "top1", "two": "mean_per_class"}
    assert found.groups["set"]["two"]["mean_per_class"] == pytest.approx(1 / 2)
    assert found.counts["images"] == 7
    low, high = intervals_of(found)["top1"]
    assert low <= found.scores["top1"] <= high
    assert data.counts() == {"sets": 2, "one images": 4, "one classes": 2, "two images": 3, "two classes": 2}
    assert [len(part.images or part.rows) for part in data.parts()] == [2, 4, 2, 3]
    with pytest.raises(BenchmarkError, match="no set to average"):
        open_protocol("mean-of-sets", {}).measure(FakeSession({}, {}), SeveralSets({}))


def test_proclip_averages_11_sets_with_and_without_probes(tmp_path: Path) -> None:
    benchmark = all_benchmarks()["proclip-11"]
    assert len({one.name for one in benchmark.members}) == benchmark.counts["sets"] == 11
    per_class = {"fgvc-aircraft", "pets", "caltech101", "flowers"}
    assert {one.name for one in benchmark.members if "mean per class" in one.note} == per_class
    assert sum(count for name, count in benchmark.counts.items() if name.endswith("classes")) == 2192
    assert benchmark.find(tmp_path) is None
    for one in benchmark.members:
        for need in one.needs:
            write(tmp_path / one.folder / need.replace("**", "data").replace("*", "1"))
    assert benchmark.find(tmp_path) == tmp_path
    (probe,) = choose_benchmarks(["proclip-11-probe-sgd"], tmp_path)
    assert (probe.protocol, probe.options) == ("mean-of-sets", {"each": "linear-probe-sgd"})
    assert probe.find(tmp_path) is None
    assert "wds_vtab-dtd/train/nshards.txt" in probe.needs
    # Its train images are not those of the published recipe, which results of it say.
    assert "dtd: train images are VTAB's 90 %" in probe.differs
    assert [text.partition(":")[0] for text in benchmark.differs] == ["sun397"]
