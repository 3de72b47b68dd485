"""Inputs of stage 1 and MNTP: the text tower with LoRA, and the retrieval sets."""

from __future__ import annotations

import warnings

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2clip.data import PairSource
from llm2clip.evaluation import CaptionRetrieval
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path


def load_text_tower(
    config: TextTowerConfig, decoder: PreTrainedModel | None = None
) -> tuple[LLM2CLIPTextModel, PreTrainedTokenizerBase]:
    """Load the LLM of a run as a text tower with its tokenizer; see [`open_text_tower`]."""
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
    """Add LoRA layers to the decoder, in float32, and freeze the rest, unless `lora_rank` is 0.

    LoRA is on the base model without language-modelling head, so that the adapter also loads on `AutoModel`.
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
    with warnings.catch_warnings():
        # peft 0.21 reads is_gradient_checkpointing, which transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model.decoder = get_peft_model(model.decoder, lora)
    # The decoder may differ from the LLM that its config names: the adapter belongs to this model.
    model.decoder.peft_config["default"].base_model_name_or_path = absolute_path(config.model_name_or_path)


def retrieval_sets(config: TextTowerConfig) -> dict[str, CaptionRetrieval]:
    """Load the caption retrieval sets of `eval_sources`."""
    return {
        name: CaptionRetrieval.from_source(PairSource.from_dict(source))
        for name, source in config.eval_sources.items()
    }
