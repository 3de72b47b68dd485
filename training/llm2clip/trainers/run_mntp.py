"""Run masked next token prediction from its settings: the command `llm2clip mntp`."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from llm2clip.data import CaptionSource
from llm2clip.data.sources import OF_TRAINING
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.mntp_data import MaskCollator, TokenBlocks, source_tokens
from llm2clip.trainers.mntp_trainer import MNTPTrainer
from llm2clip.trainers.run_context import RunContext, stage_command
from llm2clip.trainers.run_text_tower import REQUIRED, load_text_tower, prepare
from llm2clip.utils.repos import OUR_MODELS, RepoKind, inspect_repo
from llm2clip.utils.towers import loading_options
from modeling_llm2clip.modeling_llm2clip_decoder import is_encoder


@stage_command(*REQUIRED)
def run(config: MNTPRecipe, context: RunContext) -> dict[str, Any]:
    """Train a text tower with masked next token prediction, or resume, and save it in `config.output_dir`.

    Returns:
        The metrics of the run.
    """
    retrieval = prepare(config)
    name, revision = config.model_name_or_path, config.model_revision
    repo = inspect_repo(name, revision)
    if repo.kind is RepoKind.EMBEDDING_MODEL:
        raise ValueError(f"{name} is an {repo.kind.value}, which is trained already; this stage needs a plain LLM.")
    if repo.kind in OUR_MODELS:
        raise ValueError(
            f"{name} is a text tower, without the language-modelling head that this stage needs; give the LLM instead."
        )
    options = loading_options(config.dtype, config.attn_implementation, revision)
    language_model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    if is_encoder(language_model.config):
        raise ValueError(f"{name} is an encoder ({language_model.config.model_type}); this stage is for decoders.")
    plain_tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    sources = [CaptionSource.from_dict(source).without(OF_TRAINING) for source in config.sources]
    tokens = source_tokens(sources, plain_tokenizer)
    dataset = TokenBlocks(tokens, config.block_size)
    model, tokenizer = load_text_tower(config, decoder=language_model.base_model)
    head = language_model.get_output_embeddings()
    if head.weight is not language_model.get_input_embeddings().weight:
        head.requires_grad_(False)  # a tied head is the embedding, which may be trained
    trainer = MNTPTrainer(
        head=head,
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=MaskCollator(plain_tokenizer, config),
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(context)
