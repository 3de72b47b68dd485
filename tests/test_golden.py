"""Every fixture of the original code is in the table of tests/fixtures/README.md, and compared where it says."""

from __future__ import annotations

from tests.golden import FOLDER

TESTS = FOLDER.parents[1]


def table() -> dict[str, list[str]]:
    """Test files by fixture."""
    lines = (TESTS / "fixtures" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("| ")][2:]
    return {name.strip(): files.strip().split(", ") for names, files in rows for name in names.split(",")}


def test_every_fixture_is_compared() -> None:
    listed = table()
    fixtures = {path.stem for path in FOLDER.glob("*.json")}
    assert set(listed) == fixtures
    assert len(fixtures) == 41
    for fixture, files in listed.items():
        for file in files:
            text = (TESTS / file).read_text(encoding="utf-8")
            # Those that use the list of llm2vec.py put the name together.
            assert fixture in text or ("FIXTURES" in text and fixture.startswith("llm2vec_")), (
                f"{file} does not compare {fixture}"
            )
