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

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install -e '.[test]'")
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


@pytest.fixture(scope="module")
def home(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys and a signed model."""
    home = tmp_path_factory.mktemp("signed")
    write_keys(home)
    shutil.copytree(built, home / "Llama-my-model")
    assert documented("sign", home) == 0
    return home


@pytest.fixture
def download(home: Path, hub: LoopbackHub, tmp_path: Path) -> Path:
    """What others get after a push, with the public key beside it."""
    upload(hub, home / "Llama-my-model", repo_id=REPO)
    shutil.copy(home / "key.pub", tmp_path)
    snapshot_download(REPO, endpoint=hub.url, token=False, local_dir=tmp_path / "download")
    return tmp_path / "download"


def test_a_pushed_model_is_that_of_its_author(download: Path) -> None:
    assert documented("verify", download.parent) == 0
    for name in ("model.safetensors", "modeling_llm2clip.py", "config.json", "manifest.json"):
        with flip(download / name, 100):
            assert documented("verify", download.parent) != 0, name
    (download / "adapter_config.json").write_text("{}")
    assert documented("verify", download.parent) != 0
    (download / "adapter_config.json").unlink()
    (download / "README.md").write_text("Other words")
    assert documented("verify", download.parent) == 0
    write_keys(download.parent)
    assert documented("verify", download.parent) != 0
