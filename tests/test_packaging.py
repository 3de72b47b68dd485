"""A wheel, installed where the repository is not, has everything that a user needs."""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.compatibility.lowest import lowest
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
configs = resources.files("llm2clip.hub_configs")
assert (configs / "models.yaml").is_file() and (configs / "LLM2CLIP-EVA02-B-16" / "config.json").is_file()
assert (resources.files("llm2clip.hub.cards") / "template.md").is_file()
metrics = resources.files("llm2clip.evaluation.evaluate_modules")
assert (metrics / "retrieval_recall" / "retrieval_recall.py").is_file()
assert (resources.files("llm2clip.evaluation") / "class_data" / "imagenet.json").is_file()
assert (resources.files("modeling_llm2clip") / "py.typed").is_file()
print(find_recipe("quickstart_default"), find_recipe("stage1_paper"))
"""


IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "tests", "*.egg-info", ".*_cache", "__pycache__"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=IGNORED)
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
    for command in ([installed / "bin" / "llm2clip"], ["-m", "llm2clip"]):
        assert "quickstart" in run([*command, "--help"], installed, tmp_path)


def test_first_example_of_the_readme_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    example = next(content for language, content in blocks("README.md") if language == "python")
    (tmp_path / MODEL).mkdir(parents=True)
    FOLDERS[MODEL](tmp_path / MODEL)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "data").symlink_to(installed / "llm2clip" / "example_data")
    shown = run(["-c", f"{example}\nimport llm2clip; print(llm2clip.__file__)"], installed, tmp_path)
    assert "a train on a single rail" in shown
    assert str(installed) in shown


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


def copied(source: Path, target: Path, umask: int, order: int) -> Path:
    """Copy a tree as another checkout: its files are made in another order, at another time, under another umask."""
    before = os.umask(umask)
    try:
        for path in sorted((path for path in source.rglob("*") if path.is_file()), reverse=order < 0):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
            os.utime(copy, (10**9 + umask, 10**9 + umask))
    finally:
        os.umask(before)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [None, "1700000000"])
def test_two_builds_are_equal_byte_by_byte(epoch: str | None, tmp_path: Path) -> None:
    """By `python -m build` as in `make dist`; without SOURCE_DATE_EPOCH, all times are those of setup.py."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=IGNORED)
    trees = [
        copied(tmp_path / "source", tmp_path / "one" / "llm2clip", 0o022, 1),
        copied(tmp_path / "source", tmp_path / "two" / "deeper" / "checkout", 0o077, -1),
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "PYTHONPATH")
    }
    results = []
    for tree, umask in zip(trees, (0o022, 0o077), strict=True):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
        variables = environment | ({"SOURCE_DATE_EPOCH": epoch} if epoch else {})
        done = subprocess.run(command, env=variables, umask=umask, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        results.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tree / "dist").iterdir()}
        )
    assert sorted(Path(name).suffix for name in results[0]) == [".gz", ".whl"]
    assert results[0] == results[1]


def test_every_library_has_one_lower_bound() -> None:
    """`make test-min` installs these versions; one without a bound would be the newest there too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = (line for text in texts for line in text.splitlines() if line and line != "types-PyYAML")
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.name != "llm2clip"]
    versions = lowest()
    assert set(versions) == {requirement.name.lower() for requirement in requirements}
    assert versions["ray"] == "2.44"
    for requirement in requirements:
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement


def test_two_lower_bounds_of_one_library_are_refused(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").write_text(
        "[options]\ninstall_requires =\n    torch>=2.6\n[options.extras_require]\none =\n    Torch>=2.7,<3\n"
    )
    with pytest.raises(ValueError, match=r"two lower bounds for torch: 2\.6 and 2\.7"):
        lowest(tmp_path / "setup.cfg")
