"""Trainer of the stages that train an LLM as a text tower, with LoRA or without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm2clip.evaluation import CaptionRetrieval
from llm2clip.hub.cards.facts import TEXT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.run_inputs import sampled_digest
from llm2clip.trainers.sharding import is_divided, undivided, undivided_building, whole_weights
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.attention_probe import verify_on_main_process
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.identity_llm2clip import merged_weights

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class TextTowerTrainer(StageTrainer):
    """Trains an [`LLM2CLIPTextModel`] and saves it with its tokenizer and remote code."""

    card_task = TEXT_TASK
    evaluation_title = "caption retrieval"
    model: LLM2CLIPTextModel
    args: TextTowerConfig

    def __init__(self, model: LLM2CLIPTextModel | None = None, *args: Any, **kwargs: Any) -> None:
        if model is not None:
            # The saved config has the verdict, which the code in a saved folder reads. Of a divided model only the
            # main process may have weights to probe.
            verify_on_main_process(model)
        super().__init__(model, *args, **kwargs)

    def frozen_inputs(self) -> dict[str, str | None]:
        if not self.model.has_adapter:
            return {}
        frozen = [(name, weight) for name, weight in self.model.named_parameters() if not weight.requires_grad]
        return {"frozen weights": sampled_digest(frozen)}

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
        if is_divided(self):
            weights = whole_weights(self)
            if self.args.should_save:
                self._write(*self._undivided_result(undivided(text_model), weights), output_dir)
            return
        if self.args.save_format == "merged":
            text_model.merge_adapter()  # the evaluation that follows measures the merged model
        if self.args.should_save:
            self._write(text_model, None, output_dir)

    def _undivided_result(
        self, text_model: LLM2CLIPTextModel, weights: dict[str, Tensor]
    ) -> tuple[LLM2CLIPTextModel, dict[str, Tensor]]:
        """Return a model to save and its weights, merged unless the adapter is saved, from those of all processes."""
        if not text_model.has_adapter or self.args.save_format == "adapter":
            return text_model, weights
        dtype = cast(Tensor, text_model.get_input_embeddings().weight).dtype
        merged = {name: value.to(dtype) for name, value in merged_weights(text_model, weights)}
        with torch.device("meta"), undivided_building(self.args):
            return LLM2CLIPTextModel(copy.deepcopy(cast(LLM2CLIPTextConfig, text_model.config))), merged

    def _write(self, text_model: LLM2CLIPTextModel, weights: dict[str, Tensor] | None, output_dir: str | Path) -> None:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        save_text_tower(text_model, tokenizer, output_dir, weights)
        if not text_model.has_adapter:
            # Pushed checkpoints have left them here.
            for name in ADAPTER_FILES:
                Path(output_dir, name).unlink(missing_ok=True)
            write_sentence_transformers_files(output_dir)
