"""The benchmark of the bundled pictures is read as its file says."""

from __future__ import annotations

from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.benchmarks.counts import check_counts
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.examples.conftest import EXAMPLES


def test_each_picture_has_its_own_caption() -> None:
    [benchmark] = choose_benchmarks([str(EXAMPLES / "benchmarks" / "concepts.py")], EXAMPLES / "data")
    folder = benchmark.find(EXAMPLES / "data")
    assert folder == EXAMPLES / "data" / "concepts"
    data = benchmark.read(folder)
    assert check_counts(benchmark, folder, data, allow=False) == []
    assert (data.images.key(0), data.texts[0]) == ("emoji-google/1f004", "mahjong red dragon")
    assert data.owners.tolist() == list(range(695))
    assert data.images.decode(0, decode_image).size == (112, 112)
    assert len(set(data.texts)) < 695
