"""Signatures of model folders, in the OpenSSF format of sigstore's model-signing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm2clip.hub.upload_files import PICTURES
from llm2clip.utils.manifests import EDITED, FOLDER_MANIFEST, MODEL_SIGNATURE

# What model-signing raises for a file that is missing, or holds no key, one with a password, or one of another kind.
NO_KEY = (OSError, TypeError, ValueError, AttributeError)
# Its message about a file has the bytes of two digests.
MISMATCH = re.compile(r"Hash mismatch for \\?'(.+?)\\?':")


def load_signer(private_key: str | Path | None) -> Any:
    """Return what [`sign_folder`] signs with.

    Args:
        private_key: An elliptic-curve key in a PEM file without a password. None signs with the identity of whoever
            logs in at sigstore, which needs a network and a browser.

    Raises:
        ImportError: The extra `signing` is not installed.
        ValueError: There is no such key.
    """
    config = _library().signing.Config()
    if private_key is None:
        return config
    try:
        return config.use_elliptic_key_signer(private_key=private_key)
    except NO_KEY as error:
        raise ValueError(
            f"{private_key} is no private key to sign with ({_first_line(error)}): it has to be an elliptic-curve key "
            "without a password, as `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from error


def sign_folder(folder: Path, signer: Any) -> None:
    """Sign everything that loading a model folder can read, and write the signature to `model.sig` in it.

    The card, its pictures and the license are left out: people edit them.

    Args:
        folder: A model folder that is complete.
        signer: That of [`load_signer`].

    Raises:
        ValueError: The signature could not be made, as when sigstore cannot be reached.
    """
    try:
        signer.set_hashing_config(_hashed(folder)).sign(folder, folder / MODEL_SIGNATURE)
    except Exception as error:  # sigstore has an exception for each of its services
        raise ValueError(
            f"{folder} is not signed ({_first_line(error)}): without --signing-key KEY.pem, this needs a network and "
            "a browser, to log in at sigstore."
        ) from error


def signature_fault(folder: Path, public_key: Path) -> str | None:
    """Compare a signed folder with its signature; return what is wrong, in words, or None.

    Raises:
        ImportError: The extra `signing` is not installed.
        ValueError: There is no such key.
    """
    verifying = _library().verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except NO_KEY as error:
        raise ValueError(
            f"{public_key} is no public key ({_first_line(error)}); `openssl ec -in key.pem -pubout -out key.pub` "
            "writes that of a private key."
        ) from error
    try:
        config.set_hashing_config(_hashed(folder)).verify(folder, folder / MODEL_SIGNATURE)
    except Exception as error:  # a damaged signature fails anywhere in its parsers
        changed = MISMATCH.findall(str(error))
        reason = f"changed: {', '.join(changed)}" if changed else _first_line(error)
        return f"{MODEL_SIGNATURE} does not fit the folder and {public_key} ({reason})"
    return None


def _hashed(folder: Path) -> Any:
    """What is signed: all but hidden files and those that people edit; behind links too, as in the Hub's cache."""
    pictures = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURES]
    hidden = [path.relative_to(folder) for path in folder.glob(".*")]
    config = _library().hashing.Config().set_allow_symlinks(True)
    return config.set_ignored_paths(paths=[*EDITED, FOLDER_MANIFEST, MODEL_SIGNATURE, *pictures, *hidden])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ImportError(f"signatures need model-signing ({error}): pip install 'llm2clip[signing]'.") from error
    return model_signing
