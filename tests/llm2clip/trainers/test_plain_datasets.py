"""The trainers as any Hugging Face Trainer: plain torch data sets, no `run`, no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, CLIPProcessor

from llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, Stage2Config, Stage2Trainer
from llm2clip.data import caption_id
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import (
    IterableRows,
    MapRows,
    Rows,
    image_rows,
    logged,
    mntp,
    settings,
    stage1,
    stage2,
)
from tests.llm2clip.trainers.stages import joint_model

WIDTH = tiny.HIDDEN
LONGER = {"max_steps": 12, "save_steps": 6}


def assert_loss_falls(trainer: Any) -> None:
    found = logged(trainer, "loss")
    assert sum(found[-3:]) < 0.95 * sum(found[:3]), found


@pytest.mark.parametrize("kind", [MapRows, IterableRows])
def test_stage2_trains_on_any_torch_data_set(kind: type, inputs: Inputs, tmp_path: Path) -> None:
    rows = image_rows(WIDTH)
    trainer = stage2(inputs, tmp_path, kind(rows), **LONGER)
    trainer.train()
    assert_loss_falls(trainer)
    assert trainer.evaluate(MapRows(rows[:13]))["eval_loss"] < logged(trainer, "loss")[0]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModel.from_pretrained(tmp_path / "saved", text_model=False).state_dict()
    assert all(value.equal(saved[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("kind", [MapRows, IterableRows])
def test_stage1_trains_on_any_torch_data_set(kind: type, inputs: Inputs, tmp_path: Path) -> None:
    rows: Rows = [{"anchor": f"word {n} {n * n}", "positive": f"meaning of {n} {n * n}"} for n in range(32)]
    trainer = stage1(inputs, tmp_path, kind(rows), **LONGER)
    trainer.train()
    assert_loss_falls(trainer)
    assert trainer.evaluate(MapRows(rows[:13]))["eval_loss"] < logged(trainer, "loss")[0]
    trainer.save_model(str(tmp_path / "saved"))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "saved"), LLM2CLIPTextModel)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a dog")["input_ids"]


@pytest.mark.parametrize("row", [{"text": "a small brown dog runs on the beach"}, {"input_ids": list(range(5, 25))}])
def test_mntp_trains_on_texts_and_tokens(row: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    trainer = mntp(inputs, tmp_path, MapRows([row] * 32), learning_rate=1e-2, **LONGER)
    trainer.train()
    assert_loss_falls(trainer)
    assert trainer.evaluate(MapRows([row] * 8))["eval_loss"] > 0


def test_masks_of_short_rows_may_all_miss(inputs: Inputs, tmp_path: Path) -> None:
    trainer = mntp(inputs, tmp_path, mlm_probability=1e-9)
    trainer.train()
    assert logged(trainer, "loss") == [0.0] * 3


def test_an_evaluation_leaves_out_what_cannot_be_used_and_names_a_batch_without_any_row(
    inputs: Inputs, tmp_path: Path
) -> None:
    images: list[Any] = [Image.effect_noise((30, 30), 80).convert("RGB") for _ in range(8)]
    rows: Rows = [{"image": x, "llm_embeds": y} for x, y in zip([*images, b"damaged"], torch.randn(9, WIDTH))]  # noqa: B905
    trainer = stage2(inputs, tmp_path, MapRows(rows), on_error="skip", per_device_eval_batch_size=5)
    assert trainer.evaluate(MapRows(rows))["eval_loss"] > 0
    trainer.args.per_device_eval_batch_size = 8
    with pytest.raises(ValueError, match=r"none of the 1 rows of a batch can be used \(image .*raise the batch size"):
        trainer.evaluate(MapRows(rows))


def online(inputs: Inputs, folder: Path, **changes: Any) -> tuple[Stage2Trainer, MapRows]:
    """A Trainer on images of noise with captions, of which two rows each have an equal one with the same id."""
    name = joint_model(inputs, folder / "model")
    rows = MapRows(
        [
            {"pixel_values": row["pixel_values"], "caption": f"thing {number // 2}", "caption_id": number // 2}
            for number, row in enumerate(image_rows(1, 16))
        ]
    )
    model, processor = LLM2CLIPModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    args = Stage2Config(**settings(folder, max_steps=2, **changes))
    return Stage2Trainer(model, args, None, rows, {"own": rows}, processing_class=processor), rows


def test_stage2_trains_with_the_llm_online_whose_graph_is_not_kept(inputs: Inputs, tmp_path: Path) -> None:
    """With activation checkpointing, transformers asks for gradients of every model's inputs, the frozen LLM's too."""
    trainer, _ = online(inputs, tmp_path, activation_checkpointing=True)
    with_gradient: list[bool] = []
    trainer.model.text_model.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    trainer.train()
    assert with_gradient == [False] * 2
    assert trainer.evaluate()["eval_own_loss"] > 0


def test_shared_captions_are_negatives_as_in_the_original_or_positives(inputs: Inputs, tmp_path: Path) -> None:
    """Two images each have the same two captions, of which each draws another one."""

    def first_loss(name: str, with_ids: bool = True, **changes: Any) -> float:
        rows = image_rows(WIDTH, 16)
        for number, row in enumerate(rows):
            even = number // 2 * 2
            row |= {"caption_id": number, "image_caption_ids": [even, even + 1]} if with_ids else {}
        trainer = stage2(
            inputs, tmp_path / name, MapRows(rows), max_steps=1, per_device_train_batch_size=16, **changes
        )
        trainer.train()
        return logged(trainer, "loss")[0]

    alone = first_loss("alone", with_ids=False)
    assert first_loss("default") == pytest.approx(alone, abs=1e-6)
    assert first_loss("separate", shared_captions="separate") == pytest.approx(alone, abs=1e-6)
    assert abs(first_loss("positive", shared_captions="positive") - alone) > 1e-3


@pytest.mark.parametrize("choice", ["separate", "positive"])
def test_captions_are_hashed_only_if_the_loss_uses_their_ids(
    choice: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes the collator, for training and for evaluation."""
    hashed = list[str]()
    monkeypatch.setattr(
        "llm2clip.data.stage2_collator.caption_id", lambda text: (hashed.append(text), caption_id(text))[1]
    )
    given = stage2(inputs, tmp_path, shared_captions=choice)
    options: dict[str, Any] = {"processing_class": given.processing_class, "cache": given.cache}
    for trainer in (given, Stage2Trainer(given.model, given.args, train_dataset=given.train_dataset, **options)):
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(given.train_dataset)):
            hashed.clear()
            assert ("caption_ids" in next(iter(loader))) == bool(hashed) == (choice == "positive")


def test_stage2_resumes_on_a_plain_data_set(inputs: Inputs, tmp_path: Path) -> None:
    def trainer(name: str) -> Stage2Trainer:
        return stage2(inputs, tmp_path / name, MapRows(image_rows(WIDTH)), save_strategy="steps", **LONGER)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-6"))
    assert logged(resumed, "loss")[-6:] == pytest.approx(logged(whole, "loss")[-6:], abs=1e-5)


def test_a_processor_of_another_library_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    clip = CLIPProcessor(AutoImageProcessor.from_pretrained(inputs.vision), AutoTokenizer.from_pretrained(inputs.text))
    made = stage2(inputs, tmp_path, MapRows(image_rows(WIDTH)))
    with pytest.raises(ValueError, match="processing_class is a CLIPProcessor; give the LLM2CLIPProcessor"):
        Stage2Trainer(made.model, made.args, None, made.train_dataset, processing_class=clip)
