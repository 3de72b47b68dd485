"""What the tests of the trainers share: Trainers in Python, on rows of their own, without recipe and command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from llm2clip import (
    DistillConfig,
    DistillTrainer,
    EmbeddingCache,
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    MNTPConfig,
    MNTPTrainer,
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
    Student,
)
from llm2clip.data import CaptionImageDataset, OnError, Stage2Collator
from llm2clip.data.stage2_collator import DEFAULT_CROP
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import joint_model

ROWS, BATCH = 32, 8
PAIRS = [{"anchor": f"word {n} {n * n}", "positive": f"meaning of {n}", "negative": "no"} for n in range(ROWS)]
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


def image_rows(width: int, count: int = ROWS) -> Rows:
    """Images of noise with embeddings of captions."""
    torch.manual_seed(0)
    pixels, embeds = torch.randn(count, 3, 28, 28), torch.randn(count, width)
    return [{"pixel_values": x, "llm_embeds": y} for x, y in zip(pixels, embeds, strict=True)]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a Trainer: three steps, and nothing is saved."""
    shared = {"output_dir": str(folder / "out"), "report_to": "none", "use_cpu": True, "seed": 7, "max_steps": 3}
    shared |= {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "warmup_steps": 0, "save_strategy": "no"}
    return {**shared, "logging_steps": 1, **changes}


def captioned(inputs: Inputs, on_error: OnError = "raise") -> CaptionImageDataset:
    """The first of the bundled images with their captions; where they are skipped, one is damaged."""
    table = small_runs.rows_of_concepts(f":{ROWS}", "train")
    if on_error == "skip":
        table = table.cast_column("image", datasets.Image(decode=False))
        broken = lambda row, number: {"image": {"bytes": b"none", "path": None}} if number == 3 else {}  # noqa: E731
        table = table.map(broken, with_indices=True)
    return CaptionImageDataset.of_table(table, "image", "caption", seed=7)


def stage2(inputs: Inputs, folder: Path, rows: Any = None, on_error: OnError = "raise", **changes: Any) -> Any:
    """A Trainer of stage 2 on the bundled images with stored captions, or on rows with embeddings."""
    name = joint_model(inputs, folder / "model")
    model, processor = LLM2CLIPModel.from_pretrained(name, text_model=False), AutoProcessor.from_pretrained(name)
    cache = EmbeddingCache.open(inputs.cache) if rows is None else None
    return Stage2Trainer(
        model=model,
        args=Stage2Config(**settings(folder, **changes)),
        data_collator=Stage2Collator(cache, processor, on_error, crop_scale=DEFAULT_CROP),
        train_dataset=captioned(inputs, on_error) if rows is None else rows,
        processing_class=processor,
        cache=cache,
    )


def stage2_online(inputs: Inputs, folder: Path, **changes: Any) -> Stage2Trainer:
    """One whose LLM reads the captions in each step."""
    name = joint_model(inputs, folder / "model")
    model, processor = (load.from_pretrained(name) for load in (LLM2CLIPModel, AutoProcessor))
    args, rows = Stage2Config(**settings(folder, **changes)), captioned(inputs)
    return Stage2Trainer(model=model, args=args, train_dataset=rows, processing_class=processor)


def stage1(inputs: Inputs, folder: Path, rows: Any = PAIRS, **changes: Any) -> Stage1Trainer:
    return Stage1Trainer(
        model=LLM2CLIPTextModel.from_pretrained(inputs.text),
        args=Stage1Config(**settings(folder, **changes)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(inputs.text),
    )


def distill(inputs: Inputs, folder: Path, rows: Any = None, **changes: Any) -> DistillTrainer:
    embeds = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return DistillTrainer(
        model=Student.create(inputs.llm, 12, lambda: pytest.fail("it needs no teacher")),
        args=DistillConfig(**settings(folder, **changes)),
        train_dataset=rows or [{"text": row["anchor"], "embedding": x} for row, x in zip(PAIRS, embeds, strict=True)],
    )


def mntp(inputs: Inputs, folder: Path, rows: Any = None, **changes: Any) -> MNTPTrainer:
    language_model: Any = AutoModelForCausalLM.from_pretrained(inputs.llm)
    return MNTPTrainer(
        head=language_model.get_output_embeddings(),
        model=tiny.wrapped(language_model.base_model),
        args=MNTPConfig(**settings(folder, **changes)),
        train_dataset=rows or [{"text": f"{row['anchor']} {row['positive']}"} for row in PAIRS],
        processing_class=AutoTokenizer.from_pretrained(inputs.llm),
    )


# By the names of the stages.
TRAINERS = {"mntp": mntp, "stage1": stage1, "stage2": stage2, "distill": distill}


class InOrder(Stage2Trainer):
    """Takes the rows in order, so that a test knows the step of each; `broken_loss` has rank and step of a NaN."""

    broken_loss: tuple[int, int] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def contrastive_loss(self, *args: Any) -> Tensor:
        loss = super().contrastive_loss(*args)
        if self.broken_loss == (self.args.process_index, self.state.global_step):
            loss = loss + float("nan")  # the gradients stay finite
        return loss


def keyed_rows(count: int, *broken: int, value: float = float("nan")) -> Rows:
    """Rows with keys, some of which have a value that is not finite."""
    torch.manual_seed(0)
    pixels, embeds = torch.randn(count, 3, 28, 28), torch.randn(count, tiny.HIDDEN)
    pixels[list(broken), 0, 3, 3] = value
    return [{"key": f"k{i}", "pixel_values": pixels[i], "llm_embeds": embeds[i]} for i in range(count)]


def in_order(folder: Path, data: Rows, callbacks: Any = None, evaluated: Rows | None = None, **changes: Any) -> Any:
    """A Trainer of stage 2 that takes rows in their order and saves each step."""
    shared = {"logging_steps": 1, "save_steps": 1, "lr_scheduler_type": "constant", "max_steps": 3}
    shared |= {"report_to": "none", "use_cpu": True, "learning_rate": 1e-3, "warmup_steps": 0}
    torch.manual_seed(1)
    model = tiny.joint_model()
    if changes.get("loss") == "sigmoid":
        model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    fields = {"output_dir": str(folder), "per_device_train_batch_size": BATCH, **shared, **changes}
    return InOrder(
        model=model,
        args=Stage2Config(**fields),
        train_dataset=MapRows(data),
        eval_dataset=None if evaluated is None else MapRows(evaluated),
        callbacks=callbacks,
    )


def logged(trainer: Any, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
