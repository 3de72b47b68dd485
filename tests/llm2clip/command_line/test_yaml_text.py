"""YAML of others: plain values only, and one error for what is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.command_line.yaml_text import load_yaml
from llm2clip.hub.cards.card import split_card
from llm2clip.recipes import load_recipe

BROKEN = {
    "open": "a: [1, 2\n",
    "deep": "a: " + "[" * 100_000,
    "integer": f"a: {'9' * 100_000}\n",
    "tag": "a: !!bool maybe\n",
}
PAYLOADS = {
    "apply": "a: !!python/object/apply:os.system ['touch PLACE']\n",
    "new": "a: !!python/object/new:subprocess.Popen [['touch', 'PLACE']]\n",
    "module": "a: !!python/module:antigravity\n",
    "key": "? !!python/object/apply:os.system ['touch PLACE']\n: 1\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_yaml_is_refused_in_one_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(BROKEN[name])
    assert cli.main(["embed", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'recipe.yaml'} is not valid YAML: " in error
    assert "Traceback" not in error
    assert len(error) < 1500


def test_a_field_of_a_recipe_that_is_set_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\nsources: [{path: a}, {path: b}]\nseed: 2\n")
    with pytest.raises(ValueError, match=r"'seed' .*\b1 and 3\b"):
        load_recipe(tmp_path / "recipe.yaml")


def test_aliases_of_yaml_stand_for_their_values() -> None:
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2, y: 3}\nc: *a\n") == {
        "a": {"x": 1},
        "b": {"x": 2, "y": 3},
        "c": {"x": 1},
    }


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_code_of_a_document_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a recipe, in a setting of the command line, and in the head of a card."""
    place = tmp_path / "touched"
    text = PAYLOADS[name].replace("PLACE", str(place))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="is not valid YAML"):
        split_card(f"---\n{text}---\nText\n")
    assert cli.main(["embed", "embed_paper", "--sources", f"[{{{text.strip()}}}]"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not place.exists()
    assert "antigravity" not in sys.modules


def test_a_wrong_value_is_shown_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"output_dir: [{'abcdefgh, ' * 1000}]\n")
    assert cli.main(["embed", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert "output_dir is ['abcdefgh', " in error
    assert len(error) < 1500
