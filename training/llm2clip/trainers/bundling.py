"""Adding the weights of the LLM to a saved model, on the CPU and after everything else is saved."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4
from modeling_llm2clip.modeling_llm2clip_utils import TEXT_MODEL


def bundle_text_model(folder: Path, dtype: Any = "auto") -> None:
    """Add the LLM that the config of a saved model names to the model's weights.

    The new files are written beside the old ones and renamed, the config last.

    Args:
        dtype: Of the LLM, by default that of its files.

    Raises:
        ValueError: The LLM cannot be loaded or saved; the folder holds the model without it, as before.
    """
    with tempfile.TemporaryDirectory(prefix=".bundling-", dir=folder) as scratch:
        try:
            model = LLM2CLIPModel.from_pretrained(folder, text_model=False)
            model.load_text_model(dtype=dtype)
            model.text_model.merge_adapter()
            model.save_pretrained(scratch, save_text_model=True)
            make_readable_by_version_4(scratch)
        # Errors of any kind, from memory to network: the user has to know what is left.
        except Exception as error:
            raise ValueError(
                f"the LLM cannot be added to the trained model: {error} The model is saved in {folder} without it; "
                f"`llm2clip build {folder} DESTINATION --bundle-text-model true` adds it later."
            ) from error
        files = sorted(Path(scratch).iterdir(), key=lambda path: (path.name == "config.json", path.suffix == ".json"))
        is_sharded = any(path.name == SAFE_WEIGHTS_INDEX_NAME for path in files)
        for path in files:
            if path.name == "config.json" and is_sharded:
                # It would be loaded in place of the shards; until here, a kill leaves the model as it was.
                (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
            path.replace(folder / path.name)
    shutil.rmtree(folder / TEXT_MODEL, ignore_errors=True)
