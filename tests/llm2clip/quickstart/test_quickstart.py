"""The quickstart with a user's own LLM, vision tower and data: tiny folders, from the weights to the report."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.encoders import OurEncoder
from llm2clip.evaluation.protocols.caption_retrieval import caption_pair_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.cards.card import read_card, validate_card
from llm2clip.quickstart import quickstart
from llm2clip.quickstart.config import Arm, QuickstartConfig
from llm2clip.quickstart.data import LANGUAGES, OTHER_LANGUAGES, QuickstartData
from llm2clip.quickstart.quickstart import BEST_BY, MADE_WITH, stage2_config
from llm2clip.trainers.text_tower_trainer import TextTowerTrainer
from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import embedding_models, small_runs
from tests.llm2clip.quickstart.tiny_run import PROFILE, SPLITS, read_rows, save_data

ARMS = ["raw LLM, causal", "LLM after stage 1", "bert"]
RECALLS = [f"text_to_image_recall@{k}" for k in (1, 5, 10)]


def command(options: Mapping[str, Any]) -> list[str]:
    values = (part for name, value in options.items() for part in (f"--{name}", str(value)))
    return ["quickstart", "--traceback", *values]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("quickstart")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    embedding_models.save(folder / "bert", "bert")
    return {
        "profile": folder / "tiny.yaml", "output_dir": folder / "run", "llm": small_runs.save_llm(folder / "llm"),
        "vision_model": small_runs.save_vision_tower(folder / "vision"), "embedding_model": folder / "bert",
        "data": save_data(folder / "data", SPLITS), "image_column": "picture",
    }  # fmt: skip


@pytest.fixture(scope="module")
def shown(options: dict[str, Any]) -> str:
    """What the first run prints, in a wide terminal."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("COLUMNS", "200")
        assert cli.main(command(options)) == 0
    return shown.getvalue()


@pytest.fixture(scope="module")
def folder(options: dict[str, Any], shown: str) -> Path:
    return options["output_dir"]


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return results_of(folder)


def test_every_text_encoder_is_a_line_of_each_table(results: dict[str, Any], shown: str) -> None:
    assert list(results["caption_retrieval"]) == results["text_encoders"] == ARMS
    assert results["caption_retrieval"][ARMS[0]]["lemma_to_gloss"]["num_targets"] == 586
    rows = results["image_retrieval"]
    tuned = [ARMS[1], *(f"  {name}, {ARMS[1]}" for name in ("German", "Chinese"))]
    assert list(rows) == [ARMS[0], *tuned, "bert", "  German, bert", "  Chinese, bert", "  mean of 6 languages, bert"]
    assert {row["num_images"] for row in rows.values()} == {24}
    measured = results["runs"]["stage2-ready"]["test"]
    assert set(measured) == {"captions", *LANGUAGES.values(), "Russian", "Arabic"}
    mean = sum(measured[name]["text_to_image_recall@10"] for name in LANGUAGES.values()) / 6
    assert rows["  mean of 6 languages, bert"]["text_to_image_recall@10"] == pytest.approx(mean)


def test_the_printed_numbers_are_those_of_the_results(results: dict[str, Any], shown: str) -> None:
    lines = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
    printed = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    german = results["image_retrieval"]["  German, bert"]
    assert printed["German"][0] == " / ".join(f"{100 * german[key]:.1f}" for key in RECALLS)
    assert printed["German"][2] == f"{german['num_texts']} × 24"


def test_arms_train_with_equal_settings_to_their_best_epoch(folder: Path, results: dict[str, Any]) -> None:
    names = ["stage2-raw-causal", "stage2-stage1", "stage2-ready"]
    settings = [json.loads((folder / name / "settings.json").read_text()) for name in names]
    own = {"output_dir", "embedding_cache", "text_model_name_or_path", "sources"}
    fields = [{name: value for name, value in stage.items() if name not in own} for stage in settings]
    assert fields[0] == fields[1] == fields[2]
    llms, embedding_model = settings[1]["sources"][0], settings[2]["sources"][0]
    assert settings[0]["sources"] == settings[1]["sources"]
    assert (llms["caption_columns"], llms["caption_weights"]) == (["caption", "keywords"], [3, 1])
    # A translation has a tenth of the mean weight of a caption.
    names = [f"caption_{code}" for code in (*LANGUAGES, *OTHER_LANGUAGES)]
    assert embedding_model["caption_columns"] == ["caption", "keywords", *names]
    assert embedding_model["caption_weights"] == pytest.approx([3, 1, *[0.2] * 8])
    run = results["runs"]["stage2-ready"]
    # The first entry is of the model before the training, of which there is no checkpoint.
    measured = [entry[BEST_BY] for entry in run["history"] if BEST_BY in entry and entry["step"]]
    assert run["validation"] == max(measured)
    (last,) = [entry for entry in run["history"] if BEST_BY in entry][-1:]
    recalls = [number for name, number in last.items() if "_recall@" in name]
    assert len(recalls) == 6
    assert run["validation"] == pytest.approx(fmean(recalls))
    # The first two are those of the epochs, and the last one that of the chosen model.
    assert measured[-1] == max(measured[:2])
    assert len(list((folder / "cache" / "features").iterdir())) == 1
    assert not list(folder.rglob("checkpoint-*"))


