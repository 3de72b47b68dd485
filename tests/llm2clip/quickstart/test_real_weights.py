"""The quickstart with its defaults: pretrained weights, bundled data, and goals of its tables that hold easily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip import cli
from llm2clip.quickstart.config import E5_TITLE
from tests import stranger
from tests.builders import small_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

STRANGER = """
import json, sys
import datasets, torch
from transformers import AutoModel, AutoProcessor
folder, rows, captions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = datasets.load_dataset("parquet", data_files=rows, split="train[:4]")["image"][:]
with torch.no_grad():
    print(model(**processor(text=captions, images=images, return_tensors="pt")).logits_per_image.tolist())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # On one thread, as all tests: more of them wait for each other while other tests run beside them.
    folder = tmp_path_factory.mktemp("quickstart")
    assert cli.main(["quickstart", "--traceback", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_stage_1_improves_caption_retrieval_many_times(results: dict[str, Any]) -> None:
    rows = {name: sets["lemma_to_gloss"]["recall@1"] for name, sets in results["caption_retrieval"].items()}
    assert rows["LLM after stage 1"] >= 7 * rows["raw LLM, causal"]


def test_the_better_model_finds_unseen_concepts_by_their_names(results: dict[str, Any]) -> None:
    last = results["image_retrieval"][results["best_text_encoder"]]
    assert last["text_to_image_recall@1"] >= 0.22
    assert last["text_to_image_recall@10"] >= 0.46
    assert results["typed_queries"]["queries"] == 25
    assert results["typed_queries"]["found"] >= 13


def test_an_embedding_model_answers_languages_that_training_never_showed(results: dict[str, Any]) -> None:
    mean = results["image_retrieval"][f"  mean of 6 languages, {E5_TITLE}"]
    assert mean["num_texts"] == 138
    assert mean["text_to_image_recall@10"] >= 0.32


def test_the_final_model_gives_the_recorded_logits_in_a_process_without_this_package(
    run: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    sample = results["model_sample"]
    rows = f"{small_runs.CONCEPTS}/test.parquet"
    logits = stranger.answer(STRANGER, run / "llm2clip", rows, json.dumps(sample["captions"]), home=tmp_path)
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(sample["logits_per_image"]), atol=1e-5, rtol=0)
