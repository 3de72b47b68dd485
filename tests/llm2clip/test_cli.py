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
from typing import Any

import pytest
from torch import distributed as dist

from llm2clip import cli
from llm2clip.data.table_identity import data_revision
from llm2clip.utils.library_errors import PEER_ENDED
from llm2clip.utils.logs import LogFile
from llm2clip.utils.stopping import StoppedError
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip import tiny
from tests.modeling_llm2clip import tiny as tiny_models

Capsys = pytest.CaptureFixture[str]
EVALUATE = ["evaluate", "x", "--benchmark", "y.csv"]


def replaced_run(command: str, end: BaseException | dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a command do nothing but raise an error or return a result."""

    def run(config: object, **options: Any) -> dict[str, Any]:
        if isinstance(end, dict):
            return end
        raise end

    monkeypatch.setattr(f"{cli.COMMANDS[command].module}.run", run)


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_every_field_once(command: str, capsys: Capsys) -> None:
    assert cli.main([command, "--help-all"]) == 0
    text = capsys.readouterr().out
    settings = getattr(import_module(cli.COMMANDS[command].module), cli.COMMANDS[command].config)
    shown = re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)
    names = {field.name for field in fields(settings) if field.init} - set(cli.COMMANDS[command].positional)
    switches = ["resume"] * cli.COMMANDS[command].resumes + ["traceback", "help"]
    assert sorted(shown) == sorted([*(name.replace("_", "-") for name in names), *switches])
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("command", ["mntp", "stage1", "stage2"])
def test_help_of_a_stage_fits_a_reader(command: str, capsys: Capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 175
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


def test_a_run_writes_its_log_into_output_dir(tmp_path: Path, capsys: Capsys) -> None:
    fields = ["--output_dir", str(tmp_path / "run"), "--text_model_name_or_path", str(tmp_path / "missing")]
    assert cli.main(["embed", *fields, "--sources", "[{path: x, caption_columns: [caption]}]"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"llm2clip embed: {cli.COMMANDS['embed'].help}"
    assert shown[1] == f"Log: {tmp_path / 'run' / 'log.txt'}"
    assert len(shown) == 4
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_error_of_a_run_leaves_its_traceback_in_output_dir(
    rank: str, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    replaced_run("stage1", OSError("the disk has gone"), monkeypatch)
    assert cli.main(["stage1", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"llm2clip stage1: error: the disk has gone\n(where: {tmp_path / 'error.log'})" in error
    assert "Traceback" not in error
    replaced_run("stage1", RuntimeError("out of memory"), monkeypatch)
    with pytest.raises(RuntimeError):
        cli.main(["stage1", "--output_dir", str(tmp_path)])
    text = (tmp_path / "error.log").read_text()
    assert text.count("Traceback (most recent call last)") == 2
    assert text.count(f"llm2clip stage1 (process {rank}, id ") == 2
    assert "in run\n    raise end\nOSError: the disk has gone" in text
    assert "RuntimeError: out of memory" in text


def test_a_success_removes_the_errors_of_earlier_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[Any, int]] = [(OSError("the disk has gone"), 2), ({"train_loss": 1.0}, 0)]
    for end, status in ends:
        replaced_run("stage1", end, monkeypatch)
        assert cli.main(["stage1", "--output_dir", str(tmp_path)]) == status
        assert (tmp_path / "error.log").exists() == (status != 0)
    assert "the disk has gone" in (tmp_path / "log.txt").read_text()


def test_an_error_log_that_cannot_be_written_hides_no_error(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "error.log").mkdir()
    replaced_run("stage1", OSError("no space left"), monkeypatch)
    assert cli.main(["stage1", "--output_dir", str(tmp_path)]) == 2
    assert "llm2clip stage1: error: no space left\n(--traceback shows where)" in capsys.readouterr().err


def test_top_level_help_lists_the_commands(capsys: Capsys) -> None:
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
        (["evaluate", "x", "--task", "guessing", "--benchmark", "y"], "one of retrieval, caption_retrieval"),
        (["evaluate", "x"], "evaluate needs a model and what to measure"),
        (["evaluate", "x", "--benchmark", "y", "--on_error", "ignore"], "one of raise, skip"),
        (
            ["evaluate", "/no/such/folder", "--benchmark", tiny.CONCEPTS],
            "there is no such folder, and it is not a valid Hub id",
        ),
        (["embed"], "EmbedConfig needs output_dir, text_model_name_or_path, sources"),
        (["convert", "a", "b", "two words"], "the argument 'two words' is one too many"),
        (["quickstart", "--profile", "fast"], "the recipe fast does not exist"),
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
        ("lr: 1", [], "{file} (line 2) has no field 'lr'; did you mean 'learning_rate'?"),
        ("max_steps: many", [], "{file} (line 2): max_steps is 'many'"),
        ("max_steps: many", ["--max-steps", "all"], "the command line: max_steps is 'all'"),
        ("feature_views: 0", [], "must be at least 1, but is 0. feature_views is set by {file} (line 2)."),
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


def test_evaluate_retrieval(tmp_path: Path, capsys: Capsys) -> None:
    tiny_models.save(tmp_path / "model")
    data = json.dumps(tiny.concepts("test", max_samples=24))
    arguments = ["evaluate", str(tmp_path / "model"), "--benchmark", data, "--caption_columns", "caption"]
    assert cli.main([*arguments, "--output", str(tmp_path / "results"), "--num_workers", "0"]) == 0
    assert "T2I R@1 / 5 / 10" in capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert result["counts"]["images"] == 24
    assert result["data"]["revision"] == data_revision(tiny.CONCEPTS)
    assert 0 < result["counts"]["texts"] <= 24


def test_evaluate_caption_retrieval_of_a_joint_model(tmp_path: Path, capsys: Capsys) -> None:
    model: LLM2CLIPModel = tiny_models.save(tmp_path / "model")
    model.text_model.save_pretrained(tmp_path / "llm")
    tiny.save_llm(tmp_path / "raw")
    tiny_models.processor().tokenizer.save_pretrained(tmp_path / "llm")
    models = [str(tmp_path / name) for name in ("model", "llm", "raw")]
    columns = ["--query_column", "lemmas", "--target_column", "gloss", "--output", str(tmp_path / "results")]
    assert cli.main(["evaluate", *models, "--benchmark", tiny.GLOSSES, *columns]) == 0
    assert "query to target" in capsys.readouterr().out
    found = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")]
    assert [result["protocol"]["gallery"] for result in found] == ["586 captions"] * 3
    # An LLM2CLIP model is measured after its adapter.
    assert len({result["ranks"]["mean_rank"] for result in found}) == 3


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_run("evaluate", KeyError("image"), monkeypatch)
    with pytest.raises(KeyError):
        cli.main(EVALUATE)


def test_a_command_leaves_the_process_group_of_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    replaced_run("evaluate", {"recall": 0.5}, monkeypatch)
    assert cli.main(EVALUATE) == 0
    assert capsys.readouterr().out == "recall: 0.5000\n"
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "processes", "status", "cause"),
    [
        (KeyboardInterrupt(), "1", 130, "Ctrl-C"),
        (StoppedError(), "1", 143, "SIGTERM"),
        (StoppedError(), "2", 143, f"SIGTERM (unless you have sent it, {PEER_ENDED})"),
    ],
)
def test_a_command_that_is_stopped_says_how_to_go_on(
    error: BaseException, processes: str, status: int, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """SIGTERM may come from a launcher, after the end of another process."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    replaced_run("index", error, monkeypatch)
    assert cli.main(["index", "pictures", "--model", "m"]) == status
    expected = f"llm2clip index: stopped by {cause}; the same command continues where it was.\n"
    assert capsys.readouterr().err == expected


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
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """torchrun sends it to the rank at fault too, if one that has only lost the connection to it has ended first."""
    write_error = LogFile.write_error

    def meanwhile(self: LogFile, command: str, error: BaseException) -> Path | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return write_error(self, command, error)

    monkeypatch.setattr(LogFile, "write_error", meanwhile)
    replaced_run("evaluate", ValueError("the image 7 is damaged."), monkeypatch)
    assert cli.main(EVALUATE) == 2
    assert "llm2clip evaluate: error: the image 7 is damaged." in capsys.readouterr().err
