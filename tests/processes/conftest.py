"""Small inputs and what the runs on two ranks make of them when nothing happens."""

from __future__ import annotations

import pytest

from tests.llm2clip.conftest import Inputs, inputs
from tests.processes.jobs import Jobs

__all__ = ["inputs"]


@pytest.fixture(scope="session")
def jobs(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(inputs, tmp_path_factory.mktemp("ranks"))
