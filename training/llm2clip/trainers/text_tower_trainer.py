"""Trainer of the stages that train an LLM as a text tower, with LoRA or without."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from llm2clip.evaluation import CaptionRetrieval
from llm2clip.hub.cards.facts import TEXT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class TextTowerTrainer(StageTrainer):
    """Trains an [`LLM2CLIPTextModel`] and saves it with its tokenizer and remote code."""

    card_task = TEXT_TASK
    evaluation_title = "caption retrieval"
    model: LLM2CLIPTextModel
    args: TextTowerConfig

    def measure(self, model: LLM2CLIPTextModel, retrieval: CaptionRetrieval) -> dict[str, float | int]:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        return retrieval(model, tokenizer, self.args.per_device_eval_batch_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        text_model = self.accelerator.unwrap_model(model or self.model)
        if text_model.has_adapter:
            decoder = text_model.decoder
            decoder.load_adapter(resume_from_checkpoint, decoder.active_adapter, is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_result(self, output_dir: str | Path) -> None:
        text_model = self.accelerator.unwrap_model(self.model)
        if self.args.save_format == "merged":
            text_model.merge_adapter()  # the evaluation that follows measures the merged model
        if self.args.should_save:
            save_text_tower(text_model, cast(PreTrainedTokenizerBase, self.processing_class), output_dir)
            if not text_model.has_adapter:
                # Pushed checkpoints have left them here.
                for name in ADAPTER_FILES:
                    Path(output_dir, name).unlink(missing_ok=True)
                write_sentence_transformers_files(output_dir)
