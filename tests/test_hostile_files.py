"""Commands on files that mean harm: nothing in them runs, nothing leaves its place, and no connection is opened."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.documents.reading import ROOT
from tests.modeling_llm2clip import tiny

# Runs commands one after the other, and prints their exit statuses with what Python's audit hook saw of each.
RUNNER = """
import json, os, sys, traceback
place, commands = sys.argv[1], json.loads(sys.argv[2])
FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "socket.connect", "socket.getaddrinfo", "shutil.unpack_archive")
seen = []

def look(event, arguments):
    if event in FORBIDDEN:
        seen.append(f"{event} {arguments!r}"[:300])
    elif event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        path = os.path.realpath(arguments[0])
        if not path.startswith((place, "/dev/", "/proc/")):
            seen.append(f"writes {path}")

from llm2clip import cli
import llm2clip.search.index, llm2clip.evaluation.check_benchmark, llm2clip.convert.conversion, llm2clip.hub.build
import llm2clip.encoders.embed, llm2clip.evaluation.evaluate, llm2clip.trainers.run_stage2, llm2clip.hub.export_onnx
sys.addaudithook(look)
results = []
for command in commands:
    seen.clear()
    try:
        status = cli.main(command)
    except Exception:  # with --traceback
        traceback.print_exc()
        status = 2
    results.append({"command": command[0], "status": status, "seen": list(seen)})
