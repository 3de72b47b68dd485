"""A Hub that takes requests and never answers."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import HfApi, close_session, constants

from llm2clip.hub import hub_errors
from llm2clip.hub.upload import Uploader


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "PATIENCE", (5.0, 0.2, 5.0, 5.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    try:
        # Connections to a socket that listens are accepted by the system.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", token="token")
            with pytest.raises(ValueError, match=r"tester/tiny: the connection broke .*timed out.*push again"):
                Uploader("tester/tiny", api=api).create_repo()
    finally:
        close_session()
