"""The commands of docs/publish.md for sigstore's model-signing: who made a pushed model."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.damage import flip
from tests.documents.reading import commands
from tests.llm2clip.hub.conftest import upload
from tests.loopback_hub import LoopbackHub

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install -e '.[dev]'")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
REPO = "tester/Llama-my-model"


def write_keys(folder: Path) -> None:
    """Write a private key and its public key, as the commands of openssl do."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, public))


def documented(action: str, home: Path) -> int:
    """Run a documented command in a folder; returns its exit status."""
    (command,) = [text for text in commands("docs/publish.md") if f"model_signing {action} key " in text]
    arguments = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(arguments, cwd=home, capture_output=True).returncode


def test_a_pushed_model_is_that_of_its_author(built: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    write_keys(tmp_path)
    signed, download = tmp_path / "Llama-my-model", tmp_path / "download"
    shutil.copytree(built, signed)
    assert documented("sign", tmp_path) == 0
    upload(hub, signed, repo_id=REPO)
    snapshot_download(REPO, endpoint=hub.url, token=False, local_dir=download)
    assert documented("verify", tmp_path) == 0
    for name in ("model.safetensors", "config.json"):
        with flip(download / name, 100):
            assert documented("verify", tmp_path) != 0, name
    (download / "adapter_config.json").write_text("{}")
    assert documented("verify", tmp_path) != 0
    (download / "adapter_config.json").unlink()
    (download / "README.md").write_text("Other words")
    assert documented("verify", tmp_path) == 0
    write_keys(tmp_path)
    assert documented("verify", tmp_path) != 0
