"""Write a page that searches pictures in the browser: their vectors, 8 bits a value, captions and thumbnails."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from datasets import load_dataset

from llm2clip import load_encoder, quantize_embeddings

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="data set of the Hub or folder, with a column `image`")
parser.add_argument("--split", default="train")
parser.add_argument("--caption-column", default="caption", help="what is shown below a picture, if there is one")
parser.add_argument("--model", default="runs/quickstart/llm2clip")
parser.add_argument("--output-dir", type=Path, default=Path("site"))
arguments = parser.parse_args()

rows = load_dataset(arguments.data, split=arguments.split)
vectors = load_encoder(arguments.model, needs=["image"]).encode_image(rows["image"][:], show_progress_bar=True)
folder = arguments.output_dir / "index"
folder.mkdir(parents=True, exist_ok=True)
for name in ("index.html", "search.js"):
    shutil.copy(Path(__file__).with_name(name), arguments.output_dir)
quantize_embeddings(vectors, "int8").numpy().tofile(folder / "vectors.bin")
for number, image in enumerate(rows["image"]):
    image = image.convert("RGBA")
    image.thumbnail((160, 160))
    image.save(folder / f"{number}.webp")
captions = rows[arguments.caption_column] if arguments.caption_column in rows.column_names else [""] * len(rows)
index = {"width": vectors.shape[1], "captions": [caption or "" for caption in captions]}
(folder / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
