"""`python -m tests.soak.programs NAME ARGUMENTS` does something very often, and prints the levels of its process."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from llm2clip import LLM2CLIPModel
from llm2clip.command_line.settings import build_config
from llm2clip.search.search_index import SearchIndex
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.soak.measure import Soak

CALLS, WARM_UP = 2000, 300
# An hour of training at a second a step, about what a step with 4,096 images on 8 GPUs takes; here a step has few.
STEPS, STEPS_WARM_UP = 3600, 400
WORDS = ["a", "small", "dog", "children", "play", "football", "seen", "from", "the", "green", "park", "bridge"]
DRAW = random.Random(0)


def encode_text(model_folder: str) -> Soak:
    """1 to 8 captions of 1 to 60 words at a time."""
    model, processor = _opened(model_folder)

    def captions() -> list[str]:
        return [" ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 60))) for _ in range(DRAW.randint(1, 8))]

    batches = [captions() for _ in range(97)]
    return Soak.of(lambda number: model.encode_text(batches[number % 97], processor), CALLS, WARM_UP)


def encode_image(model_folder: str) -> Soak:
    """1 to 4 images of 20 to 300 pixels at a time."""
    model, processor = _opened(model_folder)

    def picture() -> Image.Image:
        return Image.new("RGB", (DRAW.randint(20, 300), DRAW.randint(20, 300)), DRAW.choice(["red", "blue", "white"]))

    batches = [[picture() for _ in range(DRAW.randint(1, 4))] for _ in range(97)]
    return Soak.of(lambda number: model.encode_image(batches[number % 97], processor), CALLS, WARM_UP)


def search(index: str) -> Soak:
    """1 to 5 queries at a time in an index that stays open, every third under a condition of its own."""
    opened = SearchIndex.open(index)
    queries = np.random.default_rng(0).standard_normal((97, 5, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)

    def once(number: int) -> None:
        where = f"key like '%{number}%' or size > {number % 11}" if number % 3 == 0 else None
        opened.search(queries[number % 97, : 1 + number % 5], 1 + number % 7, where)

    return Soak.of(once, CALLS, WARM_UP)


def loader(recipe: str) -> Soak:
    """The batches that the steps of stage 2 get, epoch after epoch."""
    config = build_config(Stage2Recipe, json.loads(Path(recipe).read_text()))
    batches = _batches(run_stage2.build_trainer(config))
    return Soak.of(lambda number: next(batches), STEPS, STEPS_WARM_UP)


def _batches(trainer: Any) -> Iterator[Any]:
    loader, epoch = trainer.get_train_dataloader(), 0
    while True:
        # As the Trainer does it at the beginning of an epoch.
        setter = loader if hasattr(loader, "set_epoch") else loader.dataset
        setter.set_epoch(epoch)
        yield from loader
        epoch += 1


def _opened(folder: str) -> tuple[Any, Any]:
    return LLM2CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    programs = {program.__name__: program for program in (encode_text, encode_image, search, loader)}
    name, *arguments = sys.argv[1:]
    print(json.dumps(asdict(programs[name](*arguments))))
