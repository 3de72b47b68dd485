"""Run masked next token prediction from its settings: the command `llm2clip mntp`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.trainers.checkpoints import resume_point
from llm2clip.trainers.mntp_config import MNTPConfig
from llm2clip.trainers.mntp_data import MaskCollator, TokenBlocks
from llm2clip.trainers.mntp_trainer import MNTPTrainer
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.run_text_tower import add_lora, load_text_tower, retrieval_sets
from llm2clip.utils.settings import require
from llm2clip.utils.towers import is_text_tower, loading_options


def _load_language_model(config: MNTPConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, revision = config.model_name_or_path, config.model_revision
    if is_text_tower(name, revision):
        raise ValueError(
            f"{name} is a text tower, without the language-modelling head that this stage needs; give the LLM instead."
        )
    options = loading_options(config.dtype, config.attn_implementation, revision)
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    return model, AutoTokenizer.from_pretrained(name, revision=revision)


def _frozen_head(language_model: PreTrainedModel) -> nn.Module:
    head: Any = language_model.get_output_embeddings()
    embedding: Any = language_model.get_input_embeddings()
    if head.weight is not embedding.weight:  # a tied head is the embedding, which may be trained
        head.requires_grad_(False)
    return head


def run(config: MNTPConfig, resume: bool = False) -> dict[str, Any]:
    """Train a text tower with masked next token prediction and save it in `config.output_dir`.

    Args:
        config: The settings.
        resume: Resume from the newest checkpoint.

    Returns:
        The metrics of the run.
    """
    require(config, ["model_name_or_path", "sources"])
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    checkpoint = resume_point(config, resume)
    set_seed(config.seed)
    retrieval = retrieval_sets(config)
    language_model: Any
    language_model, plain_tokenizer = _load_language_model(config)
    texts = distinct_captions([CaptionSource.from_dict(source) for source in config.sources])
    dataset = TokenBlocks(texts, plain_tokenizer, config.block_size)
    model, tokenizer = load_text_tower(config, decoder=language_model.base_model)
    add_lora(model, config)
    trainer = MNTPTrainer(
        head=_frozen_head(language_model),
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=MaskCollator(plain_tokenizer, config),
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(checkpoint, lambda: trainer.save_result(config.output_dir, config.save_format))
