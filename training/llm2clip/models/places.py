"""Where a model may be, checked before the libraries that load it are imported, which takes many seconds."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

# OWNER/NAME, or the name alone of the oldest models there.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
OPEN_CLIP = "open_clip:"
ModelDtype = Literal["float32", "bfloat16", "float16", "auto"]
DTYPE = "Data type that the model computes in; auto: that of its files, but float32 in place of float16 on a CPU."


def is_repo(name: str) -> bool:
    """Tell whether a model is a folder or a repository of the Hub, and neither of open_clip nor `PATH.py:FUNCTION`."""
    return not name.startswith(OPEN_CLIP) and not name.rpartition(":")[0].endswith(".py")


def model_name(name: str) -> str:
    """Return a model's name for strangers, without the folders that it is in."""
    if Path(name).exists() or ".py:" in name:
        return Path(name).absolute().name
    return name.partition("//")[0]  # a checkpoint of open_clip has its path there


def require_model_place(name: str) -> None:
    """Check that a model can exist; see [`load_encoder`] for its names. The Hub is not asked.

    Raises:
        FileNotFoundError: It is neither a folder, nor may it be a Hub id; or the file of a function does not exist.
    """
    if is_repo(name):
        if Path(name).is_dir():
            return
        if not HUB_ID.fullmatch(name):
            raise FileNotFoundError(f"there is no model {name}: no such folder exists, and a Hub id is OWNER/NAME.")
        if "/" in name and Path(name).parent.is_dir():
            logger.warning("there is no folder %s; looking for a model of this name on the Hub", name)
    elif not name.startswith(OPEN_CLIP) and not Path(file := name.rpartition(":")[0]).is_file():
        raise FileNotFoundError(f"{name}: the file {file} does not exist.")


def require_recorded_model(index: str, name: str) -> None:
    """Check that the model that made an index can exist still, if it was a local one.

    Raises:
        FileNotFoundError: Its folder, or the file of its function, does not exist.
    """
    path = Path(re.sub(r"(?<=\.py):\w+$", "", name))
    if path.is_absolute() and not path.exists():
        raise FileNotFoundError(
            f"the index {index} was made by the model in {name}, which no longer exists; give its new place: --model "
            "FOLDER"
        )
