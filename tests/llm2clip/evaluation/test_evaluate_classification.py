"""`llm2clip evaluate` on sets of classification: Fashion-MNIST, small and, in a slow test, whole."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import normalize

from llm2clip import cli
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.fashion_mnist import CLASSNAMES
from llm2clip.evaluation.prompts import prompts
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.builders import tiny
from tests.llm2clip.evaluation.benchmarks.classification_samples import idx

# Where Debian's package `dataset-fashion-mnist` puts it; another folder of sets by this variable.
WHOLE = Path(os.environ.get("LLM2CLIP_TEST_DATA", "/usr/share/datasets"))
PROBE = "fashion-mnist-probe-sgd"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `model`, and `data` with 30 test and 120 train images, whose brightness follows the class."""
    folder = tmp_path_factory.mktemp("classification")
    tiny.save(folder / "model")
    data = folder / "data" / "fashion-mnist"
    data.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, size in (("t10k", 30), ("train", 120)):
        labels = np.arange(size, dtype=np.uint8) % 10
        images = 20 * labels[:, None, None] + generator.integers(0, 40, (size, 28, 28))
        (data / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images.astype(np.uint8))))
        (data / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def evaluate(model: Path, data: Path, output: Path, *options: str) -> dict[str, dict[str, Any]]:
    arguments = ["evaluate", str(model), "--data", str(data), "--output", str(output), "--num-workers", "0"]
    assert cli.main([*arguments, *options]) == 0
    results = [json.loads(path.read_text()) for path in output.glob("*.json")]
    return {result["benchmark"]: result for result in results}


def test_zero_shot_and_probes_run_from_the_command(place: Path, tmp_path: Path) -> None:
    names = ["fashion-mnist", PROBE]
    options = ("--benchmark", *names, "--allow-counts")
    found = evaluate(place / "model", place / "data", tmp_path, *options)
    assert set(found) == set(names)
    zero_shot = found["fashion-mnist"]
    assert zero_shot["protocol"]["templates"] == "openai-80"
    assert zero_shot["counts"]["texts"] == 800
    assert zero_shot["differences"] == ["30 images instead of 10,000"]
    assert set(zero_shot["intervals"]) == {"top1", "top5", "mean_per_class"}
    assert zero_shot["groups"]["class"]["Bag"]["images"] == 3
    assert found[PROBE]["counts"]["train_images"] == 120
    assert found[PROBE]["scores"]["top1"] > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8"), f"{PROBE} compares no embeddings: leave out truncate_dim and precision"),
        (("--truncate-dim", "8"), f"{PROBE} compares no embeddings: leave out truncate_dim and precision"),
        (("--templates", "paper"), "--templates and --classnames are for benchmarks of zero-shot classification"),
    ],
)
def test_options_are_refused_where_they_would_have_no_effect(
    options: tuple[str, ...], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["evaluate", str(place / "model"), "--data", str(place / "data"), "--output", str(tmp_path)]
    assert cli.main([*start, "--allow-counts", "--benchmark", PROBE, *options]) == 2
    assert message in capsys.readouterr().err


def test_own_prompts_give_the_nearest_class_of_the_model_and_results_of_their_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("ein {c}\n{c}!\n")
    names = [f"Ding {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    own, named = ("--templates", str(tmp_path / "templates.txt")), ("--classnames", str(tmp_path / "names.txt"))
    start = ("--benchmark", "fashion-mnist", "--allow-counts")
    for options in ((), ("--templates", "paper"), own, (*own, *named)):
        evaluate(place / "model", place / "data", tmp_path / "results", *start, *options)
    found = {
        path.name.partition(".fashion-mnist")[2]: json.loads(path.read_text())
        for path in (tmp_path / "results").glob("*.json")
    }
    assert found[".raw.json"]["protocol"]["templates"] == "openai-80"
    assert found[".paper.raw.json"]["protocol"]["templates"] == "paper"
    others = [name for name in found if re.fullmatch(r"\.prompts-[0-9a-f]{16}\.raw\.json", name)]
    assert len(others) == 2
    assert len(found) == len({json.dumps(one["protocol"]) for one in found.values()}) == 4
    [result] = [one for one in found.values() if one["protocol"]["classnames"] != "of the set"]
    data = all_benchmarks()["fashion-mnist"].read(place / "data/fashion-mnist")
    model, processor = LLM2CLIPModel.from_pretrained(place / "model").eval(), tiny.processor()
    images = model.encode_image([data.images.decode(row, decode_image) for row in range(30)], processor)
    texts = model.encode_text(prompts(names, ["ein {c}", "{c}!"]), processor).view(10, 2, -1)
    logits = images @ normalize(texts.mean(dim=1), dim=-1).T
    hits = (logits.argmax(dim=1) == data.labels).double()
    assert result["scores"]["top1"] == pytest.approx(hits.mean().item())
    assert result["counts"]["tied_images"] == 0
    assert set(result["groups"]["class"]) == set(names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (WHOLE / "fashion-mnist").is_dir(), reason=f"{WHOLE} has no fashion-mnist; Debian: dataset-fashion-mnist"
)
def test_the_whole_of_fashion_mnist_runs_from_the_documented_command(place: Path, tmp_path: Path) -> None:
    found = evaluate(place / "model", WHOLE, tmp_path, "--benchmark", "fashion-mnist", PROBE)
    for result in found.values():
        assert result["differences"] == []
        assert (result["counts"]["images"], result["counts"]["classes"]) == (10000, 10)
        assert result["groups"]["class"].keys() == set(CLASSNAMES)
        assert all(one["images"] == 1000 for one in result["groups"]["class"].values())
    assert found[PROBE]["counts"]["train_images"] == 60000
    # Features of a model with random weights; guessing has 0.1.
    assert 0.4 < found[PROBE]["scores"]["top1"] < found[PROBE]["scores"]["top5"] <= 1
    assert found["fashion-mnist"]["counts"]["tied_images"] == 0
