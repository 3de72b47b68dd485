"""The user's token of the Hub is in no file, log, traceback or output of any command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.hub import build
from tests.builders import small_runs, tiny
from tests.damaged.watch import picture, run
from tests.loopback_hub import TOKEN, LoopbackHub

# In the file of `hf auth login`; TOKEN is in the environment.
IN_FILE = "hf_MarkedTokenOfTheFile"


@pytest.mark.slow
@pytest.mark.parametrize("token", [TOKEN, pytest.param(None, marks=pytest.mark.nightly)], ids=["environment", "file"])
def test_no_token_reaches_a_file_or_the_output(token: str | None, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture())
    llm = small_runs.save_llm(tmp_path / "llm")
    build.build_folder(tmp_path / "model", tmp_path / "built")
    concepts = json.dumps([small_runs.concepts(max_samples=8)])
    fields = small_runs.stage1_fields(tmp_path / "run", llm) | {"max_steps": 2, "save_steps": 1}
    fields |= {"push_to_hub": True, "hub_model_id": "tester/llm", "hub_strategy": "end"}
    (tmp_path / "stage1.json").write_text(json.dumps(fields))
    model = str(tmp_path / "model")
    commands = [
        ["push", str(tmp_path / "built"), "tester/tiny", "--no-check"],
        ["push", str(tmp_path / "built"), "someone-else/tiny", "--no-check", "--traceback"],
        ["stage1", str(tmp_path / "stage1.json"), "--hub-token", TOKEN],
        ["embed", "--text-model-name-or-path", model, "--output-dir", "cache", "--sources", concepts],
        [
            "embed",
            "--text-model-name-or-path",
            "tester/none",
            "--output-dir",
            "no",
            "--sources",
            concepts,
            "--traceback",
        ],
        ["index", str(pictures), "--model", model, "--output-dir", "index", "--num-workers", "0"],
        ["search", "index", "a dog", "--html", "page.html"],
        ["evaluate", model, "--benchmark", json.dumps(small_runs.concepts(max_samples=8)), "--output", "results"],
        ["convert", "tester/none", "converted", "--traceback"],
        ["build", "tester/none", "again", "--traceback"],
    ]
    with LoopbackHub() as hub:
        variables = hub.environment(tmp_path / "home", token)
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        (home / "token").write_text(IN_FILE)
        variables |= {"HF_TOKEN_PATH": str(home / "token")}
        results, printed = run(commands, tmp_path, variables)
        uploaded = [*hub.blobs.values()]
    statuses = [result["status"] for result in results]
    errors = [line for line in printed.splitlines() if "error:" in line]
    if token is not None:
        assert statuses[:3] == [0, 2, 0], errors
        assert uploaded
    assert [statuses[place] for place in (3, 5, 6, 7)] == [0, 0, 0, 0], errors
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path != home / "token"]
    assert len(found) > 50
    contents = [(str(path), path.read_bytes()) for path in found]
    contents += [("the output", printed.encode()), *(("an upload", blob) for blob in uploaded)]
    for mark in (TOKEN, IN_FILE):
        assert [name for name, content in contents if mark.encode() in content] == []
