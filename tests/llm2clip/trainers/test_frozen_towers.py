"""Stage 2 with both towers frozen, and as the first part of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm2clip.data import CaptionSource, DamagedImageError, SampleIndex
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.cards.facts import CURVES
from llm2clip.losses import clip_loss
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import freezing, run_stage2
from llm2clip.trainers.optimizer import parameter_groups
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs

FROZEN = {"freeze_vision": "all", "vision_pooling": "cls_mean", "standardize_features": True, "visual_head": "linear"}


def settings(folder: Path, inputs: Inputs, **changes: Any) -> Stage2Recipe:
    fields = {**tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache), **FROZEN, **changes}
    return build_config(Stage2Recipe, fields)


def load(folder: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).eval()


def train(config: Stage2Recipe, resume: bool = False) -> LLM2CLIPModel:
    run_stage2.run(config, resume=resume)
    return load(Path(config.output_dir))


def assert_equal_weights(model: LLM2CLIPModel, expected: LLM2CLIPModel, atol: float = 0.0) -> None:
    own, others = model.state_dict(), expected.state_dict()
    assert set(own) == set(others)
    for name, value in own.items():
        torch.testing.assert_close(value, others[name], atol=atol, rtol=0, msg=name)


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
    torch.manual_seed(config.seed)
    run_stage2.set_seed(config.seed)
    model, processor = run_stage2.load_model(config)
    cache = EmbeddingCache.open(inputs.cache)
    images = build_dataset(config, processor.image_processor)
    dataset = freezing.store_pairs(config, model, processor.image_processor, images, cache, [])
    rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    options = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    optimizer = torch.optim.AdamW(parameter_groups(model, **rates), **options)
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
    first = dataset.__getitems__([SampleIndex(0, row) for row in range(len(dataset))])
    stored = {tuple(row.tolist()) for row in first["vision_features"]}
    assert {tuple(row.tolist()) for batch in seen for row in batch["vision_features"]} <= stored


def test_the_tower_runs_once_for_each_distinct_image(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = LLM2CLIPModel.get_vision_features

    def counted(self: LLM2CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(len(pixel_values))
        return compute(self, pixel_values, **kwargs)

    monkeypatch.setattr(LLM2CLIPModel, "get_vision_features", counted)
    shared = {"feature_cache": str(tmp_path / "features"), "eval_strategy": "steps", "eval_steps": 3}
    shared |= {"sources": [tiny.concepts(max_samples=80)]}
    config = settings(tmp_path / "first", inputs, **shared)
    first = train(config)
    sources = [CaptionSource.from_dict(source) for source in (*config.sources, *config.eval_sources.values())]
    keys = [RetrievalData.from_source(source).images.content_keys() for source in sources]
    assert sum(calls) == len(np.unique(np.concatenate(keys), axis=0))
    calls.clear()
    assert_equal_weights(train(settings(tmp_path / "second", inputs, **shared)), first)
    assert calls == []
    # More data only adds what is missing.
    train(settings(tmp_path / "third", inputs, **{**shared, "sources": [tiny.concepts()]}))
    assert 0 < sum(calls) <= 16


def test_the_result_scores_as_it_does_from_stored_features(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path, inputs)
    metrics = run_stage2.run(config)
    model, processor = load(tmp_path), LLM2CLIPProcessor.from_pretrained(tmp_path)
    data = RetrievalData.from_source(CaptionSource.from_dict(config.eval_sources["validation"]))
    encoder = StoredEncoder(model, processor, EmbeddingCache.open(inputs.cache).lookup)
    found = image_text_metrics(Session(encoder), data)
    assert found["text_to_image_mean_rank"] == pytest.approx(
        metrics["eval_validation_text_to_image_mean_rank"], rel=0.02
    )
    before = LLM2CLIPModel.from_vision_text_pretrained(inputs.vision, inputs.text).vision_model.state_dict()
    assert all(value.equal(before[name]) for name, value in model.vision_model.state_dict().items())
    mean, std = model.visual_standardization.mean, model.visual_standardization.std
    assert mean.abs().sum() > 0
    assert not std.equal(torch.ones_like(std))
    assert model.text_adapter.center.abs().sum() > 0


def test_a_resumed_run_equals_an_uninterrupted_one(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"feature_views": 2, "feature_dropout": 0.2}
    expected = train(settings(tmp_path / "unbroken", inputs, **changes))
    train(settings(tmp_path / "broken", inputs, **changes))
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    assert_equal_weights(train(settings(tmp_path / "broken", inputs, **changes), resume=True), expected, atol=1e-6)


def test_views_are_drawn_anew_in_each_epoch(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path, inputs, feature_views=3)
    model, processor = run_stage2.load_model(config)
    cache = EmbeddingCache.open(inputs.cache)
    images = build_dataset(config, processor.image_processor)
    dataset = freezing.store_pairs(config, model, processor.image_processor, images, cache, [])
    batches = [dataset.__getitems__([SampleIndex(epoch, row) for row in range(96)]) for epoch in (0, 0, 1)]
    features = [batch["vision_features"] for batch in batches]
    assert features[0].equal(features[1])
    changed = (features[0] != features[2]).any(dim=1).float().mean().item()
    assert 0.4 < changed < 0.9
    captions = [batch["llm_embeds"] for batch in batches]
    assert captions[0].equal(captions[1])
    assert not captions[0].equal(captions[2])


def test_damaged_images_are_refused_or_left_out(inputs: Inputs, tmp_path: Path) -> None:
    rows = datasets.load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/train.parquet", split="train[:40]")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    broken = rows.map(
        lambda row, number: {"image": {**row["image"], "bytes": b"no image"}} if number == 3 else {}, with_indices=True
    )
    broken.to_parquet(tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "caption_columns": ["caption", "keywords"]}
    with pytest.raises(DamagedImageError, match=str(rows[3]["key"])):
        train(settings(tmp_path / "raise", inputs, sources=[source]))
    for size in (40, 1):  # alone, it is a step that changes nothing
        out = tmp_path / f"skip {size}"
        changes = {"on_error": "skip", "per_device_train_batch_size": size, "max_steps": 40}
        train(settings(out, inputs, sources=[source], **changes))
        log = [json.loads(line) for line in (out / "skipped-0.jsonl").read_text().splitlines()]
        assert {entry["key"] for entry in log} == {str(rows[3]["key"])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vision_layers": 1}, "freezes all layers"),
        ({"online_text_model": True, "embedding_cache": None}, "needs embedding_cache"),
        ({"sources": [tiny.concepts(streaming=True)]}, "no source can be a stream"),
        ({"feature_views": 0}, "feature_views must be at least 1"),
        ({"freeze_vision": "none", "feature_views": 2}, "need freeze_vision: all, or warm_start"),
        ({"freeze_vision": "none"}, "standardize_features needs freeze_vision: all, or warm_start"),
        ({"warm_start": {"num_train_epochs": 1}}, "warm_start is for a run that trains the vision tower"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, inputs, **changes))


WARM = {"freeze_vision": "none", "freeze_vision_layers": -1, "warm_start": {"max_steps": 6, "save_steps": 3}}


@pytest.mark.parametrize("alignment", ["train", "closed_form_then_train"])
def test_too_few_rows_are_refused_before_a_feature_is_computed(
    alignment: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "open_features", lambda *_: pytest.fail("features were computed"))
    fields = {"alignment": alignment, "per_device_train_batch_size": 512, "eval_sources": {}}
    if alignment != "train":
        fields |= {"standardize_features": None, "visual_head": None}
    with pytest.raises(ValueError, match="fewer rows than one batch of 512"):
        train(settings(tmp_path, inputs, **fields))


def test_a_warm_start_comes_before_the_run(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, **WARM)
    metrics = run_stage2.run(config)
    first = load(tmp_path / "run" / "warm_start")
    expected = train(settings(tmp_path / "first", inputs, learning_rate=1e-2))
    assert_equal_weights(first, expected)
    changes = {"freeze_vision": "none", "standardize_features": None, "vision_pooling": None, "visual_head": None}
    trained = train(
        settings(
            tmp_path / "second",
            inputs,
            **changes,
            freeze_vision_layers=-1,
            projection_dim=None,
            model_name_or_path=str(tmp_path / "run" / "warm_start"),
        )
    )
    # Weights that are mapped from a file are aligned otherwise in memory, and so summed in another order.
    assert_equal_weights(load(tmp_path / "run"), trained, atol=1e-6)
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
        with pytest.raises(KeyboardInterrupt):
            run_stage2.run(config)
        # Killed at the end of the first part, before its result was on record.
        (tmp_path / "broken" / "warm_start" / "warm_start.json").unlink()
        with pytest.raises(KeyboardInterrupt):
            run_stage2.run(config, resume=True)
        with pytest.raises(KeyboardInterrupt):
            run_stage2.run(config, resume=True)
    again = [
        ("warm_start", None),
        ("broken", None),
        ("warm_start", "checkpoint-6"),
        ("broken", None),
        ("broken", None),
    ]
    assert parts == again
    assert_equal_weights(train(config, resume=True), expected)


def test_features_in_bfloat16_are_stored_apart_and_near_those_in_float32(inputs: Inputs, tmp_path: Path) -> None:
    stored = []
    for dtype in ("float32", "bfloat16"):
        config = settings(tmp_path / dtype, inputs, feature_dtype=dtype, feature_cache=str(tmp_path / "features"))
        trainer = run_stage2.build_trainer(config)
        trainer.store_rows()
        stored.append(trainer.train_dataset.features)
    first, second = (features.read(np.arange(20)).float() for features in stored)
    assert stored[0].path != stored[1].path
    assert stored[1].manifest.identity["vision_model_dtype"] == "bfloat16"
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="feature_dtype and feature_views need freeze_vision"):
        settings(tmp_path, inputs, freeze_vision="none", standardize_features=None, feature_dtype="bfloat16")


def test_a_second_part_is_resumed(inputs: Inputs, tmp_path: Path) -> None:
    """Also by a Trainer that is made anew, whose image processor was not saved before."""
    expected = train(settings(tmp_path / "unbroken", inputs, **WARM))
    train(settings(tmp_path / "broken", inputs, **WARM))
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    assert_equal_weights(train(settings(tmp_path / "broken", inputs, **WARM), resume=True), expected, atol=1e-6)


def test_both_parts_have_a_precision_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    first = {**WARM["warm_start"], "bf16": False}
    trainer = run_stage2.build_trainer(settings(tmp_path, inputs, **{**WARM, "warm_start": first}, bf16=True))
    trainer.fit()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.accelerator.state.mixed_precision == "bf16"
