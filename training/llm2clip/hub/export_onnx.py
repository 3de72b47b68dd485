"""`llm2clip export-onnx`: export both halves of a model as ONNX graphs and compare them with torch."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor

from llm2clip.utils.attention_probe import verify_text_tower
from llm2clip.utils.folders import atomic_folder, refuse_existing
from llm2clip.utils.manifests import refuse_damaged
from llm2clip.utils.repos import RepoKind, inspect_repo
from llm2clip.utils.settings import setting
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection

logger = logging.getLogger(__name__)

COMMAND = "export-onnx"
PARTS = ("vision", "text")
# Allowed difference of an entry of a unit vector from torch in float32.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
# Weights above this size are stored in a second file, because protobuf limits a file to 2 GiB.
LARGEST_FILE = 2**30
BATCH, LENGTH = torch.export.Dim("batch", max=2**15), torch.export.Dim("length", max=2**17)


@dataclass
class ExportOnnxConfig:
    """Settings of `llm2clip export-onnx`."""

    model: str = setting("", "LLM2CLIP model or vision half of one to export: folder or Hub id.")
    output_dir: str | None = setting(None, "Folder to write. Default: `onnx` in the model's folder.")
    parts: list[str] | None = setting(None, "Graphs to export: vision, text or both. Default: all that the model has.")
    dtype: Literal["float32", "float16"] = setting("float32", "Precision of the weights; float16 halves the files.")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    overwrite: bool = setting(
        False, "Replace an output folder that an earlier export wrote and that holds nothing else."
    )

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts or () if part not in PARTS]
        if unknown or self.parts == []:
            raise ValueError(f"parts is {self.parts}; choose vision, text or both.")


def _unit(features: Any) -> Tensor:
    return F.normalize(features.pooler_output.float(), dim=-1)


class VisionGraph(nn.Module):
    """Graph from `pixel_values` `(batch, channels, height, width)` to `image_embeds` `(batch, projection_dim)`.

    The rows are unit vectors; height and width are fixed.
    """

    inputs = {"pixel_values": {0: BATCH}}
    output = "image_embeds"

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPVisionModelWithProjection, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.image_size = model, image_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _unit(self.model.get_image_features(pixel_values.to(self.model.dtype)))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random input with the given batch size."""
        return (torch.randn(batch, self.model.config.vision_config.num_channels, *self.image_size),)


