"""Checks of the commands that the documentation shows, without running them."""

from __future__ import annotations

import configparser
import importlib
import importlib.util
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llm2clip_training import cli
from llm2clip_training.recipe import find_recipe

ROOT = Path(__file__).parents[1]
PROGRAMS = ("make", "llm2clip", "pip", "python", "torchrun", "accelerate", "jupyter", ".ci/run")
# A recipe that stands for the word RECIPE.
RECIPES = {"mntp": "mntp", "stage1": "stage1_paper", "embed": "embed_paper", "stage2": "stage2_paper"}


def is_command(text: str) -> bool:
    """Whether a line or a code span is a command."""
    program, _, rest = text.strip().partition(" ")
    return program in PROGRAMS and (bool(rest.strip()) or program == ".ci/run")


def known_options() -> set[str]:
    """Every option of every `llm2clip` command."""
    options = {"--resume", "--traceback", "--help"}
    for command in cli.COMMANDS.values():
        config = getattr(importlib.import_module(command.module), command.config)
        for field in fields(config):
            options |= {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
    return options


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise unless a command could run.

    Args:
        line: The command, on one line; a comment may follow.
        monkeypatch: Keeps `llm2clip` commands from doing their job, once their settings are read.

    Raises:
        AssertionError: A target, file, module, extra or option does not exist.
    """
    if line.startswith(("make ", ".ci/run")):
        # What it does follows after some spaces.
        line = re.split(r"\s{2,}", line)[0]
    program, *arguments = shlex.split(line, comments=True)
    _CHECKS[program](arguments, monkeypatch)


def _make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    target, *variables = arguments
    recipe = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe, f"the Makefile has no target {target}"
    for variable in variables:
        name, _, value = variable.partition("=")
        assert f"$({name})" in recipe[1], f"make {target} does not use {name}"
        if "llm2clip quickstart" in recipe[1]:
            _llm2clip(["quickstart", *shlex.split(value)], monkeypatch)


def _llm2clip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = arguments[0]
    assert name in cli.COMMANDS, f"llm2clip has no command {name}"
    if len(arguments) == 1:
        return  # the text speaks of the command
    arguments = [find_recipe(RECIPES[name]).stem if word == "RECIPE" else word for word in arguments]
    read: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(f"{cli.COMMANDS[name].module}.run", lambda config, **options: read.append(config))
        assert cli.main(arguments) == 0, f"llm2clip refuses {shlex.join(arguments)}"
    assert len(read) == 1


def _torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = arguments.index("-m")
    assert arguments[module + 1] == "llm2clip_training.cli"
    assert all(option in ("--nproc_per_node", "--nnodes") for option in arguments[:module:2])
    _llm2clip(arguments[module + 2 :], monkeypatch)


def _accelerate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] == "launch"
    if len(arguments) == 1:
        return  # the text speaks of the command
    assert arguments[1] == "--config_file"
    assert (ROOT / arguments[2]).is_file(), f"there is no {arguments[2]}"
    assert arguments[3:5] == ["-m", "llm2clip_training.cli"]
    _llm2clip(arguments[5:], monkeypatch)


def _pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] == "install"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = re.search(r"\[(.+)\]", arguments[-1])
    assert wanted, f"pip install {arguments[-1]} names no extra of this package"
    for extra in wanted[1].split(","):
        assert extra in setup["options.extras_require"], f"setup.cfg has no extra {extra}"


def _python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"there is no {arguments[0]}"
    source = script.read_text() + (script.parent / "common.py").read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, f"{arguments[0]} has no option {option}"


def _jupyter(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] in ("lab", "notebook")
    assert (ROOT / arguments[1]).is_file(), f"there is no {arguments[1]}"


def _continuous_integration(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not arguments
    assert os.access(ROOT / ".ci/run", os.X_OK)


_CHECKS = {
    "make": _make,
    "llm2clip": _llm2clip,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "pip": _pip,
    "python": _python,
    "jupyter": _jupyter,
    ".ci/run": _continuous_integration,
}
