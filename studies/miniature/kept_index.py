"""Other queries for an index whose image vectors stay: `llm2clip index`, and `llm2clip align --keep-images` on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from llm2clip import cli, load_encoder
from llm2clip.encoders.mapped_text import MappedTextEncoder
from llm2clip.trainers.image_vectors import ImageVectors
from studies.miniature.material import Material, slug

TRAIN = "drawings-train"


def query_encoder(material: Material, model: Path, text: str, kind: str, count: int, seed: int) -> MappedTextEncoder:
    """Fit a text encoder to the image vectors of a model, and open it together with that model.

    Args:
        model: The folder of the model, which embeds the training drawings once.
        text: Name of the text encoder.
        kind: `pairs`: captions of indexed drawings and the vectors of these. `texts`: captions alone, as the text
            side of the model embeds them.
        count: How many captions; which ones, the seed draws.

    Raises:
        RuntimeError: A command ended with an error.
    """
    index = material.made(material.folder / "indexes" / model.name, lambda path: _index(material, model, path))
    keys, captions = ImageVectors.open(index).captions or ([], [])
    drawn = random.Random(seed).sample(range(len(captions)), count)

    def fit(folder: Path) -> None:
        source = material.folder / "recipes" / f"{folder.name}.{'jsonl' if kind == 'pairs' else 'txt'}"
        recipe = {"keep_images": str(index), "text_model": str(material.text_encoder(text)), "output_dir": str(folder)}
        if kind == "pairs":
            lines = [json.dumps({"key": keys[number], "caption": captions[number]}) for number in drawn]
            recipe["pairs"] = str(source)
        else:
            lines = [captions[number] for number in drawn]
            recipe |= {"texts": str(source), "old_text_model": str(model)}
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        material.command("align", folder.name, recipe)

    name = f"queries-{slug(text)}-{kind}-{count}-{model.name}"
    queries = load_encoder(str(material.made(material.folder / "models" / name, fit)))
    assert isinstance(queries, MappedTextEncoder)
    queries.use_images(load_encoder(str(model), needs=["image"]))
    return queries


def _index(material: Material, model: Path, folder: Path) -> None:
    options = ["--model", str(model), "--output-dir", str(folder)]
    if status := cli.main(["index", str(material.data(TRAIN)), *options]):
        raise RuntimeError(f"llm2clip index ended with status {status}.")
