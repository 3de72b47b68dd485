"""The trainers as any Hugging Face Trainer: plain torch data sets, no `run`, no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    MNTPConfig,
    MNTPTrainer,
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
)
from llm2clip.data import DamagedImageError
from tests.llm2clip.conftest import Inputs

Rows = list[dict[str, Any]]


class MapRows(Dataset):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class IterableRows(IterableDataset):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    fields = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 12, "per_device_train_batch_size": 8}
    shared = {"logging_steps": 1, "save_steps": 6, "report_to": "none", "use_cpu": True, "seed": 7}
    return {"output_dir": str(folder), **fields, **shared, **changes}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_loss_falls(trainer: Any) -> None:
    found = losses(trainer)
    assert sum(found[-3:]) < 0.95 * sum(found[:3]), found


def image_rows(width: int, count: int = 32) -> Rows:
    torch.manual_seed(0)
    pixels, embeds = torch.randn(count, 3, 28, 28), torch.randn(count, width)
    return [{"pixel_values": x, "llm_embeds": y} for x, y in zip(pixels, embeds, strict=True)]


def joint_model(inputs: Inputs, folder: Path) -> str:
    """A model to train, saved with its processor as on the Hub."""
    torch.manual_seed(0)
    model = LLM2CLIPModel.from_vision_text_pretrained(inputs.vision, inputs.text, projection_dim=24)
    model.save_pretrained(folder)
    for name in (inputs.vision, inputs.text):
        for path in Path(name).iterdir():
            if path.name.startswith(("preprocessor", "tokenizer", "special_tokens")):
                (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


@pytest.mark.parametrize("kind", [MapRows, IterableRows])
def test_stage2_trains_on_any_torch_data_set(kind: type, inputs: Inputs, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    rows = image_rows(model.config.text_config.hidden_size)
    trainer = Stage2Trainer(
        model=model,
        args=Stage2Config(**settings(tmp_path / "out")),
        train_dataset=kind(rows),
        eval_dataset=MapRows(rows[:13]),
    )
    trainer.train()
    assert_loss_falls(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_num_texts"] == 13
    assert metrics["eval_text_to_image_recall@1"] > 2 / 13
    assert metrics["eval_loss"] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModel.from_pretrained(tmp_path / "saved", text_model=False).state_dict()
    assert all(value.equal(saved[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("with_ids", [False, True])
def test_an_evaluation_whose_last_batch_is_one_damaged_image_counts_the_others(
    with_ids: bool, inputs: Inputs, tmp_path: Path
) -> None:
    folder = joint_model(inputs, tmp_path / "model")
    model, processor = LLM2CLIPModel.from_pretrained(folder, text_model=False), AutoProcessor.from_pretrained(folder)
    embeds = torch.randn(9, model.config.text_config.hidden_size)
    images: list[Any] = [Image.effect_noise((30, 30), 80).convert("RGB") for _ in range(8)]
    rows: Rows = [{"image": x, "llm_embeds": y} for x, y in zip([*images, b"damaged"], embeds, strict=True)]
    if with_ids:
        rows = [{**row, "caption_id": number} for number, row in enumerate(rows)]
    config = Stage2Config(**settings(tmp_path / "out"), on_error="skip", per_device_eval_batch_size=8)
    trainer = Stage2Trainer(
        model=model, args=config, train_dataset=MapRows(rows), eval_dataset=MapRows(rows), processing_class=processor
    )
    assert trainer.evaluate()["eval_num_texts"] == 8


def test_max_pixels_counts_for_own_rows_too(inputs: Inputs, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(joint_model(inputs, tmp_path / "model"))
    model = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=False)
    config = Stage2Config(**settings(tmp_path / "out"), max_pixels=899)
    trainer = Stage2Trainer(model=model, args=config, train_dataset=MapRows([]), processing_class=processor)
    row = {"image": Image.new("RGB", (30, 30)), "llm_embeds": torch.ones(model.config.text_config.hidden_size)}
    with pytest.raises(DamagedImageError, match=r"30 x 30 pixels exceed max_pixels \(899\)"):
        trainer.data_collator([row])


def test_stage2_trains_on_images_and_captions_with_the_llm_online(inputs: Inputs, tmp_path: Path) -> None:
    folder = joint_model(inputs, tmp_path / "model")
    model, processor = LLM2CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.text_model.requires_grad_(False)
    texts = [f"a picture of thing {number // 2}" for number in range(16)]
    # Equal captions share an id: each of them is a correct answer to both images.
    rows: Rows = [
        {"pixel_values": row["pixel_values"], "caption": text, "caption_id": number // 2}
        for number, (row, text) in enumerate(zip(image_rows(1, 16), texts, strict=True))
    ]
    args = Stage2Config(**settings(tmp_path / "out", max_steps=2))
    trainer = Stage2Trainer(
        model=model,
        args=args,
        train_dataset=MapRows(rows),
        eval_dataset={"own": MapRows(rows)},
        processing_class=processor,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_own_num_texts"] == 8
    assert metrics["eval_own_num_images"] == 16


def test_shared_captions_are_negatives_as_in_the_original_or_positives(inputs: Inputs, tmp_path: Path) -> None:
    """Two images each have the same two captions, of which each draws another one."""
    folder = joint_model(inputs, tmp_path / "model")

    def first_loss(name: str, with_ids: bool = True, **changes: Any) -> float:
        model = LLM2CLIPModel.from_pretrained(folder, text_model=False)
        rows = image_rows(model.config.text_config.hidden_size, 16)
        for number, row in enumerate(rows):
            even = number // 2 * 2
            row |= {"caption_id": number, "image_caption_ids": [even, even + 1]} if with_ids else {}
        fields = settings(tmp_path / name, max_steps=1, per_device_train_batch_size=16, save_strategy="no", **changes)
        trainer = Stage2Trainer(model=model, args=Stage2Config(**fields), train_dataset=MapRows(rows))
        trainer.train()
        return losses(trainer)[0]

    alone = first_loss("alone", with_ids=False)
    assert first_loss("default") == pytest.approx(alone, abs=1e-6)
    assert first_loss("separate", shared_captions="separate") == pytest.approx(alone, abs=1e-6)
    assert abs(first_loss("positive", shared_captions="positive") - alone) > 1e-3


def test_stage2_resumes_on_a_plain_data_set(inputs: Inputs, tmp_path: Path) -> None:
    folder = joint_model(inputs, tmp_path / "model")

    def trainer(name: str) -> Stage2Trainer:
        model = LLM2CLIPModel.from_pretrained(folder, text_model=False)
        rows = MapRows(image_rows(model.config.text_config.hidden_size))
        return Stage2Trainer(model=model, args=Stage2Config(**settings(tmp_path / name)), train_dataset=rows)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert losses(resumed)[-6:] == pytest.approx(losses(whole)[-6:], abs=1e-5)


@pytest.mark.parametrize("kind", [MapRows, IterableRows])
@pytest.mark.parametrize("negatives", [False, True])
def test_stage1_trains_on_any_torch_data_set(kind: type, negatives: bool, inputs: Inputs, tmp_path: Path) -> None:
    rows: Rows = [{"anchor": f"word {n} {n * n}", "positive": f"meaning of {n} {n * n}"} for n in range(32)]
    rows = [{**row, "negative": "nonsense"} for row in rows] if negatives else rows
    model, tokenizer = LLM2CLIPTextModel.from_pretrained(inputs.text), AutoTokenizer.from_pretrained(inputs.text)
    trainer = Stage1Trainer(
        model=model,
        args=Stage1Config(**settings(tmp_path / "out", max_steps=12)),
        train_dataset=kind(rows),
        eval_dataset=MapRows(rows[:13]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert_loss_falls(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_num_targets"] == 13
    trainer.save_model(str(tmp_path / "saved"))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "saved"), LLM2CLIPTextModel)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a dog")["input_ids"]


@pytest.mark.parametrize("row", [{"text": "a small brown dog runs on the beach"}, {"input_ids": list(range(5, 25))}])
def test_mntp_trains_on_texts_and_tokens(row: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    language_model: Any = AutoModelForCausalLM.from_pretrained(inputs.llm)
    trainer = MNTPTrainer(
        head=language_model.get_output_embeddings(),
        model=LLM2CLIPTextModel.from_decoder(language_model.base_model),
        args=MNTPConfig(**settings(tmp_path / "out", learning_rate=1e-2)),
        train_dataset=MapRows([row] * 32),
        eval_dataset=MapRows([row] * 8),
        processing_class=AutoTokenizer.from_pretrained(inputs.llm),
    )
    trainer.train()
    assert_loss_falls(trainer)
    assert trainer.evaluate()["eval_loss"] > 0


def test_best_model_is_chosen_by_the_metric_of_the_evaluation_rows(inputs: Inputs, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    rows = MapRows(image_rows(model.config.text_config.hidden_size))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "text_to_image_mean_rank"}
    steps = {"eval_strategy": "steps", "eval_steps": 6, "greater_is_better": True}
    trainer = Stage2Trainer(
        model=model,
        args=Stage2Config(**settings(tmp_path / "out", **best, **steps)),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    expected = LLM2CLIPModel.from_pretrained(tmp_path / "out" / "checkpoint-6", text_model=False).state_dict()
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())


def test_a_data_set_smaller_than_a_batch_is_one_clear_error(inputs: Inputs, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(joint_model(inputs, tmp_path / "model"), text_model=False)
    rows = MapRows(image_rows(model.config.text_config.hidden_size, 4))
    trainer = Stage2Trainer(model=model, args=Stage2Config(**settings(tmp_path / "out")), train_dataset=rows)
    with pytest.raises(ValueError, match="fewer rows than one batch of 8"):
        trainer.train()


def test_choices_are_checked_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss is 'hinge', but it has to be one of softmax, sigmoid"):
        Stage2Config(output_dir=str(tmp_path), loss="hinge")  # type: ignore[arg-type]
