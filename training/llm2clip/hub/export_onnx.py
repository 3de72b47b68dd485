"""`llm2clip export-onnx`: the two halves of a model as ONNX graphs, each compared with torch before it is kept."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, PretrainedConfig

from llm2clip.utils.files import atomic_folder, refuse_existing
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPVisionModelWithProjection

logger = logging.getLogger(__name__)

PARTS = ("vision", "text")
MARK = "*_model.onnx"
# Largest difference from torch in float32, in an entry of a unit vector.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
# A protobuf file ends at 2 GiB; larger weights go to a file beside it.
LARGEST_FILE = 2**30
BATCH, LENGTH = torch.export.Dim("batch", max=2**15), torch.export.Dim("length", max=2**17)


@dataclass
class ExportOnnxConfig:
    """Settings of `llm2clip export-onnx`."""

    model: str = field(default="", metadata={"help": "Folder or Hub id of an LLM2CLIP model or of its vision half."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write; unset: `onnx` in the model's folder."}
    )
    parts: list[str] | None = field(
        default=None, metadata={"help": "vision, text or both; unset: what the model holds."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the graphs: float32 or float16."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an output folder that exists."})

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts or () if part not in PARTS]
        if unknown or self.parts == []:
            raise ValueError(f"parts {unknown or 'are none'}; choose vision, text or both.")
        if self.dtype not in TOLERANCE:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose {' or '.join(TOLERANCE)}.")


def _unit(features: Any) -> Tensor:
    return F.normalize(features.pooler_output.float(), dim=-1)


class VisionGraph(nn.Module):
    """`pixel_values` `(batch, channels, height, width)` to `image_embeds` `(batch, projection_dim)`, unit rows.

    Height and width are fixed.
    """

    inputs = {"pixel_values": {0: BATCH}}
    output = "image_embeds"

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPVisionModelWithProjection, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _unit(self.model.get_image_features(pixel_values.to(self.model.dtype)))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random input of a batch size."""
        return (torch.randn(batch, self.model.config.vision_config.num_channels, *self.image_size),)


class TextGraph(nn.Module):
    """`input_ids` and `attention_mask` `(batch, length)` to `text_embeds` `(batch, projection_dim)`, unit rows.

    The tokens are those of the model's own tokenizer, which holds the prompt.
    """

    inputs = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}
    output = "text_embeds"

    def __init__(self, model: LLM2CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _unit(self.model.get_text_features(input_ids, attention_mask))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random captions of 8 to 8 + `batch` tokens after the prompt's prefix, padded on the left."""
        config = self.model.config.text_config
        lengths = config.num_prefix_tokens + 8 + torch.arange(batch)
        positions = torch.arange(int(lengths.max()))
        mask = (positions >= lengths.max() - lengths[:, None]).long()
        return torch.randint(config.decoder_config.vocab_size, mask.shape), mask


def run(config: ExportOnnxConfig) -> dict[str, Any]:
    """Write `vision_model.onnx` and `text_model.onnx`.

    Returns:
        For each graph the largest difference from torch, over batches of other sizes and lengths than it was traced
        with.

    Raises:
        FileExistsError: The output folder exists and `overwrite` is off.
        ValueError: The model cannot be exported, or a graph differs from torch. Nothing is written then.
    """
    if not config.model:
        raise ValueError("give a model: llm2clip export-onnx MODEL")
    if config.output_dir is None and not Path(config.model).is_dir():
        raise ValueError(f"{config.model} is no folder; say where to write: --output-dir FOLDER")
    destination = Path(config.output_dir or Path(config.model) / "onnx")
    refuse_existing(destination, config.overwrite, (MARK,))
    _require_libraries()
    parts = _parts(config)
    model = _load(config, "text" in parts)
    result: dict[str, Any] = {}
    with atomic_folder(destination, config.overwrite, (MARK,)) as folder:
        for part in parts:
            path = folder / f"{part}_model.onnx"
            graph = VisionGraph(model, _image_size(config, model)) if part == "vision" else TextGraph(model)
            logger.info("%s: tracing", path.name)
            result[f"{part}_difference"] = _export(graph, path, config.dtype)
            size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
            logger.info("%s: %.0f MB, differs from torch by %.1e", path.name, size / 1e6, result[f"{part}_difference"])
    return {**{key: f"{value:.1e}" for key, value in result.items()}, "written": str(destination)}


def _require_libraries() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'llm2clip[onnx]' brings it") from error


def _parts(config: ExportOnnxConfig) -> tuple[str, ...]:
    fields, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision)
    if fields.get("model_type") != LLM2CLIPConfig.model_type:
        found = fields.get("model_type")
        raise ValueError(f"{config.model} is no LLM2CLIP model (its model_type is {found!r}); `llm2clip convert` it.")
    vision_alone = fields.get("architectures") == [LLM2CLIPVisionModelWithProjection.__name__]
    held = PARTS[:1] if vision_alone else PARTS
    missing = [part for part in config.parts or () if part not in held]
    if missing:
        raise ValueError(f"{config.model} is a vision half alone, without a text graph.")
    return tuple(part for part in held if config.parts is None or part in config.parts)


