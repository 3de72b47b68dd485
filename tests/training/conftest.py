"""A hub on the loopback interface, which this process takes for the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers.utils.hub
from huggingface_hub import constants

from tests.loopback_hub import LoopbackHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        # The Trainer's client is made once, for the endpoint of that time.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield server
