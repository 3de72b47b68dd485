"""Faults that happen every day end in one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llm2clip import cli
from llm2clip.files.library_errors import explain, wrap_write_errors
from llm2clip.files.manifests import write_manifest
from llm2clip.trainers.checkpoints import COMMAND as TRAINING
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.processes import run_ranks


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails; return its error, which is one line and the place of the traceback."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    start = next(number for number, line in enumerate(lines) if f"llm2clip {arguments[0]}: error: " in line)
    assert len(lines) - start <= 2, lines
    assert not any("Traceback" in line for line in lines)
    return lines[start]


def cut(folder: Path, name: str = "model.safetensors") -> Path:
    path = folder / name
    os.truncate(path, path.stat().st_size // 2)
    return path


def arguments_of(command: str, joint: Path, text: Path, new: Path) -> list[str | Path]:
    """The arguments of a command with a joint model, a text tower and a folder of the user."""
    concepts, pairs = small_runs.concepts(), json.dumps(small_runs.pair_sources())
    return {
        "evaluate": [joint, "--benchmark", json.dumps(concepts)],
        "build": [joint, new],
        "index": [small_runs.CONCEPTS, "--model", joint, "--output-dir", new],
        "merge": [joint, joint, new, "--alpha", "0.5"],
        "export-onnx": [joint, "--output-dir", new],
        "demo": ["--model", joint, "--cache-dir", new],
        "embed": ["--text-model-name-or-path", text, "--output-dir", new, "--sources", json.dumps([concepts])],
        "stage1": ["--model-name-or-path", text, "--output-dir", new, "--sources", pairs],
    }[command]


TEXT_COMMANDS = ("embed", "stage1")


@pytest.mark.parametrize("command", ["evaluate", "build", "index", "merge", "export-onnx", "demo", *TEXT_COMMANDS])
def test_damaged_weights_are_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint, text = tmp_path / "joint", tmp_path / "text"
    tiny.save(joint)
    small_runs.save_llm(text)
    path = cut(text if command in TEXT_COMMANDS else joint)
    error = error_of(capsys, command, *arguments_of(command, joint, text, tmp_path / "new"))
    assert f"{path} is damaged or" in error
    assert "again" in error
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_damaged_vision_tower_is_named(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs.vision, tmp_path / "vision")
    path = cut(tmp_path / "vision")
    recipe = tmp_path / "recipe.yaml"
    fields = small_runs.stage2_fields(tmp_path / "run", str(tmp_path / "vision"), inputs.text, inputs.cache)
    recipe.write_text(json.dumps(fields))
    assert f"{path} is damaged or cut short" in error_of(capsys, "stage2", recipe)


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("the code ran",))


def test_a_checkpoint_that_would_run_code_is_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps({**small_runs.stage1_fields(run, inputs.llm), "max_steps": 2, "save_steps": 1}))
    assert cli.main(["stage1", str(recipe), "--max-steps", "1"]) == 0
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = run / "checkpoint-1" / name
        good = path.read_bytes()
        torch.save({"x": Code()}, path)
        write_manifest(path.parent, TRAINING)  # as whoever can change the file can do
        error = error_of(capsys, "stage1", recipe, "--resume", "--resume-anyway")
        assert "cannot be read safely" in error
        assert "--resume takes one if you delete this one" in error
        assert "the code ran" not in capsys.readouterr().out
        path.write_bytes(good)


def readers(path: Path, llm: str, new: Path, streaming: bool) -> dict[str, list[str]]:
    """The commands that read captions."""
    source = {"path": str(path), "caption_columns": ["short"]}
    streamed = json.dumps([{**source, "streaming": streaming}])
    pairs = json.dumps([{"path": str(path), "anchor_column": "short", "positive_column": "long"}])
    stage = ["--model-name-or-path", llm, "--output-dir", str(new / "run"), "--max-steps", "1", "--use-cpu"]
    return {
        "embed": ["--text-model-name-or-path", llm, "--sources", streamed, "--output-dir", str(new / "cache"),
                  "--store", "cache"],
        "check-data": [json.dumps(source), "--no-images"],
        "stage1": [*stage, "--sources", pairs],
        "mntp": [*stage, "--sources", streamed],
    }  # fmt: skip


READERS = [("embed", False), ("embed", True), ("stage1", False), ("mntp", False), ("mntp", True)]


@pytest.mark.parametrize(
    ("wrong", "command", "streaming"),
    [
        *((wrong, *reader) for wrong in ("cut short", "numbers") for reader in READERS),
        ("cut short", "check-data", False),
    ],
)
def test_a_file_of_captions_that_cannot_be_used_is_named(
    wrong: str, command: str, streaming: bool, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, numbers = tmp_path / "captions.jsonl.gz", wrong == "numbers"
    rows = [{"short": row if numbers else f"caption {row}", "long": f"text {row}"} for row in range(200)]
    content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    path.write_bytes(content if numbers else content[: len(content) // 2])
    error = error_of(capsys, command, *readers(path, inputs.llm, tmp_path, streaming)[command])
    assert str(path) in error
    assert not numbers or "short" in error


def test_arguments_that_are_not_utf8_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell in Latin-1 passes them."""
    for command in ("search", "embed", "build"):
        error = error_of(capsys, command, "a", "caf\udce9")
        assert r"the argument 'caf\udce9' is not valid UTF-8" in error


KILLED = """
import os, signal, sys
from torch.utils.data import DataLoader
import llm2clip.evaluation.evaluate as evaluate
from llm2clip import cli
class Killed(list):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)
evaluate.run = lambda config: [*DataLoader(Killed([1]), num_workers=1)]
sys.exit(cli.main(["evaluate", "x", "--benchmark", "y"]))
"""


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: torch says it once more when it hears of the death."""
    (tmp_path / "script.py").write_text(KILLED)
    result = run_ranks([str(tmp_path / "script.py")], check=False)
    assert result.returncode == 2
    assert "lower dataloader_num_workers" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_tokenizer_on_a_full_disk_is_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_runs.save_llm(tmp_path / "llm"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="out cannot be written: No space left"), wrap_write_errors(tmp_path / "out"):
        tokenizer.save_pretrained(tmp_path / "out")


def test_what_is_not_known_keeps_its_traceback() -> None:
    for error in (RuntimeError("shape mismatch"), ConnectionResetError(104, "reset"), EOFError(), KeyError("x")):
        assert explain(error) is None
    assert "tower_chunk_size" in str(explain(torch.OutOfMemoryError("tried to allocate\n2 GiB")))
