"""Faults that happen every day end in one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from llm2clip import cli
from llm2clip.trainers.checkpoints import COMMAND as TRAINING
from llm2clip.utils.library_errors import explain, wrap_write_errors
from llm2clip.utils.manifests import write_manifest
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.modeling_llm2clip import tiny as tiny_models
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


COMMANDS: dict[str, Callable[[Path, Path, Path], tuple[Path, list[str]]]] = {
    # A command with the folder of a joint model, one of a text tower, and one of the user; the damaged folder first.
    "evaluate": lambda joint, text, new: (joint, ["evaluate", str(joint), "--benchmark", json.dumps(tiny.concepts())]),
    "build": lambda joint, text, new: (joint, ["build", str(joint), str(new)]),
    "push": lambda joint, text, new: (joint, ["push", str(joint), "owner/name"]),
    "index": lambda joint, text, new: (joint, ["index", tiny.CONCEPTS, "--model", str(joint),
                                               "--output-dir", str(new)]),
    "merge": lambda joint, text, new: (joint, ["merge", str(joint), str(joint), str(new), "--alpha", "0.5"]),
    "export-onnx": lambda joint, text, new: (joint, ["export-onnx", str(joint), "--output-dir", str(new)]),
    "demo": lambda joint, text, new: (joint, ["demo", "--model", str(joint), "--cache-dir", str(new)]),
    "embed": lambda joint, text, new: (text, ["embed", "--text-model-name-or-path", str(text),
                                              "--output-dir", str(new), "--sources", json.dumps([tiny.concepts()])]),
    "stage1": lambda joint, text, new: (text, ["stage1", "--model-name-or-path", str(text), "--output-dir",
                                               str(new), "--sources", json.dumps(tiny.pair_sources())]),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_weights_are_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint, text = tmp_path / "joint", tmp_path / "text"
    tiny_models.save(joint)
    if command == "push":
        assert cli.main(["build", str(joint), str(tmp_path / "built")]) == 0
        joint = tmp_path / "built"
    tiny.save_llm(text)
    folder, arguments = COMMANDS[command](joint, text, tmp_path / "new")
    path = cut(folder)
    error = error_of(capsys, *arguments)
    # push compares a built folder with its list before it opens a file.
    expected = f"{folder} is not what was written ({path.name} has" if command == "push" else f"{path} is damaged or"
    assert expected in error
    assert "again" in error
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_damaged_vision_tower_is_named(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs.vision, tmp_path / "vision")
    path = cut(tmp_path / "vision")
    recipe = tmp_path / "recipe.yaml"
    fields = tiny.stage2_fields(tmp_path / "run", str(tmp_path / "vision"), inputs.text, inputs.cache)
    recipe.write_text(json.dumps(fields))
    assert f"{path} is damaged or cut short" in error_of(capsys, "stage2", recipe)


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("the code ran",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_is_one_line(
    name: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps({**tiny.stage1_fields(run, inputs.llm), "max_steps": 2, "save_steps": 1}))
    assert cli.main(["stage1", str(recipe), "--max-steps", "1"]) == 0
    checkpoint = run / "checkpoint-1"
    torch.save({"x": Code()}, checkpoint / name)
    write_manifest(checkpoint, TRAINING)  # as whoever can change the file can do
    error = error_of(capsys, "stage1", recipe, "--resume", "--resume-anyway")
    assert "cannot be read safely: it is damaged, or contains more than tensors" in error
    assert "--resume takes one if you delete this one" in error
    assert "the code ran" not in capsys.readouterr().out


def test_a_damaged_text_tower_is_named(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs.text, tmp_path / "text")
    path = cut(tmp_path / "text")
    convert = ["convert", tmp_path / "text", tmp_path / "new", "--text-model", tmp_path / "text"]
    for arguments in (["build", tmp_path / "text", tmp_path / "new"], convert[:3]):
        said = error_of(capsys, *arguments)
        assert (str(path.parent) in said and path.name in said) or arguments[0] == "convert"


CAPTIONS = {
    "short": [f"caption {number}" for number in range(200)],
    "long": [f"text {number}" for number in range(200)],
}


def write_lines(path: Path, columns: dict[str, list[object]]) -> bytes:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    content = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    path.write_bytes(content)
    return content


def readers(path: Path, llm: str, new: Path, streaming: bool) -> dict[str, list[str]]:
    """The commands that read captions."""
    source = {"path": str(path), "caption_columns": ["short"]}
    streamed = {**source, "streaming": streaming}
    pairs = {"path": str(path), "anchor_column": "short", "positive_column": "long"}
    text = ["--text-model-name-or-path", llm, "--sources", json.dumps([streamed])]
    stage1 = ["--model-name-or-path", llm, "--sources", json.dumps([pairs]), "--max-steps", "1", "--use-cpu"]
    return {
        "embed": [*text, "--output-dir", str(new / "cache"), "--store", "cache"],
        "check-data": [json.dumps(source), "--no-images"],
        "stage1": [*stage1, "--output-dir", str(new / "stage1")],
        "mntp": ["--model-name-or-path", llm, "--sources", json.dumps([streamed]), "--max-steps", "1", "--use-cpu",
                 "--output-dir", str(new / "mntp")],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["embed", "check-data", "stage1", "mntp"])
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_compressed_file_that_is_cut_short_is_named(
    command: str, streaming: bool, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "captions.jsonl.gz"
    content = write_lines(path, CAPTIONS)
    path.write_bytes(content[: len(content) // 2])
    error = error_of(capsys, command, *readers(path, inputs.llm, tmp_path, streaming)[command])
    assert str(path) in error


@pytest.mark.parametrize("command", ["embed", "stage1", "mntp"])
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_captions_that_are_numbers_are_named(
    command: str, streaming: bool, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "captions.jsonl.gz"
    write_lines(path, {**CAPTIONS, "short": [*range(200)]})
    error = error_of(capsys, command, *readers(path, inputs.llm, tmp_path, streaming)[command])
    assert str(path) in error
    assert "short" in error


def test_arguments_that_are_not_utf8_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell in Latin-1 passes them."""
    for command in ("search", "embed", "build"):
        error = error_of(capsys, command, "a", "caf\udce9")
        assert r"the argument 'caf\udce9' is not valid UTF-8" in error


