"""What stage 1 and its optional pre-stage share: an LLM as text tower, trained with LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2clip.data import PairSource
from llm2clip.evaluation import CaptionRetrieval
from llm2clip.hub.cards import TEXT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.trainers.base import ADAPTER_FILES, StageConfig, StageTrainer
from llm2clip.utils.towers import open_text_tower, save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class TextTowerConfig(StageConfig):
    """Settings of the stages that train an LLM with LoRA.

    Besides those of [`StageConfig`], this default differs from `TrainingArguments`:
    `ddp_find_unused_parameters=False`.
    """

    model_name_or_path: str = field(default="", metadata={"help": "The LLM: Hub id or folder; or a text tower."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the LLM's repo."})
    dtype: str = field(default="float32", metadata={"help": "dtype in which the LLM is loaded."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    prompt_prefix: str | None = field(
        default=None, metadata={"help": "Text before every caption, after BOS; context that is not pooled."}
    )
    prompt_suffix: str | None = field(default=None, metadata={"help": "Text after every caption; it is pooled."})
    pooling: str | None = field(
        default=None, metadata={"help": "mean, weighted_mean, last_token, eos_token or bos_token; unset: mean."}
    )
    max_text_length: int | None = field(
        default=None, metadata={"help": "Longest caption in tokens, prompt included; unset: 512."}
    )
    bidirectional: bool | None = field(
        default=None, metadata={"help": "Attend in both directions; unset: true. false is for ablations."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains every weight of the LLM."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's layers."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Names of the Linear layers that get LoRA."}
    )
    eval_sources: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Pairs for caption retrieval while training: PairSource by name."}
    )
    save_format: str = field(
        default="merged", metadata={"help": "What the run leaves: merged (a whole model) or adapter (PEFT)."}
    )
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_format not in ("merged", "adapter"):
            raise ValueError(f"save_format {self.save_format!r} is unknown; choose merged or adapter.")
        if self.save_format == "adapter" and self.lora_rank == 0:
            raise ValueError("save_format adapter needs LoRA, but lora_rank is 0.")


class TextTowerTrainer(StageTrainer):
    """Trains an [`LLM2CLIPTextModel`], evaluates caption retrieval, saves with tokenizer and remote code."""

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
            save_format: `merged` merges LoRA into the weights first, also in the trainer's model; `adapter` saves
                LoRA alone.
        """
        self.accelerator.wait_for_everyone()
        text_model = self.accelerator.unwrap_model(self.model)
        if save_format == "merged":
            text_model.merge_adapter()
        if self.args.should_save:
            save_text_tower(text_model, cast(PreTrainedTokenizerBase, self.processing_class), output_dir)
            if not text_model.has_adapter:
                # A push in mid-training has left them here.
                for name in ADAPTER_FILES:
                    Path(output_dir, name).unlink(missing_ok=True)
                write_sentence_transformers_files(output_dir)
        self.accelerator.wait_for_everyone()


def load_text_tower(
    config: TextTowerConfig, decoder: PreTrainedModel | None = None
) -> tuple[LLM2CLIPTextModel, PreTrainedTokenizerBase]:
    """The LLM of a run as text tower, with its tokenizer; see [`open_text_tower`]."""
    return open_text_tower(
        config.model_name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.model_revision,
        decoder=decoder,
        prompt_prefix=config.prompt_prefix,
        prompt_suffix=config.prompt_suffix,
        pooling=config.pooling,
        max_text_length=config.max_text_length,
        bidirectional=config.bidirectional,
    )


def add_lora(model: LLM2CLIPTextModel, config: TextTowerConfig) -> None:
    """Give the decoder LoRA layers, in float32, and freeze the rest; nothing happens when `lora_rank` is 0.

    LoRA sits on the base model, without a language-modelling head, so that the adapter loads over `AutoModel` too.
    """
    if config.lora_rank == 0:
        return
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules[0]
        if config.lora_target_modules == ["all-linear"]
        else config.lora_target_modules,
        revision=config.model_revision,
    )
    model.decoder = get_peft_model(model.decoder, lora)
    # The decoder may have changed since it left the LLM that its config names: the adapter belongs to this model.
    model.decoder.peft_config["default"].base_model_name_or_path = absolute_path(config.model_name_or_path)


def retrieval_sets(config: TextTowerConfig) -> dict[str, CaptionRetrieval]:
    """The caption retrieval sets of the settings' `eval_sources`."""
    return {
        name: CaptionRetrieval.from_source(PairSource.from_dict(source))
        for name, source in config.eval_sources.items()
    }
