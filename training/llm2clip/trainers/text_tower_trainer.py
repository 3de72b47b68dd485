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
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class TextTowerTrainer(StageTrainer):
    """Trains an [`LLM2CLIPTextModel`] and saves it with its tokenizer and remote code."""

    card_task = TEXT_TASK
    evaluation_title = "caption retrieval"
    model: LLM2CLIPTextModel

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

    def _load_best_model(self) -> None:
        if self.accelerator.unwrap_model(self.model).has_adapter:
            self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def save_result(self, output_dir: str | Path, save_format: str) -> None:
        """Save the trained text tower.

        Args:
            output_dir: The folder.
            save_format: `merged` first merges LoRA into the weights, in the trainer's model too; `adapter` saves LoRA
                alone.
        """
        self.accelerator.wait_for_everyone()
        text_model = self.accelerator.unwrap_model(self.model)
        if save_format == "merged":
            text_model.merge_adapter()
        if self.args.should_save:
            save_text_tower(text_model, cast(PreTrainedTokenizerBase, self.processing_class), output_dir)
            if not text_model.has_adapter:
                # Pushed checkpoints have left them here.
                for name in ADAPTER_FILES:
                    Path(output_dir, name).unlink(missing_ok=True)
                write_sentence_transformers_files(output_dir)
        self.accelerator.wait_for_everyone()