class TextGraph(nn.Module):
    """Graph from `input_ids` and `attention_mask` `(batch, length)` to `text_embeds` `(batch, projection_dim)`.

    The rows are unit vectors. The tokens come from the model's own tokenizer, which adds the prompt.
    """

    inputs = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}
    output = "text_embeds"

    def __init__(self, model: LLM2CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _unit(self.model.get_text_features(input_ids, attention_mask))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random captions of 8 to 8 + `batch` tokens after the prompt prefix, padded on the left."""
        config = self.model.config.text_config
        lengths = config.num_prefix_tokens + 8 + torch.arange(batch)
        positions = torch.arange(int(lengths.max()))
        mask = (positions >= lengths.max() - lengths[:, None]).long()
        return torch.randint(config.decoder_config.vocab_size, mask.shape), mask


def run(config: ExportOnnxConfig) -> dict[str, Any]:
    """Write `vision_model.onnx` and `text_model.onnx`.

    Returns:
        `written`, the output folder, and for each graph the largest difference from torch, over batches whose size
        and length differ from those of the trace.

    Raises:
        FileExistsError: The output folder exists and `overwrite` is off.
        ValueError: The model cannot be exported, or a graph differs from torch. Nothing is written then.
    """
    if not config.model:
        raise ValueError("give a model: llm2clip export-onnx MODEL")
    if config.output_dir is None and not Path(config.model).is_dir():
        raise ValueError(f"{config.model} is not a folder; give a folder to write: --output-dir FOLDER")
    destination = Path(config.output_dir or Path(config.model) / "onnx")
    refuse_existing(destination, COMMAND, config.overwrite)
    for library in ("onnxruntime", "onnxscript"):
        import_module(library)  # rather missing now than after the model is read
    refuse_damaged(config.model)
    repo = inspect_repo(config.model, config.revision).require(RepoKind.JOINT, RepoKind.VISION_HALF)
    available = PARTS[:1] if repo.kind is RepoKind.VISION_HALF else PARTS
    if not set(config.parts or ()) <= set(available):
        raise ValueError(f"{config.model} is a {repo.kind.value} and has no text graph.")
    parts = [part for part in available if config.parts is None or part in config.parts]
    model = _load(config, "text" in parts)
    result: dict[str, Any] = {}
    with atomic_folder(destination, COMMAND, config.overwrite) as folder:
        for part in parts:
            path = folder / f"{part}_model.onnx"
            graph = VisionGraph(model, _image_size(config, model)) if part == "vision" else TextGraph(model)
            logger.info("%s: tracing", path.name)
            result[f"{part}_difference"] = difference = f"{_export(graph, path, config.dtype):.1e}"
            size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
            logger.info("%s: %.0f MB, differs from torch by %s", path.name, size / 1e6, difference)
    return {**result, "written": str(destination)}


def _load(config: ExportOnnxConfig, with_llm: bool) -> Any:
    options: dict[str, Any] = {"revision": config.revision, "dtype": torch.float32}
    if not with_llm:
        return LLM2CLIPVisionModelWithProjection.from_pretrained(config.model, **options).eval()
    try:
        model = LLM2CLIPModel.from_pretrained(config.model, **options).eval()
    except OSError as error:
        raise OSError(f"{error}\n--parts vision exports the vision graph without the LLM.") from error
    verify_text_tower(model.text_model)
    model.text_model.merge_adapter()
    return model


def _image_size(config: ExportOnnxConfig, model: Any) -> tuple[int, int]:
    """Height and width of the image processor's output, or of the tower's images if there is no image processor."""
    tower = model.config.vision_config
    if not hasattr(tower, "image_size"):
        raise ValueError(
            f"a {tower.model_type} reads images of any shape as lists of patches, which cannot be exported; "
            "--parts text exports the text graph."
        )
    try:
        processor: Any = AutoImageProcessor.from_pretrained(config.model, revision=config.revision)
    except OSError:
        return tower.image_size, tower.image_size
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if "height" not in size:
        raise ValueError(f"the image processor of {config.model} has no fixed output size: {dict(size)}.")
    return size["height"], size["width"]


def _export(graph: VisionGraph | TextGraph, path: Path, dtype: str) -> float:
    """Write a graph; returns the largest difference of its output from torch in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        traced, others = graph.example(2), [graph.example(batch) for batch in (1, 5)]
    with torch.inference_mode():
        expected = [graph(*inputs) for inputs in others]
    module = graph if dtype == "float32" else copy.deepcopy(graph).to(getattr(torch, dtype))
    # What turns cosines into logits is not part of the graphs.
    scale, bias = (getattr(graph.model, name, None) for name in ("logit_scale", "logit_bias"))
    values = {"logit_scale": None if scale is None else scale.exp(), "logit_bias": bias}
    metadata = {name: repr(value.item()) for name, value in values.items() if value is not None}
    _write(module, traced, path, metadata)
    found = _run(path, list(graph.inputs), others)
    difference = max((actual - wanted).abs().max().item() for actual, wanted in zip(found, expected, strict=True))
    # Not `>`, which is false for NaN.
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"{path.name} differs from torch by {difference:.1e}; the limit for {dtype} is {TOLERANCE[dtype]:.0e}."
        )
    return difference


def _write(graph: VisionGraph | TextGraph, inputs: tuple[Tensor, ...], path: Path, metadata: dict[str, str]) -> None:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=[graph.output],
            dynamic_shapes=graph.inputs,
            verbose=False,
        )
    program.model.metadata_props.update(metadata)
    size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
    program.save(str(path), external_data=size > LARGEST_FILE)


def _run(path: Path, names: list[str], batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(session.run(None, {name: value.numpy() for name, value in zip(names, batch, strict=True)})[0])
        for batch in batches
    ]
