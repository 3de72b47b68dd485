"""The notebook executes from top to bottom, on tiny models, and shows tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml

from tests.builders import small_runs
from tests.examples.conftest import EXAMPLES
from tests.llm2clip.quickstart.tiny_run import PROFILE, SPLITS, save_data

NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    profile = tmp_path / "tiny.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    data = save_data(tmp_path / "data", SPLITS)
    options = [
        "--traceback", "--profile", str(profile), "--data", data, "--image-column", "picture",
        "--embedding-model", "none", "--llm", small_runs.save_llm(tmp_path / "llm"),
        "--vision-model", small_runs.save_vision_tower(tmp_path / "vision"),
    ]  # fmt: skip
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    given = {"output": str(tmp_path / "run"), "data": str(EXAMPLES / "data" / "concepts"), "options": options}
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in data for data in shown) == 3
    tables = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    recall = 100 * results["caption_retrieval"]["LLM after stage 1"]["lemma_to_gloss"]["recall@10"]
    assert any("LLM after stage 1" in table and f"{recall:.1f}" in table for table in tables)
