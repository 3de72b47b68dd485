"""A student of MiniLM-L6's size with random weights, its graph in ONNX, and queries."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

from benchmarks.small_llama import TOKENIZER, WORDS

WIDTH, MAX_LENGTH = 512, 128
INPUTS = ("input_ids", "attention_mask")


def write_student(folder: Path) -> Path:
    """Write the folder of a student, whose tokenizer is that of the small Llama; return it."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from llm2clip import Student

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length, tokenizer.pad_token = MAX_LENGTH, tokenizer.eos_token
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=tokenizer.pad_token_id,
        # So large that texts differ.
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    Student(BertModel(config), tokenizer, WIDTH).save_pretrained(folder)
    return folder


def export_graph(folder: Path) -> Path:
    """Write the graph of a student, from tokens and their mask to unit rows, into its folder; return its path."""
    import torch

    from llm2clip.encoders.query_encoder import QueryEncoder

    encoder = QueryEncoder.from_pretrained(folder)
    shape = {0: torch.export.Dim("batch", max=2**15), 1: torch.export.Dim("length", max=MAX_LENGTH)}
    example = (torch.arange(5, 23).view(2, 9), torch.tensor([[1] * 9, [1] * 6 + [0] * 3]))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            encoder,
            example,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=["sentence_embedding"],
            dynamic_shapes=dict.fromkeys(INPUTS, shape),
            verbose=False,
        )
    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    program.save(str(path))
    return path


def queries(count: int, tokens: int) -> list[str]:
    """Generate distinct texts of so many tokens of the student, special ones among them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rng, texts = random.Random(0), set[str]()
    while len(texts) < count:
        text = " ".join(rng.choices(WORDS.split(), k=rng.randint(2, tokens)))
        if len(tokenizer(text)["input_ids"]) == tokens:
            texts.add(text)
    return sorted(texts)
