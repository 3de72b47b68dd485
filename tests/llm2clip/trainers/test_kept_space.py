"""Distillation in stage 2: the adapter learns a former text tower, the vision side follows its own average.

test_processes.py has both parts on two processes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor

from llm2clip import CaptionSource, EmbeddingCache, Stage2Config, Stage2Trainer, load_encoder
from llm2clip.data.captions import distinct_captions
from llm2clip.data.transforms import EvalTransform
from llm2clip.encoders import OurEncoder
from llm2clip.losses import clip_loss
from llm2clip.store import MissingCaptionError
from llm2clip.trainers import run_stage2, stored_rows
from llm2clip.trainers.alignment import take_space
from llm2clip.trainers.optimizer import parameter_groups
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.manifests import FOLDER_MANIFEST
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.trainers.rows import BATCH, averages, in_order, keyed_rows, logged
from tests.llm2clip.trainers.rows import settings as trainer_settings
from tests.llm2clip.trainers.stages import assert_equal_weights, joint_model, load, train

TERMS = {"loss_distill_instance", "loss_distill_structure"}
AVERAGED = {"distill_weight": 0.5, "structure_weight": 20.0, "ema_half_life": 2.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of transformers, with 24 values."""
    folder = tmp_path_factory.mktemp("clip")
    save_transformers("clip", folder)
    return str(folder)


def settings(folder: Path, inputs: Inputs, clip: str, **changes: Any) -> Stage2Recipe:
    """Settings of a text part, from a CLIP's tower; no `freeze_vision` makes it the first part of a run."""
    fields = small_runs.stage2_fields(folder, clip, inputs.text, inputs.cache)
    frozen = {"freeze_vision": "all", "distill_from": clip}
    first = {"warm_start": {"distill_from": clip, "max_steps": 4}} if "warm_start" in changes else frozen
    return build_config(Stage2Recipe, {**fields, **changes, **first})


def distances(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms, pair by pair."""
    pairs = [(i, j) for i in range(len(student)) for j in range(i + 1, len(student))]
    structure = [
        F.smooth_l1_loss((student[i] - student[j]).norm(), (teacher[i] - teacher[j]).norm()) for i, j in pairs
    ]
    return (student - teacher).square().sum(dim=1).mean(), torch.stack(structure).mean()


def test_the_adapter_learns_a_former_text_tower_without_an_image(
    inputs: Inputs, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, inputs, clip, max_steps=60, eval_sources={}, learning_rate=1e-2)
    teacher, trainer = load_encoder(clip), run_stage2.build_trainer(config)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(EvalTransform, "decode", lambda *args: pytest.fail("an image is read"))
        trainer.fit()
    after = trainer.model.state_dict()
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == {name for name in after if name.startswith("text_adapter.")}
    texts = distinct_captions([CaptionSource.from_dict(small_runs.concepts())])
    model, llm_embeds = load(tmp_path), EmbeddingCache.open(inputs.cache).lookup(texts)
    rows = F.normalize(model.get_text_features(llm_embeds=llm_embeds).pooler_output, dim=-1)
    assert (rows * teacher.encode_text(texts)).sum(dim=1).mean() > 0.9
    # Images are where that model has them.
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))]
    found = OurEncoder(model, LLM2CLIPProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(found.encode_image(images), teacher.encode_image(images), atol=1e-5, rtol=0)
    first, *_, last = logged(trainer, "loss")
    terms = [logged(trainer, f"loss_distill_{name}")[-1] for name in ("instance", "structure")]
    assert last == pytest.approx(terms[0] + 63.5 * terms[1], rel=1e-4)
    assert last < 0.7 * first


def test_captions_without_stored_embedding_are_skipped_where_that_is_set(
    inputs: Inputs, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a tenth of them: a cache that lacks more is of other data."""
    sources = [small_runs.concepts(caption_columns=["caption", "caption_de"])]
    config = settings(tmp_path, inputs, clip, sources=sources, on_error="skip")
    with pytest.raises(MissingCaptionError, match="llm2clip embed"):
        run_stage2.build_trainer(config)
    monkeypatch.setattr(stored_rows, "SKIPPED_SHARE", 1)
    trainer = run_stage2.build_trainer(config)
    trainer.store_rows()
    texts = trainer.train_dataset.texts
    assert len(texts) > BATCH
    assert EmbeddingCache.open(inputs.cache).contains(texts).all()


def test_the_loss_of_texts_is_that_of_proclip(inputs: Inputs, clip: str, tmp_path: Path) -> None:
    trainer = run_stage2.build_trainer(settings(tmp_path, inputs, clip, structure_weight=7.0, relational_weight=3.0))
    trainer.store_rows()
    data, model = trainer.train_dataset, trainer.model
    batch = data.__getitems__(list(range(9)))
    loss, _ = trainer.loss_and_outputs(model, batch)
    texts = F.normalize(model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output, dim=-1)
    teacher = load_encoder(clip).encode_text(data.texts[:9])
    torch.testing.assert_close(batch["teacher_embeds"], teacher, atol=1e-3, rtol=0)
    instance, structure = distances(texts, batch["teacher_embeds"])
    llm = F.normalize(batch["llm_embeds"].float(), dim=-1)
    off = 1 - torch.eye(9)
    relational = (((texts @ texts.T - llm @ llm.T) * off) ** 2).sum() / (9 * 8)
    torch.testing.assert_close(loss, instance + 7 * structure + 3 * relational, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"tower_chunk_size": 3}])
