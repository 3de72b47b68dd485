"""Folders of ONNX graphs as other programs read them: Immich's machine-learning server, and transformers.js."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm2clip.data.transforms import output_size
from llm2clip.encoders.query_encoder import QueryEncoder
from llm2clip.files.atomic import write_json
from llm2clip.hub.onnx_graphs import Graph, PaddedText, TextGraph
from llm2clip.hub.onnx_writing import Dtype
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

logger = logging.getLogger(__name__)

Layout = Literal["plain", "immich", "transformers.js"]
# Files of the graphs, without their ending.
FILES: dict[Layout, dict[str, str]] = {
    "plain": {"vision": "vision_model", "text": "text_model"},
    "immich": {"vision": "visual/model", "text": "textual/model"},
    "transformers.js": {"vision": "onnx/vision_model", "text": "onnx/text_model"},
}
# What transformers.js puts behind the name of a graph for the dtype that it is asked for: fp32, fp16, q8.
SUFFIXES: dict[Dtype, str] = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
# A graph in float32 of which only one in int8 is kept.
TEMPORARY = "float32.onnx"
# Tokens of a text in Immich unless the text encoder reads fewer: those of CLIP.
CONTEXT_LENGTH = 77
# Widths of the models that Immich knows, for which its database has columns.
IMMICH_WIDTHS = (512, 640, 768, 1024, 1152, 1536)
# Immich's server gives no mask, and the padding of some tokenizers is their end of text, or an unknown word.
IMMICH_PADDING = "<|immich_padding|>"
# What the normalizer Nmt removes, and what it makes a space; as two patterns that Rust and JavaScript read alike.
REMOVED = (*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)
MADE_SPACES = (0x09, 0x0A, 0x0C, 0x0D, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD)
NMT = [
    {"type": "Replace", "pattern": {"Regex": f"[{''.join(map(chr, characters))}]"}, "content": content}
    for characters, content in ((REMOVED, ""), (MADE_SPACES, " "))
]
# Steps of a tokenizer for which transformers.js has no code.
NOT_IN_JAVASCRIPT = {"normalizer": ("ByteLevel",), "pre_tokenizer": ("CharDelimiterSplit", "UnicodeScripts")}
# Steps of an image processor that are not known to other programs.
UNKNOWN_STEPS = ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_image_splitting")


class TextSide:
    """The graph of texts in a layout, and its tokenizer.

    Args:
        model: The model or its query encoder.
        tokenizer: Its tokenizer.
        zeros: See [`Graph`].

    Attributes:
        length: Largest number of tokens.
    """

    def __init__(self, model: LLM2CLIPModel | QueryEncoder, tokenizer: Any, layout: Layout, zeros: int) -> None:
        is_static = isinstance(model, QueryEncoder) and model.is_static
        self.tokenizer, self.length = plain_tokenizer(tokenizer, not is_static), tokenizer.model_max_length
        graph = TextGraph(model)
        self.graph: Graph = graph
        if layout == "immich":
            self.length = min(CONTEXT_LENGTH, self.length)
            replacement = self.tokenizer.pad_token_id
            self.tokenizer.add_special_tokens({"pad_token": IMMICH_PADDING})
            self.tokenizer.padding_side = "right"
            self.graph = PaddedText(graph, self.length, self.tokenizer.pad_token_id, replacement, zeros)


def graph_files(folder: Path, layout: Layout, part: str, dtype: Dtype) -> dict[Dtype, Path]:
    """Return the files of a graph in a layout; int8 is made of float32, and transformers.js has that beside others."""
    path = folder / f"{FILES[layout][part]}.onnx"
    if layout == "transformers.js":
        return {name: path.with_stem(path.stem + SUFFIXES[name]) for name in dict.fromkeys(("float32", dtype))}
    return {**({"float32": path.with_name(TEMPORARY)} if dtype == "int8" else {}), dtype: path}


def plain_tokenizer(tokenizer: Any, adds_special_tokens: bool) -> PreTrainedTokenizerFast:
    """Copy a tokenizer without what ties it to a class: all that it does is in its `tokenizer.json`.

    Args:
        adds_special_tokens: Whether texts get what the tokenizer puts around them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None, "normalizer": _without_nmt(state["normalizer"])}
    state["post_processor"] = _spelled_out(state["post_processor"]) if adds_special_tokens else None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )


def _without_nmt(normalizer: Any) -> Any:
    """Write the step Nmt, which transformers.js does not know, as two that it knows."""
    if normalizer is None or normalizer["type"] not in ("Nmt", "Sequence"):
        return normalizer
    steps = normalizer.get("normalizers", [normalizer])
    known = [part for step in steps for part in (NMT if step["type"] == "Nmt" else [_without_nmt(step)])]
    return {"type": "Sequence", "normalizers": known}


def require_known_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `ValueError` if transformers.js cannot open a tokenizer."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for part, unknown in NOT_IN_JAVASCRIPT.items():
        steps = [state[part]] if state[part] is not None else []
        for step in steps:
            steps += step.get("normalizers", step.get("pretokenizers", []))
            if step["type"] in unknown:
                raise ValueError(
                    f"transformers.js has no {part} {step['type']}, which the tokenizer of this model uses; make a "
                    "query encoder of another text encoder (llm2clip distill-text), or export --parts vision."
                )


