"""A wheel, installed where the repository is not, has everything that a user needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOK = """
import llm2clip, modeling_llm2clip
from importlib import resources
from llm2clip.recipes import (find_recipe)
for package in (llm2clip, modeling_llm2clip):
    assert package.__file__.startswith({target!r}), package.__file__
data = resources.files("llm2clip.example_data")
assert (data / "concepts" / "test.parquet").is_file() and (data / "README.md").is_file()
assert resources.files("llm2clip.hub_configs").is_dir()
metrics = resources.files("llm2clip.evaluation.evaluate_modules")
assert (metrics / "retrieval_recall" / "retrieval_recall.py").is_file()
assert (resources.files("modeling_llm2clip") / "py.typed").is_file()
print(find_recipe("quickstart_default"), find_recipe("stage1_paper"))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "tests", "*.egg-info", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "dist", folder / "source"],
        check=True,
    )
    wheel = next((folder / "dist").glob("llm2clip-*.whl"))
    subprocess.run([*pip, "install", *offline, "--target", folder / "installed", wheel], check=True)
    return folder / "installed"


def test_wheel_holds_packages_recipes_configs_and_data(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", LOOK.format(target=str(installed))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(installed)) == 2


def test_wheel_installs_the_command(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, installed / "bin" / "llm2clip", "--help"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "quickstart" in result.stdout
