"""Stage 2 with both towers frozen, on stored features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionImageDataset, CaptionSource, SampleIndex
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.losses import clip_loss
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_stage2
from llm2clip.trainers.optimizer import parameter_groups
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.trainers.stored_rows import StoredPairsDataset, store_pairs
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import assert_equal_weights, load, train

FROZEN = {"freeze_vision": "all", "vision_pooling": "cls_mean"}


def settings(folder: Path, inputs: Inputs, **changes: Any) -> Stage2Recipe:
    fields = {**small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache), **FROZEN}
    return build_config(Stage2Recipe, {**fields, **changes})


def stored(config: Stage2Recipe) -> tuple[Any, StoredPairsDataset]:
    """The model of a run, and its rows with stored features."""
    run_stage2.set_seed(config.seed)
    model, processor = run_stage2.open_model(config)
    images, cache = build_dataset(config), EmbeddingCache.open(config.embedding_cache)
    folder = config.feature_cache or Path(config.output_dir, "features")
    options: dict[str, Any] = {"dtype": config.feature_dtype, "views": config.feature_views}
    options |= {"crop_scale": config.crop_scale, "on_error": config.on_error}
    return model, store_pairs(model, processor.image_processor, images, cache, folder, **options)


def test_training_equals_a_direct_loop_on_the_same_rows(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, shared_captions="positive")
    seen: list[dict[str, Any]] = []
    step = Stage2Trainer.embed_batch

    def record(self: Stage2Trainer, model: Any, batch: dict[str, Any]) -> Any:
        seen.append({name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)})
        return step(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage2Trainer, "embed_batch", record)
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
    before = from_vision_text_pretrained(inputs.vision, inputs.text).vision_model.state_dict()
    assert all(value.equal(before[name]) for name, value in model.vision_model.state_dict().items())


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


def test_a_script_does_what_the_command_does(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "command", inputs)
    expected = train(config)
    run_stage2.set_seed(config.seed)
    model, processor = run_stage2.open_model(config)
    image_processor, cache = processor.image_processor, EmbeddingCache.open(inputs.cache)
    images = CaptionImageDataset([CaptionSource.from_dict(config.sources[0])], seed=config.seed)
    pairs = store_pairs(model, image_processor, images, cache, tmp_path / "features")
    Stage2Trainer(model, config, train_dataset=pairs, processing_class=processor, cache=cache).train()
    assert_equal_weights(model.cpu(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vision_layers": 1}, "freeze_vision_layers is 1, but freeze_vision: all"),
        ({"online_text_model": True, "embedding_cache": None}, "unset online_text_model and lora_rank"),
        ({"sources": [small_runs.concepts(streaming=True)]}, "no source can be a stream"),
        ({"sources": [small_runs.concepts(weight=1.0)]}, "no source can be a stream or have a weight"),
        ({"feature_views": 0}, "feature_views must be at least 1"),
        ({"crop_scale": [0.5, 1.0]}, "images are stored without crops"),
        ({"freeze_vision": "none", "feature_views": 2}, "it needs freeze_vision: all"),
        ({"patch_dropout": 0.5}, "patch_dropout is 0.5, but freeze_vision: all"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, inputs, **changes))
