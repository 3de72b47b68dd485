"""A wheel, installed where the repository is not, has everything that a user needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.reading import ROOT, blocks
from tests.documents.stand_ins import FOLDERS, MODEL

LOOK = """
import pathlib, sys
import llm2clip, modeling_llm2clip
from importlib import resources
from llm2clip.recipes import (find_recipe)
for package in (llm2clip, modeling_llm2clip):
    assert package.__file__.startswith({target!r}), package.__file__
for path in sys.path:
    assert not (pathlib.Path(path) / "hub_configs").is_dir(), f"the checkout is on the path: {{path}}"
data = resources.files("llm2clip.example_data")
assert (data / "concepts" / "test.parquet").is_file() and (data / "README.md").is_file()
assert resources.files("llm2clip.hub_configs").is_dir()
metrics = resources.files("llm2clip.evaluation.evaluate_modules")
assert (metrics / "retrieval_recall" / "retrieval_recall.py").is_file()
assert (resources.files("llm2clip.evaluation") / "class_data" / "imagenet.json").is_file()
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


def run(arguments: list[str | Path], installed: Path, folder: Path) -> str:
    """Run Python on the installed wheel and this environment's libraries, outside the checkout; returns its output."""
    # -P and an own path: neither the working directory nor an editable installation finds the checkout.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(installed), *libraries]), "HF_HUB_OFFLINE": "1"}
    # Without site, .pth files (those of editable installations) are not read.
    command = [sys.executable, "-S", *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_packages_recipes_configs_and_data(installed: Path, tmp_path: Path) -> None:
    shown = run(["-c", LOOK.format(target=str(installed))], installed, tmp_path)
    assert shown.count(str(installed)) == 2


def test_installed_command_shows_the_help_of_the_quickstart(installed: Path, tmp_path: Path) -> None:
    shown = run([installed / "bin" / "llm2clip", "quickstart", "--help"], installed, tmp_path)
    assert "--profile" in shown
    assert "quickstart" in run(["-m", "llm2clip", "--help"], installed, tmp_path)


def test_first_example_of_the_readme_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    example = next(content for language, content in blocks("README.md") if language == "python")
    (tmp_path / MODEL).mkdir(parents=True)
    FOLDERS[MODEL](tmp_path / MODEL)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "data").symlink_to(installed / "llm2clip" / "example_data")
    assert "a train on a single rail" in run(["-c", example], installed, tmp_path)
    assert "llm2clip" in run(["-c", f"{example}\nimport llm2clip; print(llm2clip.__file__)"], installed, tmp_path)


@pytest.mark.slow
def test_wheel_works_in_a_virtual_environment(installed: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    wheel = next((installed.parent / "dist").glob("llm2clip-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--quiet", wheel], check=True)
    # The libraries that it depends on are those of this environment, behind its own packages.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["llm2clip", "quickstart", "--help"], ["python", "-m", "llm2clip", "--help"]):
        program = [python.with_name(command[0]), *command[1:]]
        shown = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    ask = "import llm2clip; print(llm2clip.__file__); llm2clip.Stage2Trainer"
    shown = subprocess.run([python, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.startswith(str(packages)), shown.stderr
