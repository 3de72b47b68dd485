"""The quickstart with a user's own LLM, vision tower and data: tiny folders, from the weights to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.hub.cards.card import read_card, validate_card
from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.pipeline import Quickstart
from llm2clip.trainers.text_tower_trainer import TextTowerTrainer
from tests.llm2clip import tiny

PROFILE = {
    "stage1": {
        "max_steps": 2, "per_device_train_batch_size": 8, "lora_rank": 2, "save_strategy": "no", "use_cpu": True,
        "prompt_prefix": "caption: ", "logging_steps": 1,
    },
    "stage2": {
        "max_steps": 3, "per_device_train_batch_size": 16, "projection_dim": 16, "freeze_vision_layers": 1,
        "save_strategy": "no", "use_cpu": True, "caption_weights": [3, 1], "logging_steps": 1,
    },
}  # fmt: skip


def save_data(folder: Path, splits: dict[str, int], drop: tuple[str, ...] = (), image_column: str = "picture") -> str:
    """Save a slice of the bundled data as a user's folder."""
    folder.mkdir()
    for split, rows in splits.items():
        table = datasets.load_dataset(
            "parquet", data_files=f"{tiny.CONCEPTS}/{split}.parquet", split=f"train[:{rows}]"
        )
        table = table.remove_columns(list(drop)).rename_column("image", image_column)
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("quickstart")
    profile = folder / "tiny.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    return [
        "quickstart", "--traceback", "--profile", str(profile), "--output_dir", str(folder / "run"),
        "--llm", tiny.save_llm(folder / "llm"), "--vision_model", tiny.save_vision_tower(folder / "vision"),
        "--data", save_data(folder / "data", {"train": 64, "validation": 24, "test": 24}),
        "--image_column", "picture",
    ]  # fmt: skip


def test_all_steps_run_and_the_final_model_gives_the_recorded_logits(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for row in ("raw LLM, causal", "raw LLM, bidirectional", "after stage 1"):
        assert row in shown
        assert results["caption_retrieval"][row]["lemma_to_gloss"]["num_targets"] == 586
    rows = list(results["image_retrieval"])
    assert rows[:3] == ["before training", "stage 2, raw LLM", "stage 2, stage-1 LLM"]
    assert rows[3].endswith("German captions")
    assert results["image_retrieval"]["before training"]["num_images"] == 24
    assert results["seconds"].keys() >= {"stage1", "stage2-raw", "stage2-stage1"}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "data:image/webp;base64," in page
    assert "src='http" not in page
    assert len(list((folder / "cache" / "vision_states").glob("[!.]*"))) == 1

    data, text = read_card(folder / "llm2clip")
    validate_card(folder / "llm2clip")
    rows = list(results["image_retrieval"].values())[2:]
    # The last result was measured on the validation set during training.
    *measured, validation = data["model-index"][0]["results"]
    assert validation["dataset"]["split"] == "validation"
    for result, expected in zip(measured, rows, strict=True):
        assert {metric["type"]: metric["value"] for metric in result["metrics"]} == expected
        assert len(result["dataset"]["revision"]) == 16
    assert f"{100 * rows[0]['text_to_image_recall@10']:.1f}" in text
    assert "lora_rank" not in text
    assert "projection_dim: 16" in text
    assert (folder / "llm2clip" / "training_curves.png").is_file()

    model = AutoModel.from_pretrained(folder / "llm2clip").eval()
    processor = AutoProcessor.from_pretrained(folder / "llm2clip")
    sample = results["model_sample"]
    data = Path(arguments[arguments.index("--data") + 1])
    test = datasets.load_dataset("parquet", data_files=str(data / "test.parquet"), split="train[:4]")
    images = [decode_image(row["picture"], "x") for row in test]
    with torch.no_grad():
        output = model(**processor(text=sample["captions"], images=images, return_tensors="pt"))
    torch.testing.assert_close(output.logits_per_image, torch.tensor(sample["logits_per_image"]), atol=1e-5, rtol=0)
    assert model.config.text_config.prompt_prefix == "caption: "


def test_a_second_run_reuses_all_steps(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments)
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "reused from an earlier run: weights, raw, stage1, embed-raw" in capsys.readouterr().out


def test_missing_splits_are_held_out_and_a_single_caption_column_gives_no_pairs(tmp_path: Path) -> None:
    drop = ("keywords", "caption_de", "caption_fr")
    only_train = QuickstartData.find(save_data(tmp_path / "a", {"train": 40}, drop), ["caption"], "picture")
    assert (only_train.train, only_train.test) == ("train[:80%]", "train[90%:]")
    assert [source.path for source in only_train.pair_sources()] == [tiny.GLOSSES]
    assert list(only_train.caption_sets) == ["lemma_to_gloss"]
    assert only_train.translations == {}
    two = QuickstartData.find(
        save_data(tmp_path / "b", {"train": 40, "validation": 20}), ["caption", "keywords"], "picture"
    )
    assert (two.train, two.validation, two.test) == ("train", "validation", "validation")
    assert len(two.pair_sources()) == 2


def test_an_interrupted_stage_with_other_settings_continues_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger knows the profile, not the place of the folder, which moves here between the two runs."""
    steps = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "lora_rank": 2, "use_cpu": True}
    profile = tmp_path / "tiny.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "stage1": steps | {"prompt_prefix": "caption: "}}))
    arguments = ["quickstart", "--profile", str(profile), "--llm", tiny.save_llm(tmp_path / "llm")]
    arguments += ["--vision_model", tiny.save_vision_tower(tmp_path / "vision"), "--caption_columns", "caption"]
    arguments += ["--data", save_data(tmp_path / "data", {"train": 64}, ("keywords",)), "--image_column", "picture"]

    def stop(*arguments: Any) -> None:
        raise ValueError("after stage 1")

    with monkeypatch.context() as patch:
        # The checkpoints are there, and the step is not finished.
        patch.setattr(TextTowerTrainer, "save_result", stop)
        assert cli.main([*arguments, "--output_dir", str(tmp_path / "first")]) == 2
    (tmp_path / "first").rename(tmp_path / "second")
    arguments += ["--output_dir", str(tmp_path / "second")]
    monkeypatch.setattr(Quickstart, "_embed", stop)
    assert cli.main(arguments) == 2
    assert "--resume-anyway" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume-anyway", "true"]) == 2
    assert "error: after stage 1" in capsys.readouterr().err
