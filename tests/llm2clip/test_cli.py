"""The command line: help, errors, start-up, the evaluate command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import distributed as dist

from llm2clip import cli
from llm2clip.data.table_identity import data_revision
from llm2clip.evaluation import evaluate as job
from llm2clip.utils.logs import LogFile
from llm2clip.utils.stopping import StoppedError
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip import tiny
from tests.modeling_llm2clip import tiny as tiny_models


def failing_stage1(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a stage 1 that fails with an error hours into the run."""

    def train(config: object, resume: bool) -> None:
        raise error

    monkeypatch.setattr("llm2clip.trainers.run_stage1.run", train)
    return ["stage1", "--output_dir", str(folder)]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_every_field_once(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([command, "--help-all"]) == 0
    text = capsys.readouterr().out
    settings = getattr(import_module(cli.COMMANDS[command].module), cli.COMMANDS[command].config)
    shown = re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)
    names = {field.name for field in fields(settings) if field.init} - set(cli.COMMANDS[command].positional)
    switches = ["resume"] * cli.COMMANDS[command].resumes + ["traceback", "help"]
    assert sorted(shown) == sorted([*(name.replace("_", "-") for name in names), *switches])
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize("command", ["mntp", "stage1", "stage2"])
def test_help_of_a_stage_fits_a_reader(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 150
    assert f"`llm2clip {command} --help-all`" in lines[-1]
    assert lines.index("most used:") < lines.index("from transformers' Trainer:")


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]])
def test_a_help_may_be_read_in_part(arguments: list[str]) -> None:
    code = f"import sys; from llm2clip import cli; sys.stdin.read(); sys.exit(cli.main({arguments}))"
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


