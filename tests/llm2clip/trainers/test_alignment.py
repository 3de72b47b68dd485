"""Stage 2 in closed form, and with heads that are trained on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from llm2clip.trainers import run_stage2
from llm2clip.trainers.alignment import linear_maps
from llm2clip.trainers.closed_form import closed_form_alignment
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.files import read_json
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs

TRAINING = ("learning_rate", "max_steps", "per_device_train_batch_size", "warmup_steps")


def settings(folder: Path, inputs: Inputs, alignment: str, **changes: Any) -> Stage2Recipe:
    fields = tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
    fields |= {"freeze_vision": "all", "vision_pooling": "cls_mean", "projection_dim": None, "alignment": alignment}
    if alignment == "closed_form":
        fields = {name: value for name, value in fields.items() if name not in TRAINING}
    return build_config(Stage2Recipe, {**fields, **changes})


@pytest.fixture(scope="module")
def solved(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solved") / "run"
    run_stage2.run(settings(folder, inputs, "closed_form"))
    return folder


def test_the_model_has_the_maps_of_its_training_pairs(solved: Path, inputs: Inputs, tmp_path: Path) -> None:
    model: Any = LLM2CLIPModel.from_pretrained(solved, text_model=False).eval()
    metrics = read_json(solved / "trainer_state.json")["log_history"][0]
    assert model.config.projection_dim == metrics["closed_form_width"]
    assert (model.config.visual_head, model.config.text_head) == ("linear", "linear")
    config = settings(tmp_path / "again", inputs, "closed_form", feature_cache=str(solved / "vision_features"))
    trainer = run_stage2.build_trainer(config)
    trainer.store_rows()
    dataset: Any = trainer.train_dataset
    samples, captions, weights = dataset.pairs()
    images = dataset.features.read(dataset.image_rows[samples]).float()
    texts = dataset.cache.read(captions, torch.float32)
    width = model.config.projection_dim
    expected = closed_form_alignment(
        images, texts, metrics["closed_form_ridge"], width, weights=torch.from_numpy(weights)
    )
    with torch.no_grad():
        own = F.normalize(model.get_image_features(vision_features=images).pooler_output, dim=-1)
        said = F.normalize(model.get_text_features(llm_embeds=texts).pooler_output, dim=-1)
    similarity = expected.embed_images(images) @ expected.embed_texts(texts).T
    torch.testing.assert_close((own @ said.T).double(), similarity, atol=1e-4, rtol=0)
    # Pairs belong together more than others do.
    assert similarity.diagonal().mean() > similarity.mean() + 0.1


def test_the_result_is_an_ordinary_model(solved: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(solved)
    processor = AutoProcessor.from_pretrained(solved)
    texts = model.encode_text(["a red fox", "a steam train"], processor)
    model.save_pretrained(tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    again = AutoModel.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(again.encode_text(["a red fox", "a steam train"], processor), texts)
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size)
    half = LLM2CLIPVisionModelWithProjection.from_pretrained(solved)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(half(pixels).pooler_output, expected)


@pytest.mark.parametrize("standardized", [True, False])
def test_given_ridge_and_width_are_used(inputs: Inputs, tmp_path: Path, standardized: bool) -> None:
    config = settings(tmp_path / "run", inputs, "closed_form", ridge=2.0, projection_dim=5, eval_sources={})
    trainer = run_stage2.build_trainer(config)
    if not standardized:
        trainer.model.visual_standardization = None
        trainer.model.config.standardize_vision = False
    metrics = trainer.fit()
    assert (metrics["closed_form_ridge"], metrics["closed_form_width"]) == (2.0, 5.0)
    dataset: Any = trainer.train_dataset
    samples, captions, weights = dataset.pairs()
    images, texts = dataset.features.read(dataset.image_rows[samples]), dataset.cache.read(captions, torch.float32)
    expected = closed_form_alignment(images.float(), texts, 2.0, 5, weights=torch.from_numpy(weights))
    model: Any = LLM2CLIPModel.from_pretrained(config.output_dir, text_model=False).eval()
    with torch.no_grad():
        own = F.normalize(model.get_image_features(vision_features=images).pooler_output, dim=-1)
    torch.testing.assert_close(own.abs().double(), expected.embed_images(images.float()).abs(), atol=1e-4, rtol=0)


def test_what_is_trained_on_top_leaves_the_maps(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, "closed_form_then_train", projection_dim=8, ridge=0.3)
    trainer = run_stage2.build_trainer(config)
    before: list[torch.Tensor] = []
    initialize = trainer.initialize_weights

    def record() -> dict[str, float]:
        found = initialize()
        before.extend(layer.weight.clone() for layer in linear_maps(trainer.model))
        return found

    trainer.initialize_weights = record  # type: ignore[method-assign]
    trainer.fit()
    history = read_json(Path(config.output_dir) / "trainer_state.json")["log_history"]
    assert [entry["closed_form_ridge"] for entry in history if "closed_form_ridge" in entry] == [0.3]
    model: Any = LLM2CLIPModel.from_pretrained(config.output_dir, text_model=False)
    assert (model.config.visual_head, model.config.text_head) == ("residual", "residual")
    for layer, weight in zip(linear_maps(model), before, strict=True):
        torch.testing.assert_close(layer.weight, weight, atol=0, rtol=0)
    assert model.visual_projection.gate.item() != pytest.approx(0.1, abs=1e-6)
    assert model.text_adapter.gate.item() != pytest.approx(0.1, abs=1e-6)


def test_a_resumed_run_equals_an_unbroken_one(inputs: Inputs, tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", inputs, "closed_form_then_train")
    run_stage2.run(whole)
    broken = settings(tmp_path / "broken", inputs, "closed_form_then_train")
    with pytest.MonkeyPatch.context() as patch:
        step = Stage2Trainer.training_step

        def fail(self: Stage2Trainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(Stage2Trainer, "training_step", fail)
        with pytest.raises(KeyboardInterrupt):
            run_stage2.run(broken)
    run_stage2.run(broken, resume=True)
    expected, found = (LLM2CLIPModel.from_pretrained(tmp_path / n, text_model=False) for n in ("whole", "broken"))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=0, rtol=0, msg=name)
    firsts = [read_json(tmp_path / run / "trainer_state.json")["log_history"][0] for run in ("whole", "broken")]
    assert firsts[0] == firsts[1]
    assert "closed_form_mean_recall" in firsts[0]


def test_a_warm_start_in_closed_form_continues_with_its_heads(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    fields |= {"vision_pooling": "cls_mean", "max_steps": 2, "warm_start": {"alignment": "closed_form"}}
    run_stage2.run(build_config(Stage2Recipe, fields))
    first: Any = LLM2CLIPModel.from_pretrained(tmp_path / "run" / "warm_start", text_model=False)
    last: Any = LLM2CLIPModel.from_pretrained(tmp_path / "run", text_model=False)
    assert first.config.projection_dim == last.config.projection_dim == 24
    assert first.config.text_head == last.config.text_head == "linear"
    assert not torch.equal(first.visual_projection.weight, last.visual_projection.weight)


@pytest.mark.parametrize(
    ("alignment", "changes", "message"),
    [
        ("closed_form", {"freeze_vision": "none"}, "needs frozen towers"),
        ("closed_form", {"learning_rate": 1e-3, "max_steps": 3}, "trains nothing; unset learning_rate, max_steps"),
        ("closed_form_then_train", {"visual_head": "gated"}, "has its own heads; unset visual_head, which is gated"),
        ("closed_form_then_train", {"model_name_or_path": "m"}, "m has its own. Give two towers instead of it"),
        ("train", {"ridge": 0.1}, "ridge is for alignment"),
        ("closed_form", {"ridge": -0.1}, "ridge must be at least 0"),
    ],
)
def test_settings_without_effect_are_refused(
    inputs: Inputs, tmp_path: Path, alignment: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, inputs, alignment, **changes)


def test_a_trainer_without_stored_features_refuses_a_closed_form(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, "closed_form")
    model, processor = run_stage2.load_model(config)
    with pytest.raises(ValueError, match="alignment needs a train_dataset whose images can be stored"):
        Stage2Trainer(model=model, args=config, train_dataset=[{"caption": "x"}], processing_class=processor)
    config.alignment, config.feature_dtype = "train", "bfloat16"
    with pytest.raises(ValueError, match="feature_dtype needs a train_dataset whose images can be stored"):
        Stage2Trainer(model=model, args=config, train_dataset=[{"caption": "x"}], processing_class=processor)
