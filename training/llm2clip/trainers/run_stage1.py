"""Run stage 1 from its settings: the command `llm2clip stage1`."""

from __future__ import annotations

from typing import Any

from llm2clip.data import PairDataset, PairSource
from llm2clip.trainers.run_folder import stage_command
from llm2clip.trainers.run_text_tower import REQUIRED, add_lora, load_text_tower, prepare
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.stage1_trainer import Stage1Trainer


@stage_command(*REQUIRED)
def run(config: Stage1Config, checkpoint: str | None) -> dict[str, Any]:
    """Train a text tower with stage 1, or resume from the newest checkpoint, and save it in `config.output_dir`.

    Returns:
        The metrics of training, and those of caption retrieval with the prefix `eval_`.
    """
    retrieval = prepare(config)
    dataset = PairDataset([PairSource.from_dict(source) for source in config.sources], seed=config.sampling_seed)
    model, tokenizer = load_text_tower(config)
    add_lora(model, config)
    trainer = Stage1Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(checkpoint)
