"""YAML of others: plain values only, and nothing that grows without bound."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.command_line.yaml_text import load_yaml
from llm2clip.hub.cards.card import split_card
from llm2clip.recipes import load_recipe


def repeated(first: str, each: str) -> str:
    """A document whose every line holds what the line before it holds, ten times."""
    lines = (each.format(n=n, ten=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 12))
    return "\n".join([first, *lines]) + "\n"


LAUGHS = repeated("a0: &a0 [x, x, x, x, x]", "a{n}: &a{n} [{ten}]")
MERGES = repeated("a0: &a0 {x: 1}", "a{n}: &a{n} {{<<: [{ten}]}}")
BOMBS = {
    "laughs": (LAUGHS, r"\*a0 is an alias: write the values out \(line 2\)"),
    "merges": (MERGES, "is an alias"),
    "itself": ("a: &a [*a]\n", "is an alias"),
    "deep": ("a: " + "[" * 100_000, "too many levels|nesting depth"),
    "integer": (f"a: {'9' * 100_000}\n", "4300"),
}
PAYLOADS = {
    "apply": "a: !!python/object/apply:os.system ['touch PLACE']\n",
    "new": "a: !!python/object/new:subprocess.Popen [['touch', 'PLACE']]\n",
    "module": "a: !!python/module:antigravity\n",
    "key": "? !!python/object/apply:os.system ['touch PLACE']\n: 1\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_grows_without_bound_is_refused_at_once_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = BOMBS[name]
    with pytest.raises(ValueError, match=message):
        load_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    assert cli.main(["embed", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml is not valid YAML: " in error
    assert "Traceback" not in error
    assert len(error) < 1500


def test_a_field_of_a_recipe_that_is_set_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\nsources: [{path: a}, {path: b}]\nseed: 2\n")
    with pytest.raises(ValueError, match=r"'seed' is set twice \(lines 1 and 3\)"):
        load_recipe(tmp_path / "recipe.yaml")
    assert load_yaml("license: mit\nlicense: other\n") == {"license": "other"}  # a card that others wrote


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