def test_a_run_writes_its_log_into_output_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--output_dir", str(tmp_path / "run"), "--text_model_name_or_path", str(tmp_path / "missing")]
    assert cli.main(["embed", *fields, "--sources", "[{path: x, caption_columns: [caption]}]"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"llm2clip embed: {cli.COMMANDS['embed'].help}"
    assert shown[1] == f"Log: {tmp_path / 'run' / 'log.txt'}"
    assert len(shown) == 4
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_error_of_a_run_leaves_its_traceback_in_output_dir(
    rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert cli.main(failing_stage1(OSError("the disk has gone"), tmp_path, monkeypatch)) == 2
    error = capsys.readouterr().err
    assert f"llm2clip stage1: error: the disk has gone\n(where: {tmp_path / 'error.log'})" in error
    assert "Traceback" not in error
    with pytest.raises(RuntimeError):
        cli.main(failing_stage1(RuntimeError("out of memory"), tmp_path, monkeypatch))
    text = (tmp_path / "error.log").read_text()
    assert text.count("Traceback (most recent call last)") == 2
    assert text.count(f"llm2clip stage1 (process {rank}, id ") == 2
    assert "in train\n    raise error\nOSError: the disk has gone" in text
    assert "RuntimeError: out of memory" in text


def test_a_success_removes_the_errors_of_earlier_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = failing_stage1(OSError("the disk has gone"), tmp_path, monkeypatch)
    assert cli.main(arguments) == 2
    assert (tmp_path / "error.log").exists()
    monkeypatch.setattr("llm2clip.trainers.run_stage1.run", lambda config, resume: {"train_loss": 1.0})
    assert cli.main(arguments) == 0
    assert not (tmp_path / "error.log").exists()
    assert "the disk has gone" in (tmp_path / "log.txt").read_text()


def test_an_error_log_that_cannot_be_written_hides_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "error.log").mkdir()
    assert cli.main(failing_stage1(OSError("no space left"), tmp_path, monkeypatch)) == 2
    assert "llm2clip stage1: error: no space left\n(--traceback shows where)" in capsys.readouterr().err


def test_top_level_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out.split()
    assert all(name in shown for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["stge1", "recipe"]) == 2
    assert "there is no command 'stge1'; did you mean 'stage1'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1", "--lora_rnk", "4"], "there is no option --lora_rnk; did you mean --lora-rank?"),
        (["stage2", "--lr", "1"], "there is no option --lr; did you mean --learning-rate?"),
        (["stage1", "no_such_recipe"], "the recipe no_such_recipe does not exist"),
        (["stage2", "--embedding_cache", "x", "--max_steps", "many"], "the command line: max_steps is 'many'"),
        (["stage2", "--max_steps"], "argument --max-steps: expected one argument"),
        (["evaluate", "x", "--task", "guessing", "--data", "y"], "one of retrieval, caption_retrieval"),
        (["evaluate", "x"], "evaluate needs data"),
        (["evaluate", "x", "--data", "y", "--on_error", "ignore"], "one of raise, skip"),
        (
            ["evaluate", "/no/such/folder", "--data", "y"],
            "there is no such folder, and it is not a valid Hub id",
        ),
        (["embed"], "EmbedConfig needs output_dir, text_model_name_or_path, sources"),
        (["convert", "a", "b", "two words"], "the argument 'two words' is one too many"),
        (["quickstart", "--profile", "fast"], "the recipe fast does not exist"),
    ],
)
def test_a_user_error_is_one_line_without_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
        ("lr: 1", [], "{file} (line 2) has no field 'lr'; did you mean 'learning_rate'?"),
        ("max_steps: many", [], "{file} (line 2): max_steps is 'many'"),
        ("max_steps: many", ["--max-steps", "all"], "the command line: max_steps is 'all'"),
        (
            "feature_views: 0",
            [],
            "feature_views must be at least 1, but is 0. feature_views is set by {file} (line 2).",
        ),
        (
            "feature_cache: x",
            ["--feature-views", "2"],
            ". feature_cache is set by {file} (line 2), feature_views is set by the command line.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["stage2", "plan"])
def test_an_error_of_a_setting_says_where_it_is_set(
    command: str, recipe: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stage2.yaml"
    file.write_text(f"output_dir: {tmp_path / 'run'}\n{recipe}\n")
    assert cli.main([command, str(file), *options]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_evaluate_retrieval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.save(tmp_path / "model")
    data = json.dumps(tiny.concepts("test", max_samples=24))
    result = tmp_path / "result.json"
    arguments = ["evaluate", str(tmp_path / "model"), "--data", data, "--caption_columns", "caption"]
    assert cli.main([*arguments, "--output", str(result)]) == 0
    assert "T2I R@1 / 5 / 10" in capsys.readouterr().out
    metrics = json.loads(result.read_text())
    assert metrics["num_images"] == 24
    assert metrics["data"]["revision"] == data_revision(tiny.CONCEPTS)
    assert 0 < metrics["num_texts"] <= 24


def test_evaluate_caption_retrieval_of_a_joint_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: LLM2CLIPModel = tiny_models.save(tmp_path / "model")
    model.text_model.save_pretrained(tmp_path / "llm")
    tiny.save_llm(tmp_path / "raw")
    tiny_models.processor().tokenizer.save_pretrained(tmp_path / "llm")
    options = ["--task", "caption_retrieval", "--data", tiny.GLOSSES]
    columns = ["--query_column", "lemmas", "--target_column", "gloss"]
    results = []
    for name in ("model", "llm", "raw"):
        assert cli.main(["evaluate", str(tmp_path / name), *options, *columns]) == 0
        results.append(capsys.readouterr().out)
    assert "num_targets: 586" in results[0]
    assert results[0] == results[1] != results[2]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise KeyError("image")

    monkeypatch.setattr("llm2clip.evaluation.evaluate.run", broken)
    with pytest.raises(KeyError):
        cli.main(["evaluate", "x", "--data", "y"])


def test_a_command_leaves_the_process_group_of_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(job, "run", lambda config: {"recall": 0.5})
    assert cli.main(["evaluate", "model", "--data", "data"]) == 0
    assert capsys.readouterr().out == "recall: 0.5000\n"
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "llm2clip index: stopped by Ctrl-C; the same command continues where it was.\n"),
        (StoppedError(), 143, "llm2clip index: stopped by SIGTERM; the same command continues where it was.\n"),
    ],
)
def test_a_command_that_is_stopped_says_how_to_go_on(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(config: object) -> None:
        raise error

    monkeypatch.setattr("llm2clip.search.index.run", stopped)
    assert cli.main(["index", "pictures", "--model", "m"]) == status
    assert capsys.readouterr().err == message


def test_sigterm_ends_a_command_in_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def killed(config: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            ended.append(True)

    monkeypatch.setattr("llm2clip.evaluation.evaluate.run", killed)
    assert cli.main(["evaluate", "x", "--data", "y"]) == 143
    assert ended
    assert capsys.readouterr().err == "llm2clip evaluate: stopped by SIGTERM; the same command starts it again.\n"


def test_sigterm_within_the_report_of_an_error_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun sends it to the rank at fault too, if one that has only lost the connection to it has ended first."""
    write_error = LogFile.write_error

    def meanwhile(self: LogFile, command: str, error: BaseException) -> Path | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return write_error(self, command, error)

    def failing(config: object) -> None:
        raise ValueError("the image 7 is damaged.")

    monkeypatch.setattr(LogFile, "write_error", meanwhile)
    monkeypatch.setattr("llm2clip.evaluation.evaluate.run", failing)
    assert cli.main(["evaluate", "x", "--data", "y"]) == 2
    assert "llm2clip evaluate: error: the image 7 is damaged." in capsys.readouterr().err


def test_sigterm_of_a_launcher_is_said_to_come_from_the_end_of_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: object) -> None:
        raise StoppedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llm2clip.search.index.run", stopped)
    assert cli.main(["index", "pictures", "--model", "m"]) == 143
    assert "unless you have sent it, another process of this run has ended; " in capsys.readouterr().err