def _load(config: ExportOnnxConfig, with_llm: bool) -> Any:
    options: dict[str, Any] = {"revision": config.revision, "dtype": torch.float32}
    if not with_llm:
        return LLM2CLIPVisionModelWithProjection.from_pretrained(config.model, **options).eval()
    try:
        model = LLM2CLIPModel.from_pretrained(config.model, **options).eval()
    except OSError as error:
        raise OSError(f"{error}\n--parts vision exports the vision graph without the LLM.") from error
    model.text_model.merge_adapter()
    return model


def _image_size(config: ExportOnnxConfig, model: Any) -> tuple[int, int]:
    """The height and width that the model's image processor gives, or those of its tower where it has none."""
    tower = model.config.vision_config
    if not hasattr(tower, "image_size"):
        raise ValueError(
            f"a {tower.model_type} takes images of any shape, as lists of patches; its graph cannot be exported. "
            "--parts text exports the text graph."
        )
    try:
        processor: Any = AutoImageProcessor.from_pretrained(config.model, revision=config.revision)
    except OSError:
        return tower.image_size, tower.image_size
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if "height" not in size:
        raise ValueError(f"the image processor of {config.model} gives images of several sizes: {dict(size)}.")
    return size["height"], size["width"]


def _export(graph: VisionGraph | TextGraph, path: Path, dtype: str) -> float:
    """Write a graph and return the largest difference of its output from that of torch in float32."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        traced, others = graph.example(2), [graph.example(batch) for batch in (1, 5)]
        with torch.inference_mode():
            expected = [graph(*inputs) for inputs in others]
        module = graph if dtype == "float32" else copy.deepcopy(graph).to(getattr(torch, dtype))
        _write(module, traced, path, _metadata(graph))
    finally:
        torch.set_rng_state(generator_state)
    difference = max(
        (actual - wanted).abs().max().item()
        for actual, wanted in zip(_run(path, list(graph.inputs), others), expected, strict=True)
    )
    # A comparison that is false for a difference that is no number.
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"{path.name} differs from torch by {difference:.1e}, where {TOLERANCE[dtype]:.0e} is allowed for {dtype}."
        )
    return difference


def _metadata(graph: VisionGraph | TextGraph) -> dict[str, str]:
    """What a user needs besides the graphs: the factor between cosine and logit, and what some models add to it."""
    scale, bias = (getattr(graph.model, name, None) for name in ("logit_scale", "logit_bias"))
    metadata = {} if scale is None else {"logit_scale": repr(scale.exp().item())}
    return metadata if bias is None else {**metadata, "logit_bias": repr(bias.item())}


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


__all__ = ["ExportOnnxConfig", "run"]
