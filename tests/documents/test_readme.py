"""The table of the README is that of the committed result."""

from __future__ import annotations

import json
import runpy

from tests.documents.reading import ROOT


def test_the_table_of_the_readme_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_quickstart.py"))
    shown = page["TABLE"].search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown[0] == page["table"](json.loads(page["RESULT"].read_text(encoding="utf-8")))