def test_the_vision_side_follows_its_average_as_in_a_direct_loop(changes: dict[str, Any], tmp_path: Path) -> None:
    data, fields = keyed_rows(4 * BATCH), {**AVERAGED, "relational_weight": 2.0}
    trainer = in_order(tmp_path, data, max_steps=4, **fields, **changes)
    torch.manual_seed(1)
    model: Any = in_order(tmp_path / "other", data, **fields).model.train()
    average = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    args = trainer.args
    optimizer = torch.optim.AdamW(
        parameter_groups(model, learning_rate=args.learning_rate, weight_decay=args.weight_decay),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    trainer.train()
    teacher, decay = in_order(tmp_path / "third", data, **fields).model.eval(), 0.5 ** (1 / 2.0)
    found = {name: logged(trainer, name) for name in ("loss", "loss_contrastive", "loss_relational", *TERMS)}
    for step in range(4):
        batch = data[step * BATCH : (step + 1) * BATCH]
        pixels, llm = (torch.stack([row[name] for row in batch]) for name in ("pixel_values", "llm_embeds"))
        output = model(pixel_values=pixels, llm_embeds=llm, return_logits=False)
        teacher.load_state_dict(average, strict=False)
        with torch.no_grad():
            followed = F.normalize(teacher.get_image_features(pixels).pooler_output, dim=-1)
        instance, structure = distances(output.image_embeds, followed)
        rows_of_llm = F.normalize(llm, dim=-1)
        texts, off = output.text_embeds, 1 - torch.eye(BATCH)
        relational = (((texts @ texts.T - rows_of_llm @ rows_of_llm.T) * off) ** 2).sum() / (BATCH * (BATCH - 1))
        contrastive = clip_loss(output.image_embeds, texts, output.logit_scale)
        loss = contrastive + 0.5 * (instance + 20 * structure) + 2 * relational
        expected = {"loss": loss, "loss_contrastive": contrastive, "loss_relational": relational}
        expected |= {"loss_distill_instance": instance, "loss_distill_structure": structure}
        for name, value in expected.items():
            assert found[name][step] == pytest.approx(float(value.detach()), abs=2e-5), (name, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        with torch.no_grad():
            average = {
                name: decay * average[name] + (1 - decay) * weight
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
    assert found["loss_distill_instance"][0] == pytest.approx(0, abs=1e-6)
    assert found["loss_distill_instance"][3] > 1e-4
    for name, value in average.items():
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name], value, atol=2e-5, rtol=1e-3)


def test_the_log_has_the_terms_of_the_loss_and_an_evaluation_the_contrastive_one_alone(tmp_path: Path) -> None:
    fields = {"max_steps": 2, "evaluated": keyed_rows(BATCH), "eval_strategy": "steps", "eval_steps": 1}
    found = in_order(tmp_path / "found", keyed_rows(2 * BATCH), **fields, **{**AVERAGED, "structure_weight": 0.0})
    found.train()
    terms = {name for entry in found.state.log_history for name in entry if name.startswith("loss_")}
    assert terms == {"loss_contrastive", "loss_distill_instance"}
    plain = in_order(tmp_path / "plain", keyed_rows(2 * BATCH), **fields)
    plain.train()
    assert not [name for entry in plain.state.log_history for name in entry if name.startswith("loss_")]
    plain.model.load_state_dict(averages(tmp_path / "found" / "checkpoint-2"), strict=False)
    assert logged(found, "eval_loss")[-1] == pytest.approx(plain.evaluate()["eval_loss"])


def test_a_run_of_both_parts_keeps_the_space_and_resumes_in_either(inputs: Inputs, clip: str, tmp_path: Path) -> None:
    def config(name: str) -> Stage2Recipe:
        # Feature dropout shows that the teacher draws no random numbers.
        fields = {"relational_weight": 1.0, "feature_dropout": 0.2, **AVERAGED}
        return settings(tmp_path / name, inputs, clip, warm_start=None, **fields)

    expected = train(config("unbroken"))
    first = load(tmp_path / "unbroken" / "warm_start")
    head = load_encoder(clip).model.visual_projection.weight
    assert first.visual_projection.weight.equal(head)
    assert first.visual_projection.bias is None
    assert not expected.visual_projection.weight.equal(head)
    assert F.cosine_similarity(expected.visual_projection.weight, head, dim=0).min() > 0.9
    # Killed in the second part, and then at the end of the first.
    train(config("broken"))
    for lost in (["checkpoint-6"], ["checkpoint-6", "checkpoint-3", "warm_start/checkpoint-4"]):
        for name in lost:
            (tmp_path / "broken" / name / "trainer_state.json").unlink()
        if len(lost) > 1:
            for name in ("warm_start/warm_start.json", FOLDER_MANIFEST, f"warm_start/{FOLDER_MANIFEST}"):
                (tmp_path / "broken" / name).unlink()
        assert_equal_weights(train(config("broken"), resume=True), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llm2clip", "siglip"])
def test_the_heads_of_a_model_are_taken(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    former = str(tmp_path / "former")
    if kind == "siglip":
        save_transformers("siglip", tmp_path / "former")
    else:
        fields = {"freeze_vision": "all", "vision_pooling": "cls_mean", "standardize_features": True}
        fields |= {"visual_head": "gated", "max_steps": 2, "save_strategy": "no"}
        own = small_runs.stage2_fields(tmp_path / "former", inputs.vision, inputs.text, inputs.cache)
        train(build_config(Stage2Recipe, {**own, **fields}))
    encoder: Any = load_encoder(former)
    processor = AutoImageProcessor.from_pretrained(former)
    vision, width = (former, 32) if kind == "siglip" else (inputs.vision, 24)
    new = LLM2CLIPModel.from_vision_text_pretrained(vision, inputs.text, projection_dim=width)
    take_space(new, processor, former)
    assert isinstance(new.visual_projection, torch.nn.Identity) == (kind == "siglip")
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))]
    found = OurEncoder(new.eval(), processor).encode_image(images)
    torch.testing.assert_close(found, encoder.encode_image(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("width", "source", "message"),
    [
        (32, "clip", r"embeds as 24 values, but the model as 32; set projection_dim: 24"),
        (24, "clip", r"embeds images otherwise than the vision tower .* vision_model_name_or_path"),
        (24, "text", "it contains a text tower"),
    ],
)
def test_the_space_of_another_model_is_refused(
    width: int, source: str, message: str, inputs: Inputs, clip: str
) -> None:
    model = LLM2CLIPModel.from_vision_text_pretrained(inputs.vision, inputs.text, projection_dim=width)
    with pytest.raises(ValueError, match=message):
        take_space(model, AutoImageProcessor.from_pretrained(inputs.vision), clip if source == "clip" else inputs.text)


def test_the_trainer_alone_keeps_a_space(inputs: Inputs, clip: str, tmp_path: Path) -> None:
    table = datasets.load_dataset("parquet", data_files=f"{small_runs.CONCEPTS}/train.parquet", split="train[:32]")
    model = LLM2CLIPModel.from_vision_text_pretrained(clip, inputs.text, projection_dim=24)
    joint = LLM2CLIPProcessor.from_pretrained(joint_model(inputs, tmp_path / "model"))
    image_processor = load_encoder(clip).transform.image_processor  # type: ignore[attr-defined]
    processor = LLM2CLIPProcessor(image_processor, joint.tokenizer)
    args = Stage2Config(**trainer_settings(tmp_path, warm_start={"distill_from": clip}, **AVERAGED))
    cache = EmbeddingCache.open(inputs.cache)
    Stage2Trainer(model, args, train_dataset=table, processing_class=processor, cache=cache).fit()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("arXiv 2510.18795") == 2
    assert clip not in card, "the path of a folder here is private"
    alone = Stage2Config(**trainer_settings(tmp_path, freeze_vision="all", distill_from=clip))
    with pytest.raises(ValueError, match=r"distill_from is .*, but only the images of"):
        Stage2Trainer(model, alone, train_dataset=[{}], processing_class=processor)
    with pytest.raises(ValueError, match="distill_from needs a processing_class with an image processor"):
        Stage2Trainer(model, args, train_dataset=[{}])


def test_the_terms_of_the_log_add_up_to_its_loss_over_several_batches_and_in_a_resumed_run(tmp_path: Path) -> None:
    data = keyed_rows(8 * BATCH)
    fields = {**AVERAGED, "relational_weight": 2.0, "gradient_accumulation_steps": 2, "max_steps": 4}
    fields |= {"logging_steps": 3, "save_steps": 2, "learning_rate": 1e-2}
    unbroken, resumed = in_order(tmp_path, data, **fields), in_order(tmp_path, data, **fields)
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = ("loss", "loss_contrastive", "loss_relational", *sorted(TERMS))
    (first,) = zip(*(logged(unbroken, name) for name in names), strict=True)
    assert first == pytest.approx([logged(resumed, name)[0] for name in names], abs=1e-5)
    loss, contrastive, relational, instance, structure = first
    assert loss == pytest.approx(contrastive + 0.5 * (instance + 20 * structure) + 2 * relational, abs=1e-5)
