"""What the container file runs, run by hand: its command and its check of health. The file itself is built nowhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import httpx
import pytest

from llm2clip import cli
from llm2clip.serving.addresses import listen
from llm2clip.serving.serve import ServeConfig, read_token
from tests.documents.reading import ROOT

FILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def command(pattern: str) -> list[str]:
    """The program and arguments of an instruction."""
    (found,) = re.findall(rf"^{pattern}\s*(\[.+\])$", FILE, re.MULTILINE)
    program: list[str] = json.loads(found)
    return program


def test_its_command_serves_a_model_to_others_with_the_token_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[ServeConfig] = []
    monkeypatch.setattr("llm2clip.serving.serve.run", started.append)
    program, *arguments = command("ENTRYPOINT")
    assert program == "llm2clip"
    assert cli.main([*arguments, "my/model", "--dtype", "bfloat16"]) == 0
    (config,) = started
    assert (config.model, config.host, config.port, config.dtype) == ("my/model", "0.0.0.0", 8000, "bfloat16")
    assert re.findall(r"^EXPOSE (\d+)$", FILE, re.MULTILINE) == ["8000"]
    monkeypatch.setenv("LLM2CLIP_TOKEN", "my-token")
    assert read_token(config) == "my-token"
    monkeypatch.delenv("LLM2CLIP_TOKEN")
    with pytest.raises(ValueError, match="LLM2CLIP_TOKEN has no token"):
        read_token(config)


def test_its_check_of_health_follows_the_server(client: httpx.Client) -> None:
    program, *arguments = command(r"HEALTHCHECK .* CMD")
    assert program == "python"

    def status(port: int | None) -> int:
        given = [argument.replace(":8000/", f":{port}/") for argument in arguments]
        assert given != arguments
        return subprocess.run([sys.executable, *given], stderr=subprocess.DEVNULL).returncode

    assert status(client.base_url.port) == 0
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    assert status(port) == 1
