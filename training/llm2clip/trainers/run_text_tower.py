"""Inputs of stage 1 and MNTP: the text tower with LoRA, and the retrieval sets."""

from __future__ import annotations

import warnings

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm2clip.data import PairSource
from llm2clip.evaluation import CaptionRetrieval
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

PROMPT_SETTINGS = ("prompt_prefix", "prompt_suffix", "pooling", "max_text_length", "bidirectional")


REQUIRED = ("model_name_or_path", "sources")


def prepare(config: TextTowerConfig) -> dict[str, CaptionRetrieval]:
    """Check the settings and set the seed of a run; returns the retrieval sets."""
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    set_seed(config.seed)
    sources = {name: PairSource.from_dict(source) for name, source in config.eval_sources.items()}
    return {name: CaptionRetrieval.from_source(source) for name, source in sources.items()}


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
        **{name: getattr(config, name) for name in PROMPT_SETTINGS},
    )


def add_lora(model: LLM2CLIPTextModel, config: TextTowerConfig) -> None:
    """Add LoRA layers to the decoder, in float32, and freeze the rest, unless `lora_rank` is 0.

    LoRA is on the base model without language-modelling head, so that the adapter also loads on `AutoModel`.

    Raises:
        ValueError: The text model has no layers of these names.
    """
    if config.lora_rank == 0:
        return
    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        revision=config.model_revision,
    )
    with warnings.catch_warnings():
        # peft 0.21 reads is_gradient_checkpointing, which transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            model.decoder = get_peft_model(model.decoder, lora)
        except ValueError as error:
            kind = type(model.decoder).__name__
            raise ValueError(
                f"lora_target_modules {targets} do not fit {config.model_name_or_path} ({kind}): {error} "
                "Set them to [all-linear], or to names of its Linear layers."
            ) from error
    # An adapter does not contain the layers after pooling.
    model.dense.requires_grad_(False)
    # The decoder may differ from the LLM that its config names: the adapter belongs to this model.
    model.decoder.peft_config["default"].base_model_name_or_path = absolute_path(config.model_name_or_path)
