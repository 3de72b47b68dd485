"""The reader, with a shell and a Hub, for all tests of the documents."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.documents.reader import Reader
from tests.documents.shell import Shell
from tests.loopback_hub import LoopbackHub


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
        with Shell(environment) as shell:
            yield Reader(shell, hub, tmp_path_factory)