def test_the_raw_encoders_share_their_weights_and_differ_in_attention(folder: Path, results: dict[str, Any]) -> None:
    raw, causal = (folder / name for name in ("raw", "raw-causal"))
    assert (raw / "model.safetensors").read_bytes() == (causal / "model.safetensors").read_bytes()
    models = [LLM2CLIPTextModel.from_pretrained(path) for path in (raw, causal)]
    assert [model.config.bidirectional for model in models] == [True, False]
    data = QuickstartData.find(results["settings"]["data"], ["caption", "keywords"], "picture")
    session = Session(OurEncoder(models[1].eval(), AutoTokenizer.from_pretrained(causal)))
    measured = caption_pair_metrics(session, data.caption_sets["name_to_keywords"])
    stored = results["caption_retrieval"]["raw LLM, causal"]["name_to_keywords"]
    assert measured == pytest.approx(stored, abs=0.2)


def test_the_report_has_tables_queries_and_pictures(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text()
    german = results["image_retrieval"]["  German, bert"]
    cells = ["  German", *(" / ".join(f"{100 * german[f'{way}_recall@{k}']:.1f}" for k in (1, 5, 10))
                         for way in ("text_to_image", "image_to_text"))]  # fmt: skip
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}" in page
    assert page.count("<table>") == 2
    assert "data:image/webp;base64," in page
    assert "src='http" not in page
    assert results["best_text_encoder"] in page


def test_the_final_model_is_the_best_on_the_validation_set_and_gives_the_recorded_numbers(
    options: dict[str, Any], folder: Path, results: dict[str, Any]
) -> None:
    scores = {name: results["runs"][f"stage2-{name}"]["validation"] for name in ("stage1", "ready")}
    best = max(scores, key=lambda name: scores[name])
    assert results["best_text_encoder"] == {"stage1": ARMS[1], "ready": ARMS[2]}[best]
    data, text = read_card(folder / "llm2clip")
    validate_card(folder / "llm2clip")
    expected = results["runs"][f"stage2-{best}"]["test"]
    row = results["image_retrieval"][results["best_text_encoder"]]
    assert expected["captions"] == row
    # The last result was measured on the validation set during training.
    *measured, validation = data["model-index"][0]["results"]
    assert validation["dataset"]["split"] == "validation"
    for result, metrics in zip(measured, expected.values(), strict=True):
        recalls = {name: value for name, value in metrics.items() if name.endswith(("@1", "@5", "@10"))}
        assert {metric["type"]: metric["value"] for metric in result["metrics"]} == recalls
        assert len(result["dataset"]["revision"]) == 16
    assert f"{100 * row['text_to_image_recall@10']:.1f}" in text
    assert "freeze_vision: all" in text
    assert (folder / "llm2clip" / "training_curves.png").is_file()

    model = AutoModel.from_pretrained(folder / "llm2clip").eval()
    processor = AutoProcessor.from_pretrained(folder / "llm2clip")
    sample = results["model_sample"]
    rows = read_rows(Path(options["data"], "test.parquet"), "train[:4]")
    images = [decode_image(row["picture"], "x") for row in rows]
    with torch.no_grad():
        output = model(**processor(text=sample["captions"], images=images, return_tensors="pt"))
    torch.testing.assert_close(output.logits_per_image, torch.tensor(sample["logits_per_image"]), atol=1e-5, rtol=0)