def _spelled_out(post_processor: Any) -> Any:
    """Name each token of a template, since transformers.js knows no pieces of several tokens, such as a prompt."""
    if (post_processor or {}).get("type") != "TemplateProcessing":
        return post_processor
    pieces, single = post_processor["special_tokens"], []
    for item in post_processor["single"]:
        piece = item.get("SpecialToken")
        names = [] if piece is None else pieces[piece["id"]]["tokens"]
        single += [{"SpecialToken": {**piece, "id": name}} for name in names] or [item]
    tokens = {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for piece in pieces.values()
        for name, number in zip(piece["tokens"], piece["ids"], strict=True)
    }
    return {**post_processor, "single": single, "special_tokens": {**pieces, **tokens}}


def image_steps(image_processor: Any) -> dict[str, Any]:
    """Return the settings of the CLIPImageProcessor that does what an image processor does.

    Raises:
        ValueError: It does something else than to resize, to crop the middle and to normalise.
    """
    settings = image_processor.to_dict()
    size = {side: length for side, length in dict(settings.get("size") or {}).items() if length is not None}
    crops = bool(settings.get("do_center_crop"))
    others = [name for name in UNKNOWN_STEPS if settings.get(name)]
    is_known = set(size) == ({"shortest_edge"} if crops else {"height", "width"})
    if not settings.get("do_resize") or not is_known or others:
        raise ValueError(
            f"a {type(image_processor).__name__} with do_resize {settings.get('do_resize')}, size {size}, "
            f"do_center_crop {crops}{''.join(f', {name}' for name in others)} does what the program that reads this "
            "layout does not."
        )
    height, width = output_size(image_processor)
    mean, std = _statistics(settings)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": int(settings["resample"]),
        "do_center_crop": crops,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _statistics(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by which an image processor normalises pixels of 0 to 1."""
    normalises = settings.get("do_normalize")
    mean, std = (
        settings[name] if normalises else value for name, value in (("image_mean", [0.0]), ("image_std", [1.0]))
    )
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 255
    return [value / scale for value in mean], [value / scale for value in std]


def immich_preprocessing(image_processor: Any) -> dict[str, Any]:
    """Return Immich's `preprocess_cfg.json`; what its server does in another way than the image processor is logged.

    Raises:
        ValueError: Images are not square, or see [`image_steps`].
    """
    steps = image_steps(image_processor)
    height, width = steps["crop_size"].values()
    shortest_edge, resampling = steps["size"].get("shortest_edge"), Image.Resampling(steps["resample"])
    if height != width:
        raise ValueError(f"the images of this model have {height} x {width} pixels; those in Immich are square.")
    if shortest_edge not in (None, height):
        logger.warning(
            "the image processor makes the shorter side %d pixels long before it crops the middle %d; Immich makes it "
            "%d, so that the model sees more of the image.",
            *(shortest_edge, height, height),
        )
    if shortest_edge is None or resampling is not Image.Resampling.BICUBIC:
        logger.warning(
            "Immich's server reads resize_mode and interpolation only in recent versions; others resize the shorter "
            "side with bicubic, and crop the middle."
        )
    return {
        "size": [height, width],
        "mode": "RGB",
        "mean": steps["image_mean"],
        "std": steps["image_std"],
        "interpolation": resampling.name.lower(),
        "resize_mode": "squash" if shortest_edge is None else "shortest",
        "fill_color": 0,
    }


def immich_width(width: int) -> int:
    """Return the width of vectors in Immich; a `ValueError` says that they are too wide."""
    wide_enough = [known for known in IMMICH_WIDTHS if known >= width]
    if not wide_enough:
        raise ValueError(f"the vectors of this model have {width} values, and those in Immich at most 1536.")
    return wide_enough[0]


def write_immich(folder: Path, text: TextSide, image_processor: Any, width: int) -> None:
    """Write what Immich's server reads beside the graphs, whose rows have `width` values."""
    preprocessing = immich_preprocessing(image_processor)
    text.tokenizer.save_pretrained(folder / "textual")
    make_readable_by_version_4(folder / "textual")
    (folder / "visual").mkdir()
    write_json(folder / "visual" / "preprocess_cfg.json", preprocessing)
    vision = {"image_size": preprocessing["size"][0]}
    texts = {"context_length": text.length, "vocab_size": len(text.tokenizer)}
    write_json(folder / "config.json", {"embed_dim": width, "vision_cfg": vision, "text_cfg": texts})


def write_transformers_js(folder: Path, text: TextSide | None, image_processor: Any, width: int) -> None:
    """Write what transformers.js reads beside the graphs.

    Its classes `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` take any graph.
    """
    (folder / "onnx").mkdir()
    config: dict[str, Any] = {"model_type": "clip", "projection_dim": width}
    if text is not None:
        require_known_steps(text.tokenizer)
        text.tokenizer.save_pretrained(folder)
        make_readable_by_version_4(folder)
        config["text_config"] = {"model_type": "clip_text_model", "max_position_embeddings": text.length}
    if image_processor is not None:
        steps = image_steps(image_processor)
        write_json(folder / "preprocessor_config.json", steps)
        config["vision_config"] = {"model_type": "clip_vision_model", "image_size": steps["crop_size"]["height"]}
    write_json(folder / "config.json", config)