def test_captions_with_half_a_character_are_an_error(inputs: Inputs, tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path)
    with pytest.raises(ValueError, match=r"caption 1, 'caf\\ud83d', has half a character \(U\+D83D\)"):
        model.encode_text(["a", "caf\ud83d"], tiny_models.processor())


class Killed(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: torch says it once more when it hears of the death."""
    script = """
import sys
import llm2clip.evaluation.evaluate as evaluate
from llm2clip import cli
from torch.utils.data import DataLoader
from tests.llm2clip.test_everyday_faults import Killed
evaluate.run = lambda config: [*DataLoader(Killed(), num_workers=1)]
sys.exit(cli.main(["evaluate", "x", "--benchmark", "y"]))
"""
    (tmp_path / "script.py").write_text(script)
    result = run_ranks([str(tmp_path / "script.py")], check=False)
    assert result.code == 2
    error = result.errors
    # What is noticed first differs: the signal, or that the connection to the process has ended.
    assert re.search(
        r"a process that reads data (was killed \(signal: Killed\)|has ended), most often because the memory", error
    )
    assert "lower dataloader_num_workers" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_tokenizer_on_a_full_disk_is_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_llm(tmp_path / "llm"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").symlink_to("/dev/full")
    message = re.escape(f"{tmp_path / 'out'} cannot be written: No space left on device (os error 28)")
    with pytest.raises(OSError, match=message), wrap_write_errors(tmp_path / "out"):
        tokenizer.save_pretrained(tmp_path / "out")


def test_what_is_not_known_keeps_its_traceback() -> None:
    for error in (RuntimeError("shape mismatch"), ConnectionResetError(104, "reset"), EOFError(), KeyError("x")):
        assert explain(error) is None
    assert "the memory of the accelerator is full" in str(explain(torch.OutOfMemoryError("tried to allocate\n2 GiB")))
