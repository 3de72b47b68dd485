"""What the command of every stage does with its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.command_line.processes import on_main_process
from llm2clip.files.library_errors import wrap_write_errors
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.model_card import DataRevisions
from llm2clip.trainers.run_context import RunContext


def run_trainer(trainer: StageTrainer, run: RunContext) -> dict[str, Any]:
    """Train, save and evaluate the result, write the card, and push if set; called in all processes.

    Args:
        run: The context of the run, which says where it starts.

    Returns:
        The metrics of training and evaluation.
    """
    folder = str(trainer.args.output_dir)
    trainer.run = run
    if trainer.is_world_process_zero():
        trainer.revisions = DataRevisions(getattr(trainer.args, "eval_sources", {}))
        run.at_end(trainer.revisions.close)
    metrics: dict[str, Any] = trainer.train().metrics
    metrics.pop("total_flos", None)  # transformers estimates it for models of its own, and has 0 for ours.
    # Before the evaluation, so that a failing one loses nothing.
    trainer.accelerator.wait_for_everyone()
    trainer.merge_result()
    with wrap_write_errors(Path(folder)):
        trainer.save_result(folder)
        trainer.accelerator.wait_for_everyone()
        if trainer.retrieval or trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        trainer.save_state()
        # The card waits for the revisions of data, on one process alone.
        on_main_process(trainer.create_model_card)
        trainer.complete_result(folder)
    if trainer.args.push_to_hub:
        trainer.upload(folder, "End of training")
    return metrics
