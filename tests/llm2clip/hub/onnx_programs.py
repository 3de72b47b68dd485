"""Exported folders, and the programs that they are for, as Python that knows only their files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from llm2clip import Student, attach_query_encoder, cli, load_encoder
from llm2clip.models.identity import space_identity
from modeling_llm2clip import LLM2CLIPModel
from tests import stranger
from tests.builders import embedding_models

CLOSE = {"atol": 1e-3, "rtol": 0}
TEXTS = ["a dog", "Two children  play football\nin a green park", "a red bus, seen from above", "x"]
BEGINNING = """
import json, sys
import numpy, onnxruntime
from pathlib import Path
from PIL import Image
from tokenizers import Tokenizer
folder, pictures, texts = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
"""
END = """
assert "torch" not in sys.modules
print(json.dumps([text, image]))
"""
# What Immich's machine-learning server does, by the files that it reads.
IMMICH = """
config = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
size = config["size"][0] if isinstance(config["size"], list) else config["size"]
kind = Image.Resampling[config["interpolation"].upper()]
mean, std = (numpy.array(config[name], dtype=numpy.float32) for name in ("mean", "std"))

def pixels(path):
    image = Image.open(path).convert("RGB")
    if config["resize_mode"] == "squash":
        image = image.resize((size, size), resample=kind)
    else:
        if image.width < image.height:
            image = image.resize((size, int((image.height / image.width) * size)), resample=kind)
        else:
            image = image.resize((int((image.width / image.height) * size), size), resample=kind)
        left, upper = int((image.width / 2) - (size / 2)), int((image.height / 2) - (size / 2))
        image = image.crop((left, upper, left + size, upper + size))
    values = numpy.asarray(image, dtype=numpy.float32) / 255.0
    values *= 1.0 / std
    values -= mean / std
    return values.transpose(2, 0, 1)[None]

length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
padding = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
tokenizer.enable_padding(length=length, pad_token=padding, pad_id=tokenizer.token_to_id(padding))
tokenizer.enable_truncation(max_length=length)
tokens = [tokenizer.encode(" ".join(text.split())).ids for text in texts]
session = onnxruntime.InferenceSession(str(folder / "textual" / "model.onnx"))
text = [session.run(None, {"text": numpy.array([ids], dtype=numpy.int32)})[0][0].tolist() for ids in tokens]
session = onnxruntime.InferenceSession(str(folder / "visual" / "model.onnx"))
image = [session.run(None, {"image": pixels(path)})[0][0].tolist() for path in pictures]
"""
# What transformers.js does, by the files that it reads, with Pillow's resizing.
TRANSFORMERS_JS = """
config = json.loads((folder / "preprocessor_config.json").read_text())
assert config["image_processor_type"] == "CLIPImageProcessor" and config["do_resize"] and config["do_rescale"]
crop = config["crop_size"]

def pixels(path):
    image = Image.open(path).convert("RGB")
    shorter = config["size"].get("shortest_edge")
    if shorter is None:
        image = image.resize((config["size"]["width"], config["size"]["height"]), config["resample"])
    else:
        image = image.resize([int(side / min(image.size) * shorter) for side in image.size], config["resample"])
    if config["do_center_crop"]:
        left, upper = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, upper, left + crop["width"], upper + crop["height"]))
    values = numpy.asarray(image, dtype=numpy.float32) * numpy.float32(config["rescale_factor"])
    values = (values - numpy.float32(config["image_mean"])) / numpy.float32(config["image_std"])
    return values.transpose(2, 0, 1)[None]

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"])
session = onnxruntime.InferenceSession(str(folder / "onnx" / "text_model.onnx"))
text = []
for line in texts:
    tokens = tokenizer.encode(line.strip())
    feed = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask}
    text.append(session.run(["text_embeds"], {name: numpy.array([row]) for name, row in feed.items()})[0][0].tolist())
session = onnxruntime.InferenceSession(str(folder / "onnx" / "vision_model.onnx"))
image = [session.run(["image_embeds"], {"pixel_values": pixels(path)})[0][0].tolist() for path in pictures]
"""
READERS = {"immich": IMMICH, "transformers.js": TRANSFORMERS_JS}


def teach(model: Path, spec: str) -> None:
    """Give a model a query encoder with a random head."""
    torch.manual_seed(1)
    if spec in embedding_models.FAMILIES:
        embedding_models.save(model.parent / spec, spec)
        spec = str(model.parent / spec)
    space = space_identity(LLM2CLIPModel.from_pretrained(model, text_model=False))
    Student.create(spec, 24, lambda: load_encoder(str(model)), space=space).save_pretrained(model.parent / "student")
    attach_query_encoder(model.parent / "student", model)


def export(model: Path, layout: str, *options: str) -> Path:
    """Export a model into a folder beside it."""
    folder = model.parent / layout
    assert cli.main(["export-onnx", str(model), "--layout", layout, "--output-dir", str(folder), *options]) == 0
    return folder


def read(layout: str, folder: Path, pictures: list[str], texts: list[str]) -> list[Tensor]:
    """The embeddings that a program makes of texts and pictures, without torch."""
    code, arguments = BEGINNING + READERS[layout] + END, (folder, json.dumps(pictures), json.dumps(texts))
    embeds = list(map(torch.tensor, stranger.answer(code, *arguments, home=folder.parent, is_forked=False)))
    if layout == "immich":  # which knows no model of this width
        assert all(rows.shape[1] == 512 and not rows[:, 24:].any() for rows in embeds)
    return [rows[:, :24] for rows in embeds]
