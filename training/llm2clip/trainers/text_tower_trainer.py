"""Trainer of the stages that train an LLM as a text tower, with LoRA or without."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm2clip.encoders import OurEncoder
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.evaluation.protocols.caption_retrieval import caption_pair_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.cards.facts import TEXT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.trainers.base_config import defaults_of
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.sharding import is_divided, undivided, undivided_building, whole_weights
from llm2clip.trainers.step_guard import require_finite
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.attention_probe import verify_on_main_process
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.identity_llm2clip import merged_weights

# Values of each weight in a digest.
SAMPLED = 64
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class TextTowerTrainer(StageTrainer):
    """Trains an [`LLM2CLIPTextModel`] and saves it with its tokenizer and remote code."""

    card_task = TEXT_TASK
    evaluation_title = "caption retrieval"
    model: LLM2CLIPTextModel
    args: TextTowerConfig

    def prepare_model(self, model: nn.Module) -> None:
        is_ours = isinstance(model, LLM2CLIPTextModel)
        has_layers = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if not is_ours or (has_layers and not model.has_adapter):
            raise ValueError(
                f"model is a {type(model).__name__}{' with an adapter' if has_layers else ''}; this stage trains an "
                "LLM2CLIPTextModel, and an adapter of your own has to be on its decoder: "
                "model.decoder = get_peft_model(model.decoder, ...)."
            )
        text_model = cast(LLM2CLIPTextModel, model)
        if text_model.has_adapter:
            self._refuse_other_adapter(text_model)
        else:
            add_lora(text_model, self.args)
        # The saved config has the result of the probe, which the code in a saved folder reads. Of a divided model only
        # the main process may have weights to probe.
        verify_on_main_process(text_model)

    def _refuse_other_adapter(self, text_model: LLM2CLIPTextModel) -> None:
        """Refuse settings of LoRA that differ from the adapter of the given model."""
        adapter = text_model.decoder.peft_config[text_model.decoder.active_adapter]
        has = {"lora_rank": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
        targets = adapter.target_modules
        has["lora_target_modules"] = [targets] if isinstance(targets, str) else sorted(targets)
        defaults = defaults_of(self.args)
        for name, value in has.items():
            given = getattr(self.args, name)
            given = sorted(given) if isinstance(given, list) and given != defaults[name] else given
            if given not in (defaults[name], value):
                raise ValueError(f"{name} is {given}, but the model has an adapter with {value}; leave it unset.")

    def frozen_inputs(self) -> dict[str, str | None]:
        inputs: dict[str, str | None] = {}
        backend = getattr(self.processing_class, "backend_tokenizer", None)
        if backend is not None:
            inputs["tokenizer"] = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]
        if self.model.has_adapter:
            frozen = [(name, weight) for name, weight in self.model.named_parameters() if not weight.requires_grad]
            inputs["frozen weights"] = sampled_digest(frozen)
        return inputs

    def measure(self, model: LLM2CLIPTextModel, retrieval: CaptionPairData) -> dict[str, float | int]:
        batch_size = self.args.per_device_eval_batch_size
        session = Session(OurEncoder(model, self.processing_class), batch_size=batch_size, show_progress_bar=False)
        return caption_pair_metrics(session, retrieval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        text_model = self.accelerator.unwrap_model(model or self.model)
        if text_model.has_adapter:
            decoder = text_model.decoder
            decoder.load_adapter(resume_from_checkpoint, decoder.active_adapter, is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_result(self, output_dir: str | Path) -> None:
        """Save the text tower, merged with its adapter unless `save_format` is `adapter`; it trains on as it is."""
        text_model = self.unwrapped()
        divided = is_divided(self.accelerator)
        weights = whole_weights(self.accelerator, self.model_wrapped) if divided else text_model.state_dict()
        require_finite(weights, self.state.global_step, divided)
        if not self.args.should_save:
            return
        model, is_adapter = undivided(text_model), self.args.save_format == "adapter"
        if not text_model.has_adapter or is_adapter:
            self._write(model, weights if divided else None, output_dir)
            return
        dtype = cast(Tensor, text_model.get_input_embeddings().weight).dtype
        merged = {name: value.to(dtype) for name, value in merged_weights(model, weights)}
        with torch.device("meta"), undivided_building(self.args):
            whole = LLM2CLIPTextModel(copy.deepcopy(cast(LLM2CLIPTextConfig, text_model.config)))
        self._write(whole, merged, output_dir)

    def merge_result(self) -> None:
        if self.args.save_format == "merged" and not is_divided(self.accelerator):
            self.unwrapped().merge_adapter()

    def _write(self, text_model: LLM2CLIPTextModel, weights: dict[str, Tensor] | None, output_dir: str | Path) -> None:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        if tokenizer is None:
            text_model.save_pretrained(output_dir, state_dict=weights)
        else:
            save_text_tower(text_model, tokenizer, output_dir, weights)
        if not text_model.has_adapter:
            # Pushed checkpoints have left them here.
            for name in ADAPTER_FILES:
                Path(output_dir, name).unlink(missing_ok=True)
            write_sentence_transformers_files(output_dir)


def sampled_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash some values of each of the named weights: another training run changes every one of them."""
    digest = hashlib.sha256()
    for name, weight in weights:
        values = weight.detach().flatten()
        # In whole numbers: float32 has no place for the last of 28 million values.
        count = min(SAMPLED, len(values))
        positions = torch.arange(count, device=values.device) * (len(values) - 1) // max(1, count - 1)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values[positions].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
