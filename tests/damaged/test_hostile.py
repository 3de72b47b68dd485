"""Commands on files that mean harm: nothing in them runs, nothing leaves its place, and no connection is opened."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import tiny
from tests.damaged.watch import picture, run
from tests.tars import write_tar

SECRET = "SECRET-OF-THE-MACHINE"
IN_PROCESS = ("--num-workers", "0")


class Touch:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def hostile_tar(path: Path, secret: Path, touched: Path | None = None) -> None:
    """A tar whose members would leave the folder, are links to a file, or carry pickles that make a folder."""
    files = {"png": picture(), "txt": b"a dog"}
    if touched is not None:
        pickled = io.BytesIO()
        np.save(pickled, np.array([Touch(touched)], dtype=object), allow_pickle=True)
        files["npy"] = pickled.getvalue()
    keys = ("../../out", "/tmp/../absolute", "plain", "a/../../b")
    write_tar(path, [(f"{key}.{name}", content) for key in keys for name, content in files.items()])
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for name in ("link.png", "link.txt"):
                member = tarfile.TarInfo(f"{kind.decode()}{name}")
                member.type, member.linkname = kind, str(secret)
                archive.addfile(member)


@pytest.mark.slow
def test_no_pickle_is_read_and_nothing_leaves_its_place(tmp_path: Path) -> None:
    touched, secret, model = tmp_path / "touched", tmp_path / "secret.txt", str(tmp_path / "model")
    secret.write_text(SECRET)
    tiny.save(tmp_path / "model")
    hostile_tar(tmp_path / "data/deep/part-0.tar", secret)
    hostile_tar(tmp_path / "data/pickled/part-0.tar", secret, touched)
    tars, pickled = (str(tmp_path / "data" / name / "*.tar") for name in ("deep", "pickled"))
    sources = json.dumps([{"path": tars, "caption_columns": ["txt"]}])
    index = ["index", tars.replace("*", "part-0"), "--model", model, "--output-dir", str(tmp_path / "index")]
    commands = [
        ["embed", "--text-model-name-or-path", model, "--output-dir", str(tmp_path / "cache"), "--sources", sources],
        [*index, *IN_PROCESS],
        ["check-data", tars, "--caption-columns", "txt", *IN_PROCESS],
        ["evaluate", model, "--benchmark", tars, "--caption-columns", "txt"],
        ["check-data", pickled, "--caption-columns", "txt", *IN_PROCESS],
    ]
    before = {path.name for path in tmp_path.parent.iterdir()}
    results, printed = run(commands, tmp_path)
    assert [result for result in results if result["seen"]] == []
    assert not touched.exists()
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not [path for path in files if tmp_path / "data" in path.parents and path.suffix in (".png", ".txt")]
    assert SECRET not in printed
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    # What reads tars did so: a refusal of the command line would prove nothing.
    assert [result["status"] for result in results] == [0, 0, 0, 0, 2], printed[-3000:]
    assert "allow_pickle=False" in printed


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [pytest.param(None, marks=pytest.mark.nightly), "evil"])
def test_code_in_a_folder_does_not_run_unasked(model_type: str | None, tmp_path: Path) -> None:
    """A model whose configs name a class in a Python file that makes a folder when it is imported."""
    touched, model, pictures = tmp_path / "touched", tmp_path / "model", tmp_path / "pictures"
    tiny.save(model)
    for path in (*model.glob("*.py"), model / "evil.py"):
        path.write_text(f"import os\nos.mkdir({str(touched)!r})\n")
    for path in model.glob("*config.json"):
        fields = json.loads(path.read_text())
        fields["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
        if model_type is not None and path.name == "config.json":
            fields["model_type"] = model_type
        path.write_text(json.dumps(fields))
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture())
    (tmp_path / "x.jsonl").write_text('{"caption": "a dog"}\n')
    name, sources = str(model), json.dumps([{"path": "x.jsonl", "caption_columns": ["caption"]}])
    commands = [
        ["index", str(pictures), "--model", name, "--output-dir", "index", *IN_PROCESS],
        ["embed", "--text-model-name-or-path", name, "--output-dir", "cache", "--sources", sources],
        ["evaluate", name, "--benchmark", str(pictures), "--caption-columns", "caption"],
        ["convert", name, "converted"],
        ["build", name, "built", "--config-only"],
        ["stage2", "--vision-model", name, "--output-dir", "run", "--use-cpu"],
    ]
    results, printed = run(commands, tmp_path)
    assert [result for result in results if result["seen"]] == []
    assert not touched.exists()
    # Our own class reads the folder, whatever its configs name.
    assert [result["status"] for result in results[:2]] == ([0, 0] if model_type is None else [2, 2]), printed[-3000:]