print("RESULTS " + json.dumps(results))
"""


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def run(
    commands: list[list[str]], folder: Path, variables: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run commands in a process of their own; returns what it saw, and all that was printed.

    Args:
        commands: Arguments of `llm2clip`.
        folder: The working directory, and the only place that it may write to.
        variables: More environment variables.
    """
    home = folder / "home"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        **{"PYTHONPATH": f"{ROOT}:{ROOT / 'training'}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")},
        **{"TMPDIR": str(home / "tmp"), "MPLCONFIGDIR": str(home / "mpl"), "HOME": str(home)},
        **(variables or {}),
    }
    command = [sys.executable, "-B", "-c", RUNNER, str(folder.resolve()), json.dumps(commands)]
    options: dict[str, Any] = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    assert "RESULTS " in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULTS ")[2]), done.stdout + done.stderr


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def hostile_tar(path: Path, secret: Path, pickles: bool) -> None:
    """A tar whose members would leave the folder, are links to a file, or carry pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pickled = io.BytesIO()
    np.save(pickled, np.array([Touch(path.parent / "touched")], dtype=object), allow_pickle=True)
    with tarfile.open(path, "w") as archive:
        for key in ("../../out", "/tmp/../absolute", "plain", "a/../../b"):
            files = {"png": picture(), "txt": b"a dog"} | ({"npy": pickled.getvalue()} if pickles else {})
            for name, content in ((f"{key}.{suffix}", content) for suffix, content in files.items()):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for name in ("link.png", "link.txt"):
                member = tarfile.TarInfo(f"{kind.decode()}{name}")
                member.type, member.linkname = kind, str(secret)
                archive.addfile(member)


def pickled_checkpoints(folder: Path, touched: Path) -> list[list[str]]:
    """Checkpoints that run code when they are unpickled, and the commands that read them."""
    folder.mkdir()
    (folder / "bare.pt").write_bytes(pickle.dumps({"visual.proj": Touch(touched)}))
    torch.save({"visual.proj": torch.zeros(2, 2), "x": Touch(touched)}, folder / "zip.pt")
    torch.save({"x": Touch(touched)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "folder").mkdir()
    shutil.copy(folder / "zip.pt", folder / "folder" / "pytorch_model.bin")
    (folder / "folder" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (folder / "numbers.npy").write_bytes(pickle.dumps(Touch(touched)))
    names = ("bare.pt", "zip.pt", "old.pt", "folder", "numbers.npy")
    return [["convert", str(folder / name), str(folder / f"{name}-converted")] for name in names]


def model_with_code_of_its_own(folder: Path, touched: Path, model_type: str | None) -> None:
    """A model whose configs name a class in a Python file that makes a folder when it is imported."""
    tiny.save(folder)
    for path in folder.glob("*.py"):
        path.write_text(f"import os\nos.mkdir({str(touched)!r})\n")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(touched)!r})\n")
    for path in folder.glob("*config.json"):
        fields = json.loads(path.read_text())
        fields["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
        if model_type is not None and path.name == "config.json":
            fields["model_type"] = model_type
        path.write_text(json.dumps(fields))


@pytest.mark.slow
def test_no_pickle_is_read_and_nothing_leaves_its_place(tmp_path: Path) -> None:
    touched, secret = tmp_path / "touched", tmp_path / "secret.txt"
    secret.write_text("SECRET-OF-THE-MACHINE")
    tiny.save(tmp_path / "model")
    hostile_tar(tmp_path / "data" / "deep" / "part-0.tar", secret, pickles=False)
    hostile_tar(tmp_path / "data" / "pickled" / "part-0.tar", secret, pickles=True)
    data, model = tmp_path / "data" / "deep", str(tmp_path / "model")
    sources = json.dumps([{"path": str(data / "*.tar"), "caption_columns": ["txt"]}])
    commands = [
        *pickled_checkpoints(tmp_path / "checkpoints", touched),
        ["embed", "--text-model-name-or-path", model, "--output-dir", str(tmp_path / "cache"), "--sources", sources],
        [
            "index",
            str(data / "part-0.tar"),
            "--model",
            model,
            "--output-dir",
            str(tmp_path / "index"),
            "--num-workers",
            "0",
        ],
        ["check-data", str(data / "*.tar"), "--caption-columns", "txt", "--num-workers", "0"],
        ["evaluate", model, "--benchmark", str(data / "*.tar"), "--caption-columns", "txt"],
        ["check-data", str(tmp_path / "data" / "pickled" / "*.tar"), "--caption-columns", "txt", "--num-workers", "0"],
    ]
    before = {path.name for path in tmp_path.parent.iterdir()}
    results, printed = run(commands, tmp_path)
    assert [result for result in results if result["seen"]] == []
    assert {result["status"] for result in results[:5]} == {2}
    assert not touched.exists()
    assert not [*(tmp_path / "data").rglob("touched")]
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.suffix in (".png", ".txt")]
    assert "SECRET-OF-THE-MACHINE" not in printed
    written = (path for path in tmp_path.rglob("*") if path.is_file() and path != secret)
    assert not [path for path in written if b"SECRET-OF-THE-MACHINE" in path.read_bytes()]
    # What reads tars did so: a refusal of the command line would prove nothing.
    assert [result["status"] for result in results[5:]] == [0, 0, 0, 0, 2], printed[-3000:]
    assert "Object arrays cannot be loaded when allow_pickle=False" in printed


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [pytest.param(None, marks=pytest.mark.nightly), "evil"])
def test_code_in_a_folder_does_not_run_unasked(model_type: str | None, tmp_path: Path) -> None:
    touched, model = tmp_path / "touched", tmp_path / "model"
    model_with_code_of_its_own(model, touched, model_type)
    Image.open(io.BytesIO(picture())).save(tmp_path / "a.png")
    (tmp_path / "pictures").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "pictures" / "a.png")
    name, sources = str(model), json.dumps([{"path": "x.jsonl", "caption_columns": ["caption"]}])
    (tmp_path / "x.jsonl").write_text('{"caption": "a dog"}\n')
    commands = [
        ["index", str(tmp_path / "pictures"), "--model", name, "--output-dir", "index", "--num-workers", "0"],
        ["embed", "--text-model-name-or-path", name, "--output-dir", "cache", "--sources", sources],
        ["evaluate", name, "--benchmark", str(tmp_path / "pictures"), "--caption-columns", "caption"],
        ["convert", name, "converted"],
        ["build", name, "built", "--config-only"],
        ["stage2", "--vision-model", name, "--output-dir", "run", "--use-cpu"],
    ]
    results, printed = run(commands, tmp_path)
    assert [result for result in results if result["seen"]] == []
    assert not touched.exists()
    # Our own class reads the folder, whatever its configs name.
    assert [result["status"] for result in results[:2]] == ([0, 0] if model_type is None else [2, 2]), printed[-3000:]
