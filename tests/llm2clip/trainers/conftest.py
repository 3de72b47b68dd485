"""What all tests of the stages share."""

from __future__ import annotations

import pytest
from PIL import Image

from llm2clip.hub.cards import curves


@pytest.fixture(autouse=True)
def _curves_of_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half of the time of a tiny training; tests of cards and of the commands look at real curves."""
    monkeypatch.setattr(curves, "write_figure", lambda path, figure: Image.new("L", (1, 1)).save(path))
