"""Inputs of stage 1 and MNTP: the text tower and the retrieval sets."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm2clip.data import PairSource
from llm2clip.evaluation.data import CaptionPairData
from llm2clip.models.towers import open_text_tower
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.stage1_config import Stage1Recipe
from modeling_llm2clip import LLM2CLIPTextModel

PROMPT_SETTINGS = ("prompt_prefix", "prompt_suffix", "pooling", "max_text_length", "bidirectional")
REQUIRED_SETTINGS = ("model_name_or_path", "sources")


def prepare(config: Stage1Recipe | MNTPRecipe) -> dict[str, CaptionPairData]:
    """Check the settings and set the seed of a run; returns the retrieval sets."""
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    set_seed(config.seed)
    sources = {name: PairSource.from_dict(source) for name, source in config.eval_sources.items()}
    return {name: CaptionPairData.from_source(source) for name, source in sources.items()}


def load_text_tower(
    config: Stage1Recipe | MNTPRecipe, decoder: PreTrainedModel | None = None
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
