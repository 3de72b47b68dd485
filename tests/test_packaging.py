"""A wheel, installed where the repository is not, has everything that a user needs."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from tests.compatibility.lowest import lowest
from tests.documents.reading import ROOT, blocks
from tests.documents.stand_ins import FILES, FOLDERS, MODEL

LOOK = """
import pathlib, sys
import llm2clip, modeling_llm2clip
from importlib import resources
from llm2clip.recipes import (find_recipe)
for package in (llm2clip, modeling_llm2clip):
    assert package.__file__.startswith({target!r}), package.__file__
for path in sys.path:
    assert not (pathlib.Path(path) / "hub_configs").is_dir(), f"the checkout is on the path: {{path}}"
configs = resources.files("llm2clip.hub_configs")
assert (configs / "models.yaml").is_file() and (configs / "LLM2CLIP-EVA02-B-16" / "config.json").is_file()
assert (resources.files("llm2clip.hub.cards") / "template.md").is_file()
metrics = resources.files("llm2clip.evaluation.evaluate_modules")
assert (metrics / "retrieval_recall" / "retrieval_recall.py").is_file()
assert (resources.files("llm2clip.evaluation") / "class_data" / "imagenet.json").is_file()
assert (resources.files("modeling_llm2clip") / "py.typed").is_file()
print(find_recipe("quickstart_default"), find_recipe("stage1_paper"))
"""


NOT_SOURCE = (".git", ".venv*", "runs", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__")
IGNORED = shutil.ignore_patterns(*NOT_SOURCE, "tests")


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


def test_installed_command_shows_the_help_of_the_quickstart(installed: Path, tmp_path: Path) -> None:
    for command in ([installed / "bin" / "llm2clip"], ["-m", "llm2clip"]):
        assert "quickstart" in run([*command, "--help"], installed, tmp_path)


def test_wheel_holds_what_is_read_and_the_first_example_of_the_readme_runs(installed: Path, tmp_path: Path) -> None:
    example = next(content for language, content in blocks("README.md") if language == "python")
    (tmp_path / MODEL).mkdir(parents=True)
    FOLDERS[MODEL](tmp_path / MODEL)
    (tmp_path / "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336").symlink_to(MODEL)  # a converted checkpoint
    FILES["photo.jpg"](tmp_path / "photo.jpg")
    shown = run(["-c", LOOK.format(target=str(installed)) + example], installed, tmp_path)
    assert re.search(r"tensor\(\[\[.*, .*\]\]", shown)
    assert shown.count(str(installed)) == 2


def test_a_wheel_is_under_one_licence_and_holds_no_data_of_others(installed: Path) -> None:
    (about,) = installed.glob("llm2clip-*.dist-info")
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    assert re.findall("^License-Expression: (.*)$", metadata, re.MULTILINE) == ["Apache-2.0"]
    assert [path.name for path in (about / "licenses").rglob("*") if path.is_file()] == ["LICENSE"]
    assert list(installed.rglob("*.parquet")) == []


def copied(source: Path, target: Path, age: int, order: int) -> Path:
    """Copy a tree as another checkout: its files are made in another order, at another time."""
    for path in sorted((path for path in source.rglob("*") if path.is_file()), reverse=order < 0):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (10**9 + age, 10**9 + age))
    return target


def build(tree: Path, *options: str, **variables: str) -> Path:
    """The only file that `python -m build` makes of a tree, as in `make dist`."""
    # setuptools leaves build/ and *.egg-info in the tree.
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(tree / "dist"), str(tree)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, env=environment, umask=0o022, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = (tree / "dist").iterdir()
    return made


@pytest.mark.slow
def test_two_wheels_are_equal_byte_by_byte_under_one_umask(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "source", ignore=IGNORED)
    wheels = [
        build(copied(tmp_path / "source", tmp_path / place, age, order), "--wheel", SOURCE_DATE_EPOCH="1700000000")
        for place, age, order in (("one/llm2clip", 0, 1), ("two/deeper/checkout", 1000, -1))
    ]
    assert wheels[0].name == wheels[1].name
    assert hashlib.sha256(wheels[0].read_bytes()).digest() == hashlib.sha256(wheels[1].read_bytes()).digest()


@pytest.mark.slow
def test_tests_run_from_the_source_archive(tmp_path: Path) -> None:
    """It holds every file of the repository, and is built and installed again without it."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    with tarfile.open(build(tmp_path / "source", "--sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("llm2clip-*")
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert [name for name in listed.split("\0") if name and not (folder / name).is_file()] == []
    tests = ["tests/documents/test_readme.py", "tests/studies", "tests/test_packaging.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_released_page_has_absolute_links_alone() -> None:
    made = runpy.run_path(str(ROOT / ".ci" / "release_links.py"))
    place = ("https://example.org/llm2clip", "v1.2.3")
    page = made["with_absolute_links"]((ROOT / "README.md").read_text(encoding="utf-8"), *place)
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert len(targets) > 10
    assert all(target.startswith("https://") for target in targets)
    assert "![How captions and images" in page
    assert "(https://example.org/llm2clip/raw/v1.2.3/docs/data_flow.svg)" in page
    setup = configparser.ConfigParser()
    setup.read_string(made["with_project_urls"]((ROOT / "setup.cfg").read_text(encoding="utf-8"), *place))
    assert "Source = https://example.org/llm2clip\n" in setup["metadata"]["project_urls"]


@pytest.mark.parametrize(
    "workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    uses = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert uses
    assert [line for line in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line)] == []


def test_a_workflow_runs_what_has_to_pass_before_a_change_lands() -> None:
    demanded = re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    ci = (ROOT / ".github/workflows/ci.yml").read_text()
    assert (
        {"test", "test-all"}
        <= set(demanded)
        == set(re.findall(r"- run: make ([\w-]+) PYTHON=python$", ci, re.MULTILINE))
    )


def test_every_licence_of_the_bundled_data_is_named_and_has_its_text() -> None:
    files = sorted((ROOT / "examples" / "data" / "concepts").glob("*.parquet"))
    found = {row for file in files for row in pq.read_table(file, columns=["license"])["license"].to_pylist()}
    assert found == {"Apache-2.0", "MIT", "CC-BY-4.0", "public domain"}
    named = set(re.findall(r"^\| \[?([\w.-]+)", (ROOT / "licenses" / "README.md").read_text(), re.MULTILINE))
    assert found - {"public domain"} | {"Unicode-3.0", "WordNet"} <= named
    assert {path.stem for path in (ROOT / "licenses").glob("*.txt")} == {
        "MIT",
        "CC-BY-4.0",
        "Unicode-3.0",
        "WordNet-3.0",
    }


def test_every_library_has_one_lower_bound() -> None:
    """`make test-min` installs these versions; one without a bound would be the newest there too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = (line for text in texts for line in text.splitlines() if line and line != "types-PyYAML")
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.name != "llm2clip"]
    versions = lowest()
    assert set(versions) == {requirement.name.lower() for requirement in requirements}
    for requirement in requirements:
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement
