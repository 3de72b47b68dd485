"""The table of the README is that of the committed result."""

from __future__ import annotations

import importlib.util
import json

from tests.documents.reading import ROOT


def test_the_table_of_the_readme_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_quickstart", ROOT / "docs" / "make_quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    shown = page.TABLE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown[0] == page.table(json.loads(page.RESULT.read_text(encoding="utf-8")))
