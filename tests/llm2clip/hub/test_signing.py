"""`llm2clip build --signed` and `llm2clip verify --public-key`: whose model it is, with nothing added."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from llm2clip import cli
from llm2clip.hub import build
from llm2clip.hub.signing import load_signer, sign_folder
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_SIGNATURE
from tests.damage import flip
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import LoopbackHub

pytest.importorskip("model_signing", reason="the extra `signing` is not installed: pip install -e '.[test]'")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def write_keys(folder: Path, key: Any) -> tuple[Path, Path]:
    """Write a private key and its public key."""
    folder.mkdir()
    private, public = folder / "key.pem", folder / "key.pub"
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, pkcs8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def signed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A signed model and the public key of its author."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = write_keys(folder / "keys", ec.generate_private_key(ec.SECP256R1()))
    shutil.copytree(built, folder / "model")
    sign_folder(folder / "model", load_signer(private))
    return folder / "model", public


@pytest.fixture
def model(signed: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed[0], tmp_path / "model"))


def verified(folder: Path, public: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `llm2clip verify` prints of a folder that it finds right."""
    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--public-key", str(public)]) == 0
    return capsys.readouterr().out


def refused(folder: Path, public: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--public-key", str(public)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_signed_model_is_that_of_its_author(
    signed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, public = signed
    assert "num_signatures: 1" in verified(folder, public, capsys)
    _, stranger = write_keys(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))
    assert "does not fit the folder" in refused(folder, stranger, capsys)
    assert cli.main(["verify", str(folder)]) == 0
    assert "is signed; --public-key KEY.pub" in capsys.readouterr().err


def test_the_card_may_change(model: Path, signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (model / "README.md").write_text("---\n---\nOther words")
    (model / "more.png").write_bytes(b"")
    assert "num_signatures: 1" in verified(model, signed[1], capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_llm2clip.py", "config.json", "manifest.json"])
def test_a_change_is_found_although_the_manifests_fit(
    name: str, model: Path, signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever changes a file can write or remove manifests too, but not the signature."""
    (model / ".llm2clip.json").unlink()
    if name != "manifest.json":
        (model / "manifest.json").unlink()
    with flip(model / name, 100):
        assert f"(changed: {name})" in refused(model, signed[1], capsys)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "custom_generate/generate.py"])
def test_a_file_that_transformers_would_load_is_found(
    name: str, model: Path, signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    assert f"Extra files found in model 'model': {name}" in refused(model, signed[1], capsys)


def test_without_or_with_a_damaged_signature_it_is_not_taken_for_signed(
    model: Path, signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (model / ".llm2clip.json").unlink()
    (model / MODEL_SIGNATURE).write_text("{}")
    assert f"{MODEL_SIGNATURE} does not fit" in refused(model, signed[1], capsys)
    (model / MODEL_SIGNATURE).unlink()
    assert "is not signed" in refused(model, signed[1], capsys)


@pytest.mark.parametrize("place", ["beside", "above"])
def test_a_signed_model_does_not_vouch_for_others(
    place: str, built: Path, signed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(signed[0], tmp_path / "all" / "signed")
    assert "num_signatures: 1" in verified(tmp_path / "all", signed[1], capsys)
    other = tmp_path / "all" / "other" if place == "beside" else tmp_path / "all"
    shutil.copytree(built, other, dirs_exist_ok=True)
    assert f"{other} is a model, or has code, that is not signed" in refused(tmp_path / "all", signed[1], capsys)


def test_the_signature_is_pushed_and_fits_what_others_download(
    signed: tuple[Path, Path], hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(hub, signed[0])
    snapshot = Path(snapshot_download(REPO, endpoint=hub.url, token=False, cache_dir=tmp_path / "cache"))
    assert (snapshot / "model.safetensors").is_symlink()
    assert "num_signatures: 1" in verified(snapshot, signed[1], capsys)


def test_a_model_without_signature_takes_that_of_an_earlier_push_away(
    built: Path, signed: tuple[Path, Path], hub: LoopbackHub
) -> None:
    upload(hub, signed[0])
    assert MODEL_SIGNATURE in hub.repo(REPO).files()
    upload(hub, built)
    assert MODEL_SIGNATURE not in hub.repo(REPO).files()


def test_the_command_of_model_signing_reads_the_signature(signed: tuple[Path, Path]) -> None:
    folder, public = signed
    options = ["--signature", str(folder / MODEL_SIGNATURE), "--public_key", str(public)]
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("kind", ["missing", "no key", "another kind of key"])
def test_what_is_no_key_is_refused(
    kind: str, built: Path, signed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    if kind == "no key":
        private.write_text("no key")
        public.write_text("no key")
    elif kind == "another kind of key":
        private, public = write_keys(tmp_path / "keys", ed25519.Ed25519PrivateKey.generate())
    command = ["build", str(built), str(tmp_path / "out"), "--signed", "--signing-key", str(private)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert f"{private} is no private key to sign with" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert f"{public} is no public key" in refused(signed[0], public, capsys)


def test_without_a_key_sigstore_signs_and_is_needed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    (model / MODEL_SIGNATURE).unlink()
    with pytest.raises(ValueError, match=r"is not signed \(.*: without --signing-key KEY.pem, this needs a network"):
        sign_folder(model, load_signer(None))
    assert not (model / MODEL_SIGNATURE).exists()
    assert cli.main(["build", str(model), str(model.with_name("out")), "--signing-key", "key.pem"]) == 2
    assert "signing_key requires --signed" in capsys.readouterr().err


@pytest.mark.slow
def test_build_signs_a_folder_with_all_its_files(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = write_keys(tmp_path / "keys", ec.generate_private_key(ec.SECP384R1()))
    settings = {"signed": True, "signing_key": str(private), "example_image": str(built / "example.png")}
    build.build_folder(built, tmp_path / "model", **settings)
    assert "num_signatures: 1" in verified(tmp_path / "model", public, capsys)
    listed = read_json(tmp_path / "model" / FOLDER_MANIFEST)["files"]
    assert MODEL_SIGNATURE in listed
