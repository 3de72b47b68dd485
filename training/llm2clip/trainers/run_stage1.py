"""Run stage 1 from its settings: the command `llm2clip stage1`."""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from llm2clip.data import PairCollator, PairDataset, PairSource
from llm2clip.trainers.checkpoints import resume_point
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.run_text_tower import add_lora, load_text_tower, retrieval_sets
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.utils.settings import require


def run(config: Stage1Config, resume: bool = False) -> dict[str, Any]:
    """Train a text tower with stage 1 and save it in `config.output_dir`.

    Args:
        config: The settings.
        resume: Resume from the newest checkpoint.

    Returns:
        The metrics of training, and those of caption retrieval with the prefix `eval_`.
    """
    require(config, ["model_name_or_path", "sources"])
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    checkpoint = resume_point(config, resume)
    set_seed(config.seed)
    dataset = PairDataset([PairSource.from_dict(source) for source in config.sources], seed=config.sampling_seed)
    retrieval = retrieval_sets(config)
    model, tokenizer = load_text_tower(config)
    add_lora(model, config)
    trainer = Stage1Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=PairCollator(tokenizer, model.config.num_prefix_tokens),
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(checkpoint, lambda: trainer.save_result(config.output_dir, config.save_format))
