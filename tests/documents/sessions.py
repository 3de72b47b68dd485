"""A folder with what the Python code of the documents reads, and that code as one session."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from llm2clip import LLM2CLIPModel, main
from tests.documents.reading import blocks
from tests.documents.stand_ins import E5, FILES, FOLDERS, HUB, MODEL

CLIP = "openai/clip-vit-large-patch14-336"
CONVERTED = ("LLM2CLIP-Openai-L-14-336", "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336")
# The first line of a block that is a file: a script that others name, or a recipe with its command.
FILE = re.compile(r"# (?:llm2clip \w+ )?(\w+\.(?:py|yaml))\n")


def prepare(folder: Path) -> None:
    """Put into a folder what the code reads: small models by their names, and data."""
    for name, build in {
        MODEL: FOLDERS[MODEL],
        E5: HUB[E5],
        CLIP: HUB[CLIP],
        "my_photos": FOLDERS["my_photos"],
    }.items():
        (folder / name).mkdir(parents=True)
        build(folder / name)
    for name in CONVERTED:
        (folder / name).symlink_to(MODEL)
    for name in ("examples", "photo.jpg"):
        FILES[name](folder / name)


def prepare_training(folder: Path) -> None:
    """Add what the pages of training read: a text tower, pictures, and the embeddings of their captions."""
    (folder / "my_pictures").mkdir()
    FOLDERS["my_pictures"](folder / "my_pictures")
    model = LLM2CLIPModel.from_pretrained(folder / MODEL)
    tokenizer = AutoProcessor.from_pretrained(folder / MODEL).tokenizer
    tower: Any = model.text_model
    for part in (tower, tokenizer):
        part.save_pretrained(folder / "runs/stage1")
    source = f"{{path: {folder / 'my_pictures'}, split: train, caption_columns: [caption]}}"
    towers, cache = str(folder / "runs/stage1"), str(folder / "runs/cache")
    assert main(["embed", "--text-model-name-or-path", towers, "--output-dir", cache, "--sources", f"[{source}]"]) == 0


def write_files(document: str, folder: Path) -> list[tuple[str, Path]]:
    """Write the blocks of a document that are files; return the first line of each, and where it is."""
    written = []
    for _, content in blocks(document):
        if found := FILE.match(content):
            (folder / found[1]).write_text(content, encoding="utf-8")
            written.append((found[0].strip(), folder / found[1]))
    return written


def run_code(code: str) -> dict[str, Any]:
    """Run code in the working folder, and return its variables."""
    Path("session.py").write_text(code, encoding="utf-8")
    return runpy.run_path("session.py")


@cache
def python_of(document: str) -> str:
    """Return the Python code of a document, one block after the other."""
    return "\n".join(content for language, content in blocks(document) if language == "python")
