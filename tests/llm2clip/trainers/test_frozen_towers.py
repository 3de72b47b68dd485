"""Stage 2 with both towers frozen: trained, solved in closed form, and as the first part of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm2clip.data import CaptionSource, SampleIndex
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.cards.facts import CURVES
from llm2clip.losses import clip_loss
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import freezing, run_stage2
from llm2clip.trainers.alignment import linear_maps
from llm2clip.trainers.closed_form import closed_form_alignment
from llm2clip.trainers.optimizer import parameter_groups
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import TRAINING, assert_equal_weights, history, load, train

FROZEN = {"freeze_vision": "all", "vision_pooling": "cls_mean", "standardize_features": True, "visual_head": "linear"}
WARM = {"freeze_vision": "none", "freeze_vision_layers": -1, "warm_start": {"max_steps": 6, "save_steps": 3}}
SOLVED = {"standardize_features": None, "visual_head": None, "projection_dim": None}


def settings(folder: Path, inputs: Inputs, **changes: Any) -> Stage2Recipe:
    fields = {**small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache), **FROZEN}
    if "alignment" in changes:
        fields |= SOLVED
    if changes.get("alignment") == "closed_form":
        fields = {name: value for name, value in fields.items() if name not in TRAINING}
    return build_config(Stage2Recipe, {**fields, **changes})


def stored(config: Stage2Recipe) -> tuple[Any, Any]:
    """The model of a run, and its rows with stored features."""
    run_stage2.set_seed(config.seed)
    model, processor = run_stage2.load_model(config)
    images, cache = build_dataset(config, processor.image_processor), EmbeddingCache.open(config.embedding_cache)
    return model, freezing.store_pairs(config, model, processor.image_processor, images, cache, [])


def test_training_equals_a_direct_loop_on_the_same_rows(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, shared_captions="positive")
    seen: list[dict[str, Any]] = []
    step = Stage2Trainer.loss_and_outputs

    def record(self: Stage2Trainer, model: Any, batch: dict[str, Any]) -> Any:
        seen.append({name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)})
        return step(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage2Trainer, "loss_and_outputs", record)
        trained = train(config)
    model, dataset = stored(config)
    groups = parameter_groups(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for number, batch in enumerate(seen):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 + math.cos(math.pi * number / len(seen))) / 2
        images = F.normalize(model.get_image_features(vision_features=batch["vision_features"]).pooler_output, dim=-1)
        texts = F.normalize(model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output, dim=-1)
        ids = {name: batch[name] for name in ("caption_ids", "image_caption_ids")}
        loss = clip_loss(images, texts, logit_scale=model.logit_scale.exp(), **ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    assert len(seen) == 6
    assert_equal_weights(model, trained, atol=1e-5)
    # The batches are rows of the stores.
    rows = dataset.__getitems__([SampleIndex(0, row) for row in range(len(dataset))])["vision_features"]
    expected = {tuple(row.tolist()) for row in rows}
    assert {tuple(row.tolist()) for batch in seen for row in batch["vision_features"]} <= expected


def test_the_tower_runs_once_for_each_distinct_image(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = LLM2CLIPModel.get_vision_features

    def counted(self: LLM2CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(len(pixel_values))
        return compute(self, pixel_values, **kwargs)

    monkeypatch.setattr(LLM2CLIPModel, "get_vision_features", counted)
    shared = {"feature_cache": str(tmp_path / "features"), "sources": [small_runs.concepts(max_samples=80)]}
    config = settings(tmp_path / "first", inputs, **shared)
    first = train(config)
    sources = [CaptionSource.from_dict(source) for source in (*config.sources, *config.eval_sources.values())]
    keys = [RetrievalData.from_source(source).images.content_keys() for source in sources]
    assert sum(calls) == len(np.unique(np.concatenate(keys), axis=0))
    calls.clear()
    assert_equal_weights(train(settings(tmp_path / "second", inputs, **shared)), first)
    assert calls == []
    # More data only adds what is missing.
    train(settings(tmp_path / "third", inputs, **{**shared, "sources": [small_runs.concepts()]}))
    assert 0 < sum(calls) <= 16


def test_the_result_scores_as_it_does_from_stored_features(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path, inputs)
    metrics = run_stage2.run(config)
    model, processor = load(tmp_path), LLM2CLIPProcessor.from_pretrained(tmp_path)
    data = RetrievalData.from_source(CaptionSource.from_dict(config.eval_sources["validation"]))
    found = image_text_metrics(
        Session(StoredEncoder(model, processor, EmbeddingCache.open(inputs.cache).lookup)), data
    )
    expected = metrics["eval_validation_text_to_image_mean_rank"]
    assert found["text_to_image_mean_rank"] == pytest.approx(expected, rel=0.02)
    before = LLM2CLIPModel.from_vision_text_pretrained(inputs.vision, inputs.text).vision_model.state_dict()
    assert all(value.equal(before[name]) for name, value in model.vision_model.state_dict().items())
    assert model.visual_standardization.mean.abs().sum() > 0
    assert model.text_adapter.center.abs().sum() > 0


def test_views_are_drawn_anew_in_each_epoch(inputs: Inputs, tmp_path: Path) -> None:
    _, dataset = stored(settings(tmp_path, inputs, feature_views=3))
    batches = [dataset.__getitems__([SampleIndex(epoch, row) for row in range(96)]) for epoch in (0, 0, 1)]
    features = [batch["vision_features"] for batch in batches]
    assert features[0].equal(features[1])
    assert 0.4 < (features[0] != features[2]).any(dim=1).float().mean().item() < 0.9
    captions = [batch["llm_embeds"] for batch in batches]
    assert captions[0].equal(captions[1])
    assert not captions[0].equal(captions[2])


def test_features_in_bfloat16_are_stored_apart_and_near_those_in_float32(inputs: Inputs, tmp_path: Path) -> None:
    found = [
        stored(settings(tmp_path, inputs, feature_dtype=dtype, feature_cache=str(tmp_path / "features")))[1].features
        for dtype in ("float32", "bfloat16")
    ]
    first, second = (features.read(np.arange(20)).float() for features in found)
    assert found[0].path != found[1].path
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=0.05, rtol=0.05)


def test_a_warm_start_comes_before_the_run(inputs: Inputs, tmp_path: Path) -> None:
    metrics = run_stage2.run(settings(tmp_path / "run", inputs, **WARM))
    first = tmp_path / "run" / "warm_start"
    # Ten times the learning rate of the run.
    assert_equal_weights(load(first), train(settings(tmp_path / "first", inputs, learning_rate=1e-2)))
    changes = {"freeze_vision": "none", "standardize_features": None, "vision_pooling": None, "visual_head": None}
    changes |= {"freeze_vision_layers": -1, "projection_dim": None, "model_name_or_path": str(first)}
    changes |= {"vision_model_name_or_path": "", "text_model_name_or_path": ""}
    # Weights that are mapped from a file are aligned otherwise in memory, and so summed in another order.
    assert_equal_weights(load(tmp_path / "run"), train(settings(tmp_path / "second", inputs, **changes)), atol=1e-6)
    assert {"train_loss", "warm_start_train_loss"} <= set(metrics)
    assert (tmp_path / "run" / CURVES).is_file()


def test_a_warm_start_is_resumed_where_it_stopped(inputs: Inputs, tmp_path: Path) -> None:
    expected = train(settings(tmp_path / "unbroken", inputs, **WARM))
    compare, parts = RunContext.compare_inputs, []

    def interrupted(self: RunContext, *args: Any) -> Any:
        parts.append((Path(self.args.output_dir).name, self.checkpoint and self.checkpoint.name))
        if parts[-1][0] == "broken":
            raise KeyboardInterrupt
        return compare(self, *args)

    config = settings(tmp_path / "broken", inputs, **WARM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunContext, "compare_inputs", interrupted)
        for resume in (False, True, True):
            with pytest.raises(KeyboardInterrupt):
                run_stage2.run(config, resume=resume)
            # The first time as if it was killed at the end of the first part, before its result was on record.
            if not resume:
                (tmp_path / "broken" / "warm_start" / "warm_start.json").unlink()
    first = [("warm_start", None), ("broken", None)]
    assert parts == [*first, ("warm_start", "checkpoint-6"), ("broken", None), ("broken", None)]
    assert_equal_weights(train(config, resume=True), expected)


def test_a_closed_form_has_the_maps_of_its_training_pairs(inputs: Inputs, tmp_path: Path) -> None:
    model = train(settings(tmp_path, inputs, alignment="closed_form"))
    metrics, width = history(tmp_path)[0], model.config.projection_dim
    assert width == metrics["closed_form_width"]
    assert (model.config.visual_head, model.config.text_head) == ("linear", "linear")
    _, dataset = stored(settings(tmp_path, inputs, alignment="closed_form"))
    samples, captions, weights = dataset.pairs()
    images = dataset.features.read(dataset.image_rows[samples]).float()
    texts = dataset.cache.read(captions, torch.float32)
    ridge, weights = metrics["closed_form_ridge"], torch.from_numpy(weights)
    expected = closed_form_alignment(images, texts, ridge, width, weights=weights)
    with torch.no_grad():
        own = F.normalize(model.get_image_features(vision_features=images).pooler_output, dim=-1)
        said = F.normalize(model.get_text_features(llm_embeds=texts).pooler_output, dim=-1)
    similarity = expected.embed_images(images) @ expected.embed_texts(texts).T
    torch.testing.assert_close((own @ said.T).double(), similarity, atol=1e-4, rtol=0)
    # Pairs belong together more than others do.
    assert similarity.diagonal().mean() > similarity.mean() + 0.1


def test_what_is_trained_on_top_leaves_the_maps(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path, inputs, alignment="closed_form_then_train", projection_dim=8, ridge=0.3)
    trainer = run_stage2.build_trainer(config)
    before: list[torch.Tensor] = []
    initialize = trainer.initialize_weights

    def record() -> dict[str, float]:
        found = initialize()
        before.extend(layer.weight.clone() for layer in linear_maps(trainer.model))
        return found

    trainer.initialize_weights = record  # type: ignore[method-assign]
    trainer.fit()
    assert [entry["closed_form_ridge"] for entry in history(tmp_path) if "closed_form_ridge" in entry] == [0.3]
    model = load(tmp_path)
    assert (model.config.visual_head, model.config.text_head) == ("residual", "residual")
    assert all(layer.weight.equal(weight) for layer, weight in zip(linear_maps(model), before, strict=True))
    assert model.visual_projection.gate.item() != pytest.approx(0.1, abs=1e-6)
    assert model.text_adapter.gate.item() != pytest.approx(0.1, abs=1e-6)


def test_a_warm_start_in_closed_form_continues_with_its_heads(inputs: Inputs, tmp_path: Path) -> None:
    fields = small_runs.stage2_fields(tmp_path, inputs.vision, inputs.text, inputs.cache)
    fields |= {"vision_pooling": "cls_mean", "max_steps": 2, "warm_start": {"alignment": "closed_form"}}
    last = train(build_config(Stage2Recipe, fields))
    first = load(tmp_path / "warm_start")
    assert first.config.projection_dim == last.config.projection_dim == 24
    assert first.config.text_head == last.config.text_head == "linear"
    assert not torch.equal(first.visual_projection.weight, last.visual_projection.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vision_layers": 1}, "freeze_vision_layers is 1, but freeze_vision: all"),
        ({"online_text_model": True, "embedding_cache": None}, "online_text_model is True, but frozen towers"),
        ({"sources": [small_runs.concepts(streaming=True)]}, "no source can be a stream"),
        ({"feature_views": 0}, "feature_views must be at least 1"),
        ({"freeze_vision": "none", "feature_views": 2}, "it needs freeze_vision: all, or warm_start"),
        ({"freeze_vision": "none"}, "standardize_features is True, but it needs"),
        ({"warm_start": {"num_train_epochs": 1}}, "warm_start is .*, but freeze_vision: all"),
        ({"alignment": "closed_form", "freeze_vision": "none"}, "needs frozen towers"),
        (
            {"alignment": "closed_form", "learning_rate": 1e-3, "max_steps": 3},
            "learning_rate is 0.001 and max_steps is 3, but",
        ),
        (
            {"alignment": "closed_form", "learning_rate": 1e-5, "max_steps": -1, "feature_views": 2},
            "feature_views is 2, but",
        ),
        ({"alignment": "closed_form_then_train", "visual_head": "gated"}, "unset visual_head, which is gated"),
        ({"alignment": "closed_form_then_train", "model_name_or_path": "m"}, "m has its own. Give two towers"),
        ({"alignment": "train", "ridge": 0.1}, "ridge is 0.1, but it is for alignment"),
        ({"alignment": "closed_form", "ridge": -0.1}, "ridge must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, inputs, **changes))
