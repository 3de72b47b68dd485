"""A hub on the loopback interface, which this process takes for the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loopback_hub import LoopbackHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.redirect(monkeypatch, tmp_path_factory.mktemp("hub_cache"))
        yield server
