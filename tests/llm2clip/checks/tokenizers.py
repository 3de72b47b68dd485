"""A tokenizer of words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, longest: int | None) -> str:
    """Save a tokenizer of words and a final token."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[EOS]": 1}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$0 [EOS]", special_tokens=[("[EOS]", 1)])
    options = {} if longest is None else {"model_max_length": longest}
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", **options)
    saved.save_pretrained(folder)
    return str(folder)
