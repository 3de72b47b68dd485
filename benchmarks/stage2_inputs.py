"""A small run of stage 2 beside a bare loop: captioned JPEGs, both towers, the cache, and what a step takes."""

from __future__ import annotations

import io
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Work
from benchmarks.small_llama import WORDS, new_folder, write_text_tower

# img2dataset stores CC3M in this size: the shorter side is 384.
PICTURE = (512, 384)
# A run that writes nothing, and reads its data in one worker process, as on a machine with two cores.
COMMON_FIELDS = {
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "dataloader_num_workers": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def write_pictures(folder: Path, number: int, words: int) -> list[dict[str, Any]]:
    """Write captioned JPEGs into a parquet file; return the source."""
    import datasets
    import numpy as np
    from PIL import Image

    generator, choose = np.random.default_rng(0), random.Random(0)
    rows: dict[str, list] = {"image": [], "caption": []}
    for row in range(number):
        # A smooth image with some noise has the file size of a photograph (50 KB).
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(PICTURE, Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        rows["image"].append(file.getvalue())
        rows["caption"].append(f"{row} " + " ".join(choose.choices(WORDS.split(), k=words)))
    path = folder / "pictures.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    return [{"path": str(path), "caption_columns": ["caption"]}]


def write_vision_tower(folder: Path, hidden: int, layers: int, patch: int, size: int) -> Path:
    """Write an EVA02 with random weights and its image processor."""
    import torch
    from transformers import CLIPImageProcessor

    from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel

    config = EVA02VisionConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=size,
        patch_size=patch,
    )
    torch.manual_seed(0)
    EVA02VisionModel(config).save_pretrained(folder / "vision")
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder / "vision")
    return folder / "vision"


def write_inputs(pictures: int, words: int, hidden: int, vision: dict[str, int]) -> dict[str, Any]:
    """Write data, towers and the cache into a temporary folder; return the settings of a run on them.

    Args:
        pictures, words: Number of pictures, and of words per caption.
        hidden: Width of the text tower, which has one layer.
        vision: Arguments of `write_vision_tower`.
    """
    from llm2clip.encoders.embed import EmbedConfig, run

    folder = new_folder()
    sources = write_pictures(folder, pictures, words)
    text, cache = (
        str(write_text_tower(folder / "text", hidden=hidden, mlp=7 * hidden // 2, layers=1)),
        str(folder / "cache"),
    )
    run(EmbedConfig(text_model_name_or_path=text, output_dir=cache, sources=sources))
    return {
        "vision_model_name_or_path": str(write_vision_tower(folder, **vision)),
        "text_model_name_or_path": text,
        "embedding_cache": cache,
        "sources": sources,
        "output_dir": str(folder / "out"),
    }


def step_contest(title: str, fields: Callable[[], dict[str, Any]], note: str, at_most: float) -> Contest:
    """The Trainer, and the limit: the same steps on prepared batches.

    Args:
        fields: Writes the inputs and returns the settings of the run.
        at_most: Largest ratio of their times.
    """
    contestants = {"ours": Contestant(partial(_train, fields)), "bare loop": Contestant(partial(_bare_loop, fields))}
    goals = (Goal("bare loop", "wall", at_most), Goal("bare loop", "cpu", at_most))
    first = "Seconds are those of one step, from the end of the first to the end of the last."
    note = f"{first} {note} The bare loop has its batches in memory, and is the limit."
    return Contest(title, contestants, goals, {"losses": 1e-4}, rounds=3, note=note)


def _make_trainer(fields: dict[str, Any]) -> Any:
    """Build the Trainer of `llm2clip stage2` with these settings; its initial weights are always the same."""
    from llm2clip.trainers.run_stage2 import build_trainer
    from llm2clip.trainers.stage2_config import Stage2Recipe
    from llm2clip.utils.settings import build_config

    return build_trainer(build_config(Stage2Recipe, {**COMMON_FIELDS, **fields}))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _per_step(ends: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds of this process per step, from the end of the first to the end of the last."""
    wall, cpu = ((last - first) / (len(ends) - 1) for first, last in zip(ends[0], ends[-1], strict=True))
    return {"wall": wall, "cpu": cpu}


def _train(fields: Callable[[], dict[str, Any]]) -> Work:
    from transformers import TrainerCallback

    settings = fields()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        # The log of a step counts for the next one.
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(_now())

    def work() -> Outcome:
        trainer, clock = _make_trainer(settings), Clock()
        trainer.add_callback(clock)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Outcome({"losses": losses}, _per_step(clock.ends))

    return work


def _bare_loop(fields: Callable[[], dict[str, Any]]) -> Work:
    """Forward, loss, backward and optimizer; each caption matches the image of its row."""
    import torch

    from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule
    from llm2clip.trainers.run_context import RunContext

    settings = fields()

    def prepared() -> Any:
        trainer = _make_trainer(settings)
        with RunContext(trainer.args) as run:
            trainer.prepare_training(run)
        return trainer

    loader: Any = prepared().get_train_dataloader()
    batches: list[dict[str, Any]] = []
    while len(batches) < settings["max_steps"]:
        loader.set_epoch(len(batches) // len(loader))
        batches += itertools.islice(loader, settings["max_steps"] - len(batches))

    def work() -> Outcome:
        trainer = prepared()
        config, model = trainer.args, trainer.model.train()
        rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
        groups = parameter_groups(model, **rates, vision_layer_decay=config.vision_layer_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = warmup_cosine_schedule(optimizer, 0, len(batches))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ends, losses = [], []
        for batch in batches:
            logits = model(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"]).logits_per_image
            labels = torch.arange(len(logits))
            loss = torch.nn.functional.cross_entropy(logits, labels) / 2
            loss = loss + torch.nn.functional.cross_entropy(logits.T, labels) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                clamp_logit_scale(model)
            losses.append(loss.item())
            ends.append(_now())
        return Outcome({"losses": losses}, _per_step(ends))

    return work
