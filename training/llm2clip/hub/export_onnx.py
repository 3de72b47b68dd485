"""`llm2clip export-onnx`: export both halves of a model as ONNX graphs and compare them with torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer

from llm2clip.command_line.settings import refuse, setting
from llm2clip.data.transforms import output_size
from llm2clip.encoders.query_encoder import TextEncoder, has_query_encoder, query_encoder_of
from llm2clip.files.folders import atomic_folder, refuse_existing
from llm2clip.files.manifests import refuse_damaged
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.hub.licenses import bases_of, choose_license, folder_of_card
from llm2clip.hub.onnx_graphs import Graph, VisionGraph
from llm2clip.hub.onnx_layouts import (
    TEMPORARY,
    Layout,
    TextSide,
    graph_files,
    immich_width,
    write_immich,
    write_transformers_js,
)
from llm2clip.hub.onnx_writing import Dtype, write_graph
from llm2clip.models.attention_probe import probe_text_tower
from llm2clip.models.repos import RepoKind, inspect_repo
from modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPVisionModelWithProjection,
)

logger = logging.getLogger(__name__)

COMMAND = "export-onnx"
PARTS = ("vision", "text")


@dataclass
class ExportOnnxConfig:
    """Settings of `llm2clip export-onnx`."""

    model: str = setting("", "LLM2CLIP model or vision half of one to export: folder or Hub id.")
    output_dir: str | None = setting(
        None, "Folder to write. Default: `onnx` in the model's folder; a --layout needs one."
    )
    layout: Layout = setting(
        "plain",
        "Files around the graphs: those that Immich's machine-learning server reads (immich), or transformers.js in "
        "node and browsers; plain: the graphs alone.",
    )
    parts: list[str] | None = setting(None, "Graphs to export: vision, text or both. Default: all that the model has.")
    text_encoder: TextEncoder = setting(
        "auto",
        "What embeds texts: the LLM, or the query encoder in query_encoder/ of the model. auto: the query encoder "
        "where there is one.",
    )
    dtype: Dtype = setting(
        "float32",
        "Precision of the weights. float16 halves the files; int8 makes them a quarter, and multiplies in 8 bits. In "
        "the layout transformers.js the graphs in float32 are there too.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    overwrite: bool = setting(
        False, "Replace an output folder that an earlier export wrote and that holds nothing else."
    )

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts or () if part not in PARTS]
        if unknown or self.parts == []:
            raise ValueError(f"parts is {self.parts}; choose vision, text or both.")
        if self.layout == "immich" and self.parts is not None and set(self.parts) != set(PARTS):
            raise ValueError(f"parts is {self.parts}, but Immich needs both graphs: leave it out.")


def run(config: ExportOnnxConfig) -> dict[str, Any]:
    """Write the graphs of a model, and the files that the layout has beside them.

    Returns:
        `written`, the output folder; for each graph the largest difference from torch, over batches whose size and
        length differ from those of the trace, of int8 the mean cosine.

    Raises:
        FileExistsError: The output folder exists and `overwrite` is off.
        ValueError: The model cannot be exported, the layout cannot hold it, its license is not one that the models
            that it was made from allow, or a graph differs from torch. Nothing is written then.
    """
    if not config.model:
        raise ValueError("give a model: llm2clip export-onnx MODEL")
    if config.output_dir is None and config.layout != "plain":
        raise ValueError(f"the layout {config.layout} has a folder of its own; name it: --output-dir FOLDER")
    if config.output_dir is None and not Path(config.model).is_dir():
        raise ValueError(f"{config.model} is not a folder; give a folder to write: --output-dir FOLDER")
    destination = Path(config.output_dir or Path(config.model) / "onnx")
    refuse_existing(destination, COMMAND, config.overwrite)
    for library in ("onnxruntime", "onnxscript"):
        import_module(library)  # rather missing now than after the model is read
    refuse_damaged(config.model)
    repo = inspect_repo(config.model, config.revision).require(RepoKind.JOINT, RepoKind.VISION_HALF)
    available = PARTS[:1] if repo.kind is RepoKind.VISION_HALF or repo.encoders else PARTS
    needed = PARTS if config.layout == "immich" else config.parts or ()
    if not set(needed) <= set(available):
        kind = "a model that takes llm_embeds alone" if repo.encoders else repo.kind.with_article
        raise ValueError(f"{config.model} is {kind} and has no text graph.")
    parts = [part for part in available if config.parts is None or part in config.parts]
    if "text" not in parts:
        refuse(config, ["text_encoder"], "no text graph is written")
    text_encoder = None if "text" not in parts else config.text_encoder
    if text_encoder == "auto":
        text_encoder = "query" if has_query_encoder(config.model, config.revision) else "llm"
        logger.info("texts are embedded by the %s.", "query encoder" if text_encoder == "query" else "LLM")
    # In the model's own folder, its license is beside the graphs.
    is_apart = not destination.resolve().is_relative_to(Path(config.model).resolve())
    source = folder_of_card(config.model, config.revision) if is_apart else None
    license = choose_license({}, read_card(source)[0], bases_of(source), str(source / CARD)) if source else None
    model = _load(config, text_encoder)
    with atomic_folder(destination, COMMAND, config.overwrite) as folder:
        result = _write_folder(folder, config, model, parts, text_encoder)
        if license and source:
            license.write_files(folder, source)
    return {**result, "written": str(destination)}


def _load(config: ExportOnnxConfig, text_encoder: TextEncoder | None) -> Any:
    options: dict[str, Any] = {"revision": config.revision, "dtype": torch.float32}
    if text_encoder is None:
        return LLM2CLIPVisionModelWithProjection.from_pretrained(config.model, **options).eval()
    if text_encoder == "query":
        return LLM2CLIPModel.from_pretrained(config.model, text_model=False, **options).eval()
    try:
        model = LLM2CLIPModel.from_pretrained(config.model, **options).eval()
    except OSError as error:
        raise OSError(f"{error}\n--parts vision exports the vision graph without the LLM.") from error
    probe_text_tower(model.text_model)
    model.text_model.merge_adapter()
    return model


def _write_folder(
    folder: Path, config: ExportOnnxConfig, model: Any, parts: list[str], text_encoder: TextEncoder | None
) -> dict[str, Any]:
    """Write graphs and files into a new folder; see [`run`] for the result."""
    layout, width = config.layout, model.config.projection_dim
    zeros = immich_width(width) - width if layout == "immich" else 0
    graphs: dict[str, Graph] = {}
    image_processor = text = None
    if "vision" in parts:
        image_processor = _image_processor(config)
        name = "image" if layout == "immich" else "pixel_values"
        graphs["vision"] = VisionGraph(model, _image_size(model, image_processor), name, zeros)
    if text_encoder is not None:
        query = query_encoder_of(model).float() if text_encoder == "query" else None
        tokenizer = query.tokenizer if query else AutoTokenizer.from_pretrained(config.model, revision=config.revision)
        if not query and model.config.text_config.decoder_config.model_type == "clip_text_model":
            raise ValueError(
                f"{config.model} has the text half of a CLIP, of which torch makes no graph for any number of texts; "
                "make a query encoder (llm2clip distill-text), or export --parts vision."
            )
        text = TextSide(query or model, tokenizer, layout, zeros)
        graphs["text"] = text.graph
    # What a layout cannot hold is refused here, before minutes of tracing.
    if layout == "immich" and text is not None:
        write_immich(folder, text, image_processor, width + zeros)
    elif layout == "transformers.js":
        write_transformers_js(folder, text, image_processor, width)
    # What turns cosines into logits is not part of the graphs.
    scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
    values = {"logit_scale": None if scale is None else scale.exp(), "logit_bias": bias}
    metadata = {name: repr(value.item()) for name, value in values.items() if value is not None}
    result: dict[str, Any] = {}
    files = {part: graph_files(folder, layout, part, config.dtype) for part in graphs}
    for part, graph in graphs.items():
        measured = write_graph(graph, files[part], metadata)
        result |= {f"{part}_{name}": value for name, value in measured.items()}
    for file in folder.rglob(f"{TEMPORARY}*"):
        file.unlink()
    if layout == "transformers.js" and (large := [file.stem for file in folder.rglob("*.onnx.data")]):
        raise ValueError(
            f"{', '.join(large)} has more than the 2 GB of one file, which this layout cannot hold. For texts, make a "
            "query encoder: llm2clip distill-text."
        )
    return result


def _image_processor(config: ExportOnnxConfig) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(config.model, revision=config.revision)
    except OSError:
        if config.layout != "plain":
            raise
        return None


def _image_size(model: Any, processor: Any) -> tuple[int, int]:
    """Height and width of the image processor's output, or of the tower's images if there is no image processor."""
    tower = model.config.vision_config
    if not hasattr(tower, "image_size"):
        raise ValueError(
            f"a {tower.model_type} reads images of any shape as lists of patches, which cannot be exported; "
            "--parts text exports the text graph."
        )
    if processor is None:
        return tower.image_size, tower.image_size
    return output_size(processor)
