"""Tiny models of images and texts of other libraries, saved as their repositories are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    Siglip2Processor,
    SiglipImageProcessorPil,
    SiglipProcessor,
)

from llm2clip.data import decode_image

SIZE, PATCH, LENGTH = 28, 7, 12
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = ["a Small dog", "", "two children play football in a green park behind the old station", "a red bus"]
# A colour image, one with alpha, and a grey one, of different shapes.
IMAGES = [
    Image.effect_noise((40, 30), 80).convert("RGB"),
    Image.effect_noise((28, 28), 60).convert("L"),
    Image.merge("RGBA", [Image.effect_noise((33, 51), 90)] * 4),
]


def tokenizer(with_mask: bool, **fields: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-cased bytes with start and end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<unk>", *letters, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"] if with_mask else ["input_ids"],
        **fields,
    )


def stacked(encoder: Any, images: list[Any]) -> dict[str, torch.Tensor]:
    """A batch of images as an encoder prepares them."""
    inputs = [encoder.prepare(decode_image(image), "image") for image in images]
    return {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}


def save_transformers(model_type: str, folder: Path) -> Any:
    """Save a random `clip`, `siglip`, `siglip2` or `chinese_clip` with its processor; return the model."""
    return save(lambda: _build(model_type), folder)


def save(build: Callable[[], tuple[Any, Any]], folder: Path) -> Any:
    """Save a random model with its processor; return the model."""
    torch.manual_seed(0)
    model, processor = build()
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def _build(model_type: str) -> tuple[Any, Any]:
    text = {**TOWER, "vocab_size": 260, "max_position_embeddings": LENGTH, "bos_token_id": 258, "eos_token_id": 259}
    vision, fields, square = {**TOWER, "image_size": SIZE, "patch_size": PATCH}, {}, {"height": SIZE, "width": SIZE}
    processor: Any
    if model_type == "siglip":
        text["projection_size"] = TOWER["hidden_size"]
        processor = SiglipProcessor(SiglipImageProcessorPil(size=square), tokenizer(False, model_max_length=LENGTH))
    elif model_type == "siglip2":
        text["projection_size"], vision["num_patches"] = TOWER["hidden_size"], 16
        # A tokenizer without a length, as that of the published models.
        pixels = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)
        processor = Siglip2Processor(pixels, tokenizer(False))
    else:
        text["pad_token_id"], fields["projection_dim"] = 0 if model_type == "chinese_clip" else 1, 24
        pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
        processor = CLIPProcessor(pixels, tokenizer(True, model_max_length=LENGTH))
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **fields)
    return AutoModel.from_config(config), processor


def register_open_clip(folder: Path, name: str = "tiny-open-clip", **vision: Any) -> tuple[str, Path]:
    """Register a tiny architecture with open_clip, and save random weights; return its name and their file."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": PATCH, "head_width": 16, **vision},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.2)
    path = folder / f"{name}.pt"
    torch.save(model.state_dict(), path)
    return name, path
