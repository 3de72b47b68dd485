"""HEIC, the format of phones' photos, which Pillow reads with the optional library pillow-heif."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

HEIF_SUFFIXES = (".heic", ".heif", ".hif")


def prepare_heif(path: str | Path) -> None:
    """Let Pillow read a file if its suffix is that of HEIC; other files need nothing.

    Raises:
        DamagedImageError: pillow-heif is not installed; the message has the command that installs it.
    """
    if Path(path).suffix.lower() in HEIF_SUFFIXES and not _registered():
        raise DamagedImageError(str(path), "HEIC needs pillow-heif; install it with: pip install 'llm2clip[search]'")


@cache
def _registered() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
