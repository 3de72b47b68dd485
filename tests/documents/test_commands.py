"""Every command of the documents runs on small stand-ins, or its program knows all that it is given."""

from __future__ import annotations

import configparser
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from llm2clip import cli
from llm2clip.command_line.settings import build_config
from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.benchmarks.rows import read_sets
from llm2clip.evaluation.own_data import is_own_data
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.parts import plan_parts
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests import node
from tests.documents.cases import CASES, Case, by_rules, read_marker
from tests.documents.reader import Reader
from tests.documents.reading import DOCUMENTS, ROOT, blocks, kind, parts
from tests.documents.rules import MEANT, RULES
from tests.documents.stand_ins import STAND_INS

RUN = [case for case in CASES.values() if not case.how.not_run]
# What the default tests do not run is at least read by its program.
ONLY_READ = [case for case in CASES.values() if case.how.not_run or case.how.slow]
# The configs of hub_configs, and the commands that train their text towers.
TRAINED = re.findall(
    r"^\| \[([^]]+)\].*`(llm2clip stage1 [^`]+)`", (ROOT / "hub_configs/README.md").read_text(), re.MULTILINE
)
OTHER_PACKAGES = {"flash-attn", "img2dataset"}
# Code spans that stand for any option, and options of accelerate, torchrun and srun.
OTHER_OPTIONS = {
    "--field",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--nnodes",
    "--kill-on-bad-exit=1",
}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.line, marks=[pytest.mark.slow] * c.how.slow) for c in RUN])
def test_command_runs(case: Case, reader: Reader, tmp_path: Path) -> None:
    reader.run(case, tmp_path)


@pytest.mark.parametrize(("name", "line"), TRAINED)
def test_stage_1_gives_the_text_tower_of_the_config(name: str, line: str, reader: Reader, tmp_path: Path) -> None:
    reader.run(CASES[line], tmp_path)
    folders = (tmp_path / "runs/stage1", ROOT / "hub_configs" / name)
    trained, documented = (json.loads((folder / "config.json").read_text()) for folder in folders)
    for key in ("prompt_prefix", "prompt_suffix", "pooling", "max_text_length", "bidirectional"):
        assert trained[key] == documented[key], key


@pytest.mark.parametrize("case", [pytest.param(case, id=case.line) for case in ONLY_READ])
def test_program_accepts_the_command(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(case.command, monkeypatch)
    if case.how.run_by:
        file, _, name = case.how.run_by.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def accept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read its arguments, but do nothing; raises AssertionError if it does not know one of them."""
    program, *arguments = shlex.split(command)
    if program in ("python", "torchrun", "accelerate"):
        if program == "accelerate":
            load_config_from_file(str(ROOT / arguments[arguments.index("--config_file") + 1]))
        if "-m" not in arguments:
            assert (ROOT / arguments[0]).is_file()
            return
        module, *arguments = arguments[arguments.index("-m") + 1 :]
        assert importlib.util.find_spec(module), f"there is no module {module}"
        program = module
    if program == "llm2clip":
        monkeypatch.setattr(import_module(cli.COMMANDS[arguments[0]].module), "run", lambda config, **_: {})
        assert cli.main(arguments) == 0, command
        if "--benchmark" in arguments:
            names = itertools.takewhile(lambda word: word[:2] != "--", arguments[arguments.index("--benchmark") + 1 :])
            assert choose_benchmarks([name for name in names if not is_own_data(name)], ROOT)
    elif program == "make":
        made = recipe(command)
        if made.startswith("llm2clip "):
            accept(made, monkeypatch)
    elif program == ".ci/run":
        assert os.access(ROOT / program, os.X_OK)
    elif program == "npm":
        assert arguments[0] == "install"
        assert arguments[-1] == node.PACKAGE
    elif program == "pip" and arguments[-1] not in OTHER_PACKAGES:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        (extras,) = re.findall(r"^\.\[(.+)\]$", arguments[-1])
        assert set(extras.split(",")) <= set(setup["options.extras_require"])
    elif program == "jupyter":
        assert (ROOT / arguments[-1]).is_file()


def recipe(line: str) -> str:
    """Return the last command of a `make` target, after the set-up of its environment.

    Raises:
        AssertionError: The target does not exist, or does not use one of the variables.
    """
    _, target, *variables = shlex.split(line)
    # If make runs the tests, its MAKEFLAGS and ARGS would change the output of this make.
    hidden = ("MAKE", "MFLAGS", "ARGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = ["make", "-n", target, *variables]
    asked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    last = asked.stdout.splitlines()[-1]
    unused = [variable for variable in variables if variable.partition("=")[2] not in last]
    assert not unused, f"make {target} does not use {', '.join(unused)}"
    return last.removeprefix(".venv/bin/")


def test_rules_and_stand_ins_are_of_commands_that_are_shown() -> None:
    assert [words for words in RULES if not any(re.search(words, line) for line in CASES)] == []
    assert [word for word in MEANT if not any(word in line for line in CASES)] == []
    read = {name for case in CASES.values() for name in case.stand_ins}
    assert set(STAND_INS) - read == set()
    made = {path for case in CASES.values() for path in case.makes}
    assert {need for case in CASES.values() for need in case.how.needs} - made - read == set()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("llm2clip evaluate runs/stage2 --benchmark x --dta x", "exit status 2"),
        ("llm2clip stage3 RECIPE", "exit status 2"),
        ("python no_such_example.py", "exit status 1"),
        ("llm2clip stage1 --help --output-dir runs/x", "runs/x: not made"),
        ("llm2clip convert microsoft/ --help", "'missing: none' is not printed"),
    ],
)
def test_wrong_command_fails_its_test(line: str, message: str, reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        reader.run(Case(line, ("README.md",), by_rules(line)), tmp_path)


@pytest.mark.parametrize("line", ["make quickstrat", "make lint ARGS=-x", "llm2clip serve x --prt 80", "python -m x"])
def test_wrong_command_is_not_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        accept(line, monkeypatch)


def test_wrong_marker_or_unknown_block_is_an_error() -> None:
    for marker in ("test: print=x", "test (embed) slow", "not run"):
        with pytest.raises(ValueError, match="marker"):
            read_marker(marker)
    for language, content in (("", "curl -O x\n"), ("rust", "fn main() {}\n")):
        with pytest.raises(ValueError, match="neither Python nor known commands"):
            kind(language, content)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of all commands."""
    found = {"--resume", "--traceback", "--help", "--help-all", "--version"}
    for command in cli.COMMANDS.values():
        names = [field.name for field in fields(getattr(import_module(command.module), command.config))]
        found |= {f"--{form}" for name in names for form in (name, name.replace("_", "-"), f"no-{name}")}
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_in_the_text_exists(document: str, options: set[str]) -> None:
    spans = [span.split()[0] for part in parts(document) for span in part.code_spans if span.startswith("--")]
    assert set(spans) - options - OTHER_OPTIONS == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipes_in_the_text_have_fields_of_their_command(document: str, tmp_path: Path) -> None:
    for language, content in blocks(document):
        if language == "yaml":
            fields = yaml.safe_load(content)
            if "museum" in fields:  # a file of benchmarks
                assert list(read_sets(content, document)) == ["museum"]
                continue
            fields = {"output_dir": str(tmp_path), "embedding_cache": "cache", **fields}
            if content.startswith("# llm2clip align"):
                build_config(AlignRecipe, fields)
            else:
                plan_parts(build_config(Stage2Recipe, fields))
