"""A recipe in parts: runs one after another, of which each continues with the model of the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers.trainer import TRAINER_STATE_NAME

from llm2clip.command_line.processes import on_main_process
from llm2clip.command_line.settings import build_config, change_config, defaults_of, refuse
from llm2clip.files.atomic import read_json
from llm2clip.trainers import run_align
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.checkpoints import is_whole
from llm2clip.trainers.joint_recipe import TOWERS
from llm2clip.trainers.model_card import continued
from llm2clip.trainers.run_context import RunContext, compare_finished
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Recipe

logger = logging.getLogger(__name__)

Part = AlignRecipe | Stage2Recipe
# Trains one part in the context of its run, after the log of the parts before.
Train = Callable[[Stage2Recipe, RunContext, list[dict[str, Any]]], dict[str, Any]]


def plan_parts(config: Stage2Recipe, chained: bool = True) -> list[Part]:
    """Make the settings of each part: its own, beside those of the recipe; of a recipe without parts, itself.

    Args:
        chained: Each continues with the model of the part before; otherwise all name the towers of the recipe.

    Raises:
        ValueError: A part has a setting that its command does not have, or a value that does not fit.
    """
    if not config.parts:
        return [config]
    commands = [part.get("command", "stage2") for part in config.parts]
    if unknown := [command for command in commands if command not in ("align", "stage2")]:
        raise ValueError(f"a part has command: {unknown[0]}, but it can be align or stage2.")
    if commands[-1] != "stage2":
        raise ValueError("the last part has to be one that trains; for an alignment alone there is `llm2clip align`.")
    aligned = {field.name for field in fields(AlignRecipe)}
    if commands[0] == "align":
        names = ["model_name_or_path", *(name for name in NEW_MODEL_FIELDS if name not in aligned)]
        refuse(config, names, "the first part aligns two towers, and makes the model")
    # A part that continues takes the model as it is.
    without = {name: value for name, value in defaults_of(config).items() if name in (*TOWERS, *NEW_MODEL_FIELDS)}
    planned: list[Part] = []
    for number, (given, command) in enumerate(zip(config.parts, commands, strict=True), start=1):
        own, origin = {name: value for name, value in given.items() if name != "command"}, f"part {number}"
        if fixed := [name for name in ("parts", "output_dir", "model_name_or_path") if name in own and planned]:
            raise ValueError(f"{origin} has {fixed[0]}, which follows from the recipe; leave it out.")
        if number < len(config.parts):
            own |= {"output_dir": str(Path(config.output_dir) / f"part{number}")}
        if command == "align":
            if planned:
                raise ValueError(f"{origin} aligns two towers, so that no part can come before it.")
            shared = {name: value for name, value in _given(config).items() if name in aligned}
            planned.append(build_config(AlignRecipe, {**shared, **own}, origin))
            continue
        before = {**without, "model_name_or_path": planned[-1].output_dir} if planned and chained else {}
        last = {} if number == len(config.parts) else {"push_to_hub": False}
        planned.append(change_config(config, {**before, **own, **last, "parts": []}, origin))
    return planned


def _given(config: Stage2Recipe) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    defaults = defaults_of(config)
    return {name: getattr(config, name) for name in defaults if getattr(config, name) != defaults[name]}


def run_parts(config: Stage2Recipe, train: Train, resume: bool) -> dict[str, Any]:
    """Run the parts of a recipe, after checking the settings of all; with `resume`, what is finished is not run again.

    Returns:
        The metrics of the last part.
    """
    planned = plan_parts(config)
    history: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    for number, part in enumerate(planned, start=1):
        folder, is_last = Path(part.output_dir), number == len(planned)
        if len(planned) > 1:
            logger.info("Part %d of %d: %s.", number, len(planned), folder)
        if resume and not is_last and on_main_process(partial(is_whole, folder)):
            compare_finished(part, folder)
            logger.info("It is finished.")
        else:
            if len(planned) > 1:
                # A part may have a precision of its own, which accelerate keeps for the whole process.
                AcceleratorState._reset_state()
            metrics = _run_part(part, train, resume, history)
        if not is_last and (state := folder / TRAINER_STATE_NAME).is_file():
            history = continued(history, read_json(state)["log_history"])
    return metrics


def _run_part(part: Part, train: Train, resume: bool, history: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(part, AlignRecipe):
        return run_align.run(part)
    with RunContext(part, part.resume_from_checkpoint or resume, is_command=True) as context:
        return train(part, context, history)
