"""The command line: help, errors, start-up, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from llm2clip import cli
from llm2clip.command_line.stopping import StoppedError
from llm2clip.files.library_errors import PEER_ENDED
from llm2clip.files.manifests import write_manifest
from llm2clip.trainers.checkpoints import COMMAND as TRAINING
from tests.builders import small_runs

Capsys = pytest.CaptureFixture[str]
Ending = Callable[[str, Any], None]
EVALUATE = ["evaluate", "x", "--benchmark", "y.csv"]


def _raised_during(stop: BaseException, error: BaseException) -> BaseException:
    error.__context__ = stop
    return error


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Ending:
    """Makes a command do nothing but raise an error or return a result."""

    def ending(command: str, end: BaseException | dict[str, Any]) -> None:
        def run(config: object, **options: Any) -> dict[str, Any]:
            if isinstance(end, dict):
                return end
            raise end

        monkeypatch.setattr(f"{cli.COMMANDS[command].module}.run", run)

    return ending


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_every_field_once(command: str, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([command, "--help-all"]) == 0
    text = capsys.readouterr().out
    settings = getattr(import_module(cli.COMMANDS[command].module), cli.COMMANDS[command].config)
    shown = re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)
    names = {field.name for field in fields(settings) if field.init} - set(cli.COMMANDS[command].positional)
    switches = ["resume"] * cli.COMMANDS[command].resumes + ["traceback", "help"]
    assert sorted(shown) == sorted([*(name.replace("_", "-") for name in names), *switches])
    assert max(map(len, text.splitlines())) < 120


def test_a_help_may_be_read_in_part() -> None:
    code = "import sys; from llm2clip import cli; sys.stdin.read(); sys.exit(cli.main(['--help']))"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        process.stdout.close()
        process.stdin.close()
        assert "roken" not in process.stderr.read()
    assert process.returncode == 0


def test_version_and_top_level_help_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from llm2clip import cli; assert not cli.main(['--help']) and not cli.main(['--version'])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    own, torch, transformers = map(version, ("llm2clip", "torch", "transformers"))
    assert f"llm2clip {own} (torch {torch}, transformers {transformers}, Python " in shown.splitlines()[-1]


@pytest.mark.parametrize("rank", ["0", "3"])
def test_errors_of_a_run_are_in_its_log(
    rank: str, ending: Ending, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["stage1", "--output_dir", str(tmp_path)]
    monkeypatch.setenv("RANK", rank)
    ending("stage1", OSError("the disk has gone"))
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert f"llm2clip stage1: error: the disk has gone\n(where: {tmp_path / 'log.txt'})" in error
    assert "Traceback" not in error
    ending("stage1", RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        cli.main(command)
    text = (tmp_path / "log.txt").read_text()
    assert "in run\n    raise end\nOSError: the disk has gone" in text
    assert "RuntimeError: a bug" in text
    assert text.count("llm2clip stage1 failed (process id ") == 2
    assert ("Log: " in text) == (rank == "0")


def test_top_level_help_lists_the_commands(capsys: Capsys) -> None:
    assert cli.main(["--help"]) == 0
    assert set(cli.COMMANDS) <= set(capsys.readouterr().out.split())
    assert cli.main([]) == 2
    assert cli.main(["stge1", "recipe"]) == 2
    assert "there is no command 'stge1'; did you mean 'stage1'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1", "--lora_rnk", "4"], "there is no option --lora_rnk; did you mean '--lora-rank'?"),
        (["stage1", "no_such_recipe"], "no_such_recipe"),
        (["stage2", "--max_steps", "many"], "the command line: max_steps is 'many'"),
        (["stage2", "--max_steps"], "argument --max-steps: expected one argument"),
        (
            ["evaluate", "x", "--task", "guessing", "--benchmark", "y"],
            "task is 'guessing'",
        ),
        (["evaluate", "/no/such/folder", "--benchmark", small_runs.CONCEPTS], "/no/such/folder"),
        (["embed"], "EmbedConfig needs output_dir, text_model_name_or_path, sources"),
        (["convert", "a", "b", "two words"], "'two words'"),
    ],
)
def test_a_user_error_is_one_line_without_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    with pytest.raises((ValueError, OSError)):
        cli.main([*arguments, "--traceback"])


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("learning_rat: 1", [], "{file} (line 2) has no field 'learning_rat'; did you mean 'learning_rate'?"),
        ("max_steps: many", ["--max-steps", "all"], "the command line: max_steps is 'all'"),
        (
            "feature_cache: x",
            ["--feature-views", "2"],
            ". feature_cache is set by {file} (line 2), feature_views is set by the command line.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["stage2", "plan"])
def test_an_error_of_a_setting_says_where_it_is_set(
    command: str, recipe: str, options: list[str], message: str, tmp_path: Path, capsys: Capsys
) -> None:
    file = tmp_path / "stage2.yaml"
    file.write_text(f"output_dir: {tmp_path / 'run'}\n{recipe}\n")
    assert cli.main([command, str(file), *options]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_a_command_leaves_the_process_group_of_its_launcher(ending: Ending, tmp_path: Path, capsys: Capsys) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    ending("evaluate", {"recall": 0.5})
    assert cli.main(EVALUATE) == 0
    assert capsys.readouterr().out == "recall: 0.5000\n"
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "processes", "status", "cause"),
    [
        (KeyboardInterrupt(), "1", 130, "Ctrl-C"),
        # It may come from a launcher, after the end of another process.
        (StoppedError(), "2", 143, f"SIGTERM (unless you have sent it, {PEER_ENDED})"),
        (
            _raised_during(KeyboardInterrupt(), RuntimeError("DataLoader worker is killed by signal")),
            "1",
            130,
            "Ctrl-C",
        ),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C that has also ended a worker"],
)
def test_a_command_that_is_stopped_says_how_to_go_on(
    error: BaseException,
    processes: str,
    status: int,
    cause: str,
    ending: Ending,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    ending("index", error)
    assert cli.main(["index", "pictures", "--model", "m"]) == status
    expected = f"llm2clip index: stopped by {cause}; the same command continues where it was.\n"
    assert capsys.readouterr().err == expected


def test_a_stopped_stage_names_the_newest_checkpoint_of_its_parts(
    ending: Ending, tmp_path: Path, capsys: Capsys
) -> None:
    ending("stage2", KeyboardInterrupt())
    command = ["stage2", "--output-dir", str(tmp_path)]
    assert cli.main(command) == 130
    assert "no checkpoint yet" in capsys.readouterr().err
    for name in ("part2", "part10"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
        write_manifest(tmp_path / name / "checkpoint-5", TRAINING)
    assert cli.main(command) == 130
    assert f"--resume to go on from {tmp_path / 'part10' / 'checkpoint-5'}" in capsys.readouterr().err


def test_sigterm_ends_a_command_in_order(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    ended = []

    def killed(config: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            ended.append(True)

    monkeypatch.setattr("llm2clip.evaluation.evaluate.run", killed)
    assert cli.main(EVALUATE) == 143
    assert ended
    assert capsys.readouterr().err == "llm2clip evaluate: stopped by SIGTERM; the same command starts it again.\n"


def test_sigterm_within_the_report_of_an_error_does_not_replace_it(
    ending: Ending, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """torchrun sends it to the rank at fault too, if one that has only lost the connection to it has ended first."""
    monkeypatch.setattr(cli, "close_bars", lambda: os.kill(os.getpid(), signal.SIGTERM))
    ending("evaluate", ValueError("the image 7 is damaged."))
    assert cli.main(EVALUATE) == 2
    assert "llm2clip evaluate: error: the image 7 is damaged." in capsys.readouterr().err
