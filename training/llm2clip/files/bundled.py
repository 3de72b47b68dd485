"""Where the bundled drawings and glosses are: in a checkout or source archive, since a wheel is under one licence."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A Space has the test images inside the package, a checkout all of them beside `training/`.
_PLACES = (_PACKAGE / "example_data", _PACKAGE.parents[1] / "examples" / "data")


def bundled_data(name: str, instead: str) -> Path:
    """Return a folder or file of the bundled data.

    Args:
        name: `concepts`, `glosses`, or a file such as `concepts/test.parquet`.
        instead: What the caller can be given in its place, such as "give --data a folder or Hub id".

    Raises:
        FileNotFoundError: The package is installed from a wheel, which has no bundled data.
    """
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(
        f"the bundled data ({name}) is not in a wheel: install from a checkout (pip install -e .), or {instead}."
    )