def test_a_second_run_trains_nothing_and_other_settings_are_refused(
    options: dict[str, Any], folder: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it is there")

    with monkeypatch.context() as patch:
        for module, name in (("run_stage1", "run"), ("run_stage2", "run"), ("build", "run")):
            patch.setattr(getattr(quickstart, module), name, unwanted)
        assert cli.main(command(options)) == 0
    again = results_of(folder)
    assert results["seconds"].keys() >= {"Stage 1: caption contrastive fine-tuning", "The Hub-ready folder"}
    assert again.pop("seconds") is None
    assert again == {name: value for name, value in results.items() if name != "seconds"}
    changed = {**PROFILE, "stage2": {**PROFILE["stage2"], "learning_rate": 2e-3}}
    other = options["profile"].with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match="seed, stage2"):
        cli.main(command({**options, "profile": other, "seed": 1}))


def test_another_vision_tower_is_pooled_from_its_last_layer() -> None:
    assert QuickstartConfig().load_profile()["stage2"]["vision_layers"] == [8, 9, 10, 11]
    assert "vision_layers" not in QuickstartConfig(vision_model="another").load_profile()["stage2"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "stage1" / "precious"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(FileExistsError, match="stage1"):
        quickstart.run(QuickstartConfig(str(tmp_path)))
    assert precious.exists()
    assert not (tmp_path / MADE_WITH).exists()


@pytest.mark.slow
def test_an_embedding_model_needs_no_stage_1(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = {**options, "output_dir": folder, "llm": options["embedding_model"], "embedding_model": "none"}
    own |= {"data": save_data(tmp_path / "data", SPLITS, ("source",))}
    assert cli.main(command(own)) == 0
    results = results_of(folder)
    assert results["text_encoders"] == ["bert"]
    assert "stage1" not in results["seconds"]
    assert list(results["image_retrieval"])[:2] == ["bert", "  German, bert"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("name", ["output_dir", "freeze_vision"])
def test_a_profile_sets_nothing_that_the_quickstart_sets(name: str, tmp_path: Path) -> None:
    config, arm = QuickstartConfig(str(tmp_path)), Arm("ready", "a model", "ready")
    data = QuickstartData.find(None, config.caption_columns)
    with pytest.raises(ValueError, match=f"stage2 .*{name}"):
        stage2_config(config, {"stage2": {name: "none"}}, data, "vision", arm, "text")


def test_missing_splits_are_held_out_and_a_single_caption_column_gives_no_pairs(tmp_path: Path) -> None:
    drop = ("keywords", *(f"caption_{code}" for code in (*LANGUAGES, *OTHER_LANGUAGES)))
    only_train = QuickstartData.find(save_data(tmp_path / "a", {"train": 40}, drop), ["caption"], "picture")
    assert (only_train.train, only_train.test) == ("train[:80%]", "train[90%:]")
    assert [source.path for source in only_train.pair_sources()] == [small_runs.GLOSSES]
    assert list(only_train.caption_sets) == ["lemma_to_gloss"]
    assert only_train.translations == {}
    assert only_train.trained("ready").caption_columns == ["caption"]
    data = save_data(tmp_path / "b", {"train": 40, "validation": 20})
    two = QuickstartData.find(data, ["caption", "keywords"], "picture")
    assert (two.train, two.validation, two.test) == ("train", "validation", "validation")
    assert len(two.pair_sources()) == 2


def test_an_interrupted_stage_continues_in_a_moved_folder(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage1 = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "lora_rank": 2, "use_cpu": True}
    profile = tmp_path / "tiny.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "stage1": stage1 | {"prompt_prefix": "caption: "}}))
    options = {**options, "profile": profile, "embedding_model": "none", "caption_columns": "caption"}

    def stop(*arguments: Any) -> None:
        raise ValueError("after stage 1")

    with monkeypatch.context() as patch:
        # The checkpoints are there, and the step is not finished.
        patch.setattr(TextTowerTrainer, "save_result", stop)
        with pytest.raises(ValueError, match="after stage 1"):
            cli.main(command({**options, "output_dir": tmp_path / "first"}))
    (tmp_path / "first").rename(tmp_path / "second")
    monkeypatch.setattr(quickstart.embed, "run", stop)
    with pytest.raises(ValueError, match="after stage 1"):
        cli.main(command({**options, "output_dir": tmp_path / "second"}))
    assert "changed since the run was started" in (tmp_path / "second" / "log.txt").read_text()
    assert (tmp_path / "second" / "stage1" / "model.safetensors").is_file()
