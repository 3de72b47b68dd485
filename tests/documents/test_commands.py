"""Every command in the documents runs, and makes the files that it should make."""

from __future__ import annotations

import configparser
import importlib.util
import itertools
import os
import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from llm2clip import cli
from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.own_data import is_own_data
from llm2clip.quickstart.config import QuickstartConfig
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from tests import node
from tests.documents.reader import Reader, recipe
from tests.documents.reading import DOCUMENTS, ROOT, blocks, code_spans, commands, kind
from tests.documents.table import COMMANDS, DOWNLOADS, NotRun, Run

SHOWN = {line for document in DOCUMENTS for line in commands(document)}
RUN = {line: case for line, case in COMMANDS.items() if isinstance(case, Run)}
NOT_RUN = {line: case for line, case in COMMANDS.items() if isinstance(case, NotRun)}
NOT_RUN |= {line: NotRun("it downloads") for line in sorted(SHOWN) if line.startswith("pip ")}
# Packages of others that a document installs.
OTHER_PACKAGES = {"flash-attn", "img2dataset"}
# Code spans that stand for any option, and options of accelerate and torchrun.
OTHER_OPTIONS = {
    "--field value",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--nnodes",
    "--kill-on-bad-exit=1",  # of srun
}


def uncovered(lines: set[str]) -> list[str]:
    """Commands that no entry of the table covers, and that are no bare name of a command."""
    names = {f"llm2clip {name}" for name in cli.COMMANDS} | {"accelerate launch"}
    return sorted(lines - set(COMMANDS) - set(NOT_RUN) - names)


def marked(cases: dict[str, Run]) -> list[Any]:
    return [pytest.param(line, id=line, marks=pytest.mark.slow if case.slow else ()) for line, case in cases.items()]


def test_every_command_is_in_the_table() -> None:
    assert not uncovered(SHOWN), "tests/documents/table.py does not say how these are run"
    assert uncovered({"llm2clip stage3 RECIPE", "llm2clip mntp"}) == ["llm2clip stage3 RECIPE"]
    assert not set(COMMANDS) - SHOWN, "no document shows these any more"


@pytest.mark.parametrize("line", marked(RUN))
def test_command_runs(line: str, reader: Reader, tmp_path: Path) -> None:
    reader.run(line, RUN[line], tmp_path)


@pytest.mark.parametrize("line", NOT_RUN)
def test_command_that_is_not_run_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        recipe(line)
        in_ci = line in (ROOT / ".ci/run").read_text()
        assert in_ci == (NOT_RUN[line].reason == ".ci/run runs it")
    elif program == ".ci/run":
        assert os.access(ROOT / program, os.X_OK)
    elif program == "npm":
        assert arguments[0] == "install"
        assert arguments[-1] == node.PACKAGE
    elif program == "pip" and arguments[-1] in OTHER_PACKAGES:
        assert arguments[0] == "install"
    elif program in ("hf", "img2dataset"):
        assert NOT_RUN[line].reason == DOWNLOADS
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        (extras,) = re.findall(r"^\.\[(.+)\]$", arguments[-1])
        assert set(extras.split(",")) <= set(setup["options.extras_require"])
    elif program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1])
    elif program == "accelerate":
        load_config_from_file(str(ROOT / arguments[arguments.index("--config_file") + 1]))
    elif program == "llm2clip" and "--benchmark" not in arguments:
        monkeypatch.setattr(import_module(cli.COMMANDS[arguments[0]].module), "run", lambda config: {})
        assert cli.main(arguments) == 0, "its settings are accepted"
    elif program == "llm2clip":
        names = itertools.takewhile(lambda word: word[:2] != "--", arguments[arguments.index("--benchmark") + 1 :])
        assert choose_benchmarks([name for name in names if not is_own_data(name)], ROOT)
    else:
        assert program == "jupyter"
        assert (ROOT / arguments[-1]).is_file()
    if NOT_RUN[line].run_by:
        file, _, name = NOT_RUN[line].run_by.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


@pytest.mark.parametrize(
    ("line", "case", "message"),
    [
        ("llm2clip evaluate runs/stage2", Run(), "exit status 2"),
        ("llm2clip evaluate runs/stage2 --dta x", Run(), "exit status 2"),
        ("python no_such_example.py", Run(), "exit status 1"),
        ("llm2clip stage1 --help", Run(makes=("runs/stage1",)), "runs/stage1: not made"),
        ("llm2clip stage1 --help", Run(prints="stage 3"), "'stage 3' is not printed"),
    ],
)
def test_failing_command_fails_the_test_of_its_document(
    line: str, case: Run, message: str, reader: Reader, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        reader.run(line, case, tmp_path)


def test_unknown_make_target_or_variable_is_an_error() -> None:
    for line in ("make quickstrat", "make lint ARGS=-x"):
        with pytest.raises(AssertionError, match=r"No rule to make target|does not use ARGS=-x"):
            recipe(line)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_in_the_text_exists(document: str) -> None:
    options = {"--resume", "--traceback", "--help", "--help-all", "--version"}
    for command in cli.COMMANDS.values():
        names = [field.name for field in fields(getattr(import_module(command.module), command.config))]
        options |= {f"--{form}" for name in names for form in (name, name.replace("_", "-"), f"no-{name}")}
    spans = [span for span in code_spans(document) if span.startswith("--") and span not in OTHER_OPTIONS]
    assert not [span for span in spans if span.split()[0] not in options]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipes_in_the_text_have_fields_of_stage_2(document: str, tmp_path: Path) -> None:
    for language, content in blocks(document):
        if kind(language, content) == "recipe":
            fields = yaml.safe_load(content)
            if "text_encoders" in fields:  # a profile of the quickstart, which has both parts of stage 2
                (tmp_path / "profile.yaml").write_text(content)
                profile = QuickstartConfig(profile=str(tmp_path / "profile.yaml")).load_profile()
                fields = {"freeze_vision": "all", **profile["stage2"], **profile["frozen"], "feature_dtype": "float32"}
            build_config(Stage2Recipe, {"output_dir": str(tmp_path), "embedding_cache": "cache", **fields})


@pytest.mark.parametrize(("language", "content"), [("", "curl -O x\n"), ("rust", "fn main() {}\n")])
def test_block_of_an_unknown_language_is_an_error(language: str, content: str) -> None:
    with pytest.raises(ValueError, match="neither Python nor known commands"):
        kind(language, content)
