"""Inputs of a small stage 2 run: captioned JPEGs, both towers, and the embedding cache."""

from __future__ import annotations

import atexit
import io
import random
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "golden" / "llm2vec_llama_a_hf"
WORDS = ("the", "red", "old", "small", "river", "street", "house", "dog", "bird", "walks", "near", "under", "light")
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


def temporary_folder() -> Path:
    """Create a temporary folder, which is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="llm2clip-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


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
        rows["caption"].append(f"{row} " + " ".join(choose.choices(WORDS, k=words)))
    path = folder / "pictures.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    return [{"path": str(path), "caption_columns": ["caption"]}]


def write_text_tower(folder: Path, hidden: int, layers: int) -> Path:
    """Write a Llama with random weights in the form of a stage 1 result."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel, with_prompt

    prefix, suffix = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    tokenizer, prefix_tokens = with_prompt(AutoTokenizer.from_pretrained(TOKENIZER), prefix, suffix)
    decoder = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LLM2CLIPTextConfig(
        decoder_config=decoder,
        prompt_prefix=prefix,
        prompt_suffix=suffix,
        num_prefix_tokens=prefix_tokens,
        prompt_token_ids=tokenizer("")["input_ids"],
        max_text_length=512,
    )
    torch.manual_seed(0)
    LLM2CLIPTextModel(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder / "text"


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


def embed(folder: Path, text: Path, sources: list[dict[str, Any]]) -> tuple[Path, float]:
    """Embed the captions into a cache; return its folder and the CPU seconds."""
    from llm2clip.encoders import embed as stage

    start = time.process_time()
    stage.run(stage.EmbedConfig(text_model_name_or_path=str(text), output_dir=str(folder / "cache"), sources=sources))
    return folder / "cache", time.process_time() - start


class StepClock:
    """Measures the seconds per step from the end of the first step to the end of the last, without the start-up."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def step_ends(self) -> None:
        """Call at the end of every step."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def metrics(self) -> dict[str, float]:
        """Return `wall` and `cpu` seconds of this process per step."""
        wall, cpu = (
            (last - first) / (len(self.ends) - 1) for first, last in zip(self.ends[0], self.ends[-1], strict=True)
        )
        return {"wall": wall, "cpu": cpu}


def write_inputs(pictures: int, words: int, hidden: int, vision: dict[str, int]) -> dict[str, Any]:
    """Write data, towers and the cache into a temporary folder; return the settings of a run on them.

    Args:
        pictures, words: Number of pictures, and of words per caption.
        hidden: Width of the text tower, which has one layer.
        vision: Arguments of `write_vision_tower`.
    """
    folder = temporary_folder()
    sources = write_pictures(folder, pictures, words)
    text = write_text_tower(folder, hidden, layers=1)
    return {
        "vision_model_name_or_path": str(write_vision_tower(folder, **vision)),
        "text_model_name_or_path": str(text),
        "embedding_cache": str(embed(folder, text, sources)[0]),
        "sources": sources,
        "output_dir": str(folder / "out"),
    }


def make_trainer(fields: dict[str, Any]) -> Any:
    """Build the Trainer of `llm2clip stage2` with these settings; its initial weights are always the same."""
    from llm2clip.trainers.run_stage2 import build_trainer
    from llm2clip.trainers.stage2_config import Stage2Recipe
    from llm2clip.utils.settings import build_config

    return build_trainer(build_config(Stage2Recipe, {**COMMON_FIELDS, **fields}))


def train(trainer: Any) -> tuple[list[float], dict[str, float]]:
    """Train; return the logged losses and the seconds per step."""
    from transformers import TrainerCallback

    clock = StepClock()

    class Clock(TrainerCallback):
        # The log of a step counts for the next one.
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_ends()

    trainer.add_callback(Clock())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.metrics()


def bare_loop(trainer: Any, batches: list[dict[str, Any]]) -> tuple[list[float], dict[str, float]]:
    """Train the trainer's model by its settings without a Trainer: forward, loss, backward and optimizer.

    Args:
        batches: Prepared batches, one for each step; each caption matches the image of its row.

    Returns:
        The loss of every step and the seconds per step.
    """
    import torch

    from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule

    config, model = trainer.args, trainer.model.train()
    rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    groups = parameter_groups(model, **rates, vision_layer_decay=config.vision_layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = warmup_cosine_schedule(optimizer, 0, len(batches))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = ("pixel_values", "vision_features", "llm_embeds")
    clock, losses = StepClock(), []
    for batch in batches:
        logits = model(**{name: batch[name] for name in inputs if name in batch}).logits_per_image
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
        clock.step_ends()
    return losses, clock.metrics()
