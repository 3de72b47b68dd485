"""The folder of the demo's Space is complete and matches this package."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

import pytest
import yaml

from llm2clip import cli
from llm2clip.convert.published import FOLDER
from tests.builders import tiny


def test_a_space_contains_card_entry_point_packages_data_and_model(saved_model: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    assert cli.main(["demo", "--model", str(saved_model), "--write-space", str(space)]) == 0
    assert {path.name for path in space.iterdir()} == {
        ".llm2clip.json", "README.md", "requirements.txt", "app.py", "modeling_llm2clip", "llm2clip", "model",
    }  # fmt: skip
    card = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "gradio"
    assert (space / card["app_file"]).is_file()
    assert 'MODEL = "model"' in (space / "app.py").read_text()
    assert (space / "model" / "model.safetensors").is_file()
    assert [path.name for path in space.rglob("*.parquet")] == ["test.parquet"]
    assert not list(space.rglob("__pycache__"))


def test_a_space_takes_nothing_but_the_model(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(saved_model, tmp_path / "model"))
    for name in ("id_rsa", ".env", ".git/config", "checkpoint-3/optimizer.pt", "data/train.csv"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("mine")
    (model / "up").symlink_to("..")
    arguments = ["demo", "--model", str(model), "--write-space", str(tmp_path / "space")]
    assert cli.main(arguments) == 0
    assert "not copied, as no model needs them: data/train.csv, id_rsa" in capsys.readouterr().err
    space = tmp_path / "space" / "model"
    copied = {path.relative_to(space).as_posix() for path in space.rglob("*")}
    assert copied == {path.relative_to(saved_model).as_posix() for path in saved_model.rglob("*")}


def test_a_space_refers_to_a_model_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--model", "owner/name", "--write-space", str(tmp_path / "space")]
    assert cli.main(arguments) == 0
    for name in ("app.py", "README.md"):
        text = (tmp_path / "space" / name).read_text()
        assert "owner/name" in text
        assert "{model}" not in text
    assert cli.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_a_space_requires_the_llm_inside_the_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_apart(tmp_path)
    arguments = ["demo", "--model", str(tmp_path / "clip"), "--write-space", str(tmp_path / "space")]
    assert cli.main(arguments) == 2
    assert f"{tmp_path / 'llm'}" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_the_requirements_of_a_space_equal_the_demo_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(FOLDER.parent / "setup.cfg")
    extras = setup["options.extras_require"]
    wanted = [setup["options"]["install_requires"], extras["demo"]]
    lines = {line for text in wanted for line in text.split("\n") if line}
    assert set((FOLDER / "space" / "requirements.txt").read_text().splitlines()) == lines
