"""The tokenizer of a model with two text encoders: the tokens of both, one after the other."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .tokenization_llm2clip import SECOND

SECOND_FILE = "second_tokenizer.json"
SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "padding_side", "truncation_side", "model_max_length"),
    *("model_input_names", "clean_up_tokenization_spaces", "split_special_tokens"),
)
# Arguments of a tokenizer that would change the tokens, or that need those of one tokenizer.
NOT_OF_A_PAIR = (
    *("text_pair", "text_target", "stride", "is_split_into_words", "pad_to_multiple_of"),
    *("return_overflowing_tokens", "return_offsets_mapping", "return_special_tokens_mask"),
)


def _settings(tokenizer: Any) -> dict[str, Any]:
    found = {name: getattr(tokenizer, name, None) for name in SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


class LLM2CLIPPairTokenizer(PreTrainedTokenizerFast):
    """Makes one row of tokens of each caption: those of the first tokenizer, and those of the second plus `SECOND`.

    Each truncates a caption at its own maximum length, and adds its own prompt. The first is this tokenizer itself.

    Args:
        second_tokenizer_file: `tokenizer.json` of the second.
        second_settings: Its arguments.
        kwargs: Arguments of `PreTrainedTokenizerFast` for the first.
    """

    vocab_files_names = {**PreTrainedTokenizerFast.vocab_files_names, "second_tokenizer_file": SECOND_FILE}

    # Without an `__init__`, since transformers 5 would make the first one anew for a class that has one.
    _second: PreTrainedTokenizerFast | None = None

    @property
    def second(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the second encoder."""
        if self._second is None:
            path = self.init_kwargs.get("second_tokenizer_file")
            if path is None:
                raise ValueError(f"the tokenizer of the second text encoder, {SECOND_FILE}, is missing.")
            settings = self.init_kwargs.get("second_settings") or {}
            self._second = PreTrainedTokenizerFast(tokenizer_file=path, **settings)
        return self._second

    @classmethod
    def _from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        tokenizer = super()._from_pretrained(*args, **kwargs)
        assert tokenizer.second is not None
        return tokenizer

    @classmethod
    def of(cls, first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast) -> LLM2CLIPPairTokenizer:
        """Make one of the caption tokenizers of two text towers."""
        copied = copy.deepcopy(first.backend_tokenizer)
        tokenizer = cls(tokenizer_object=copied, second_settings=_settings(second), **_settings(first))
        tokenizer._second = second
        return tokenizer

    @property
    def parts(self) -> list[PreTrainedTokenizerFast]:
        """The tokenizers of both encoders."""
        first = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(self.backend_tokenizer), **_settings(self))
        return [first, self.second]

    def __call__(
        self,
        text: Any = None,
        *,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        return_tensors: Any = None,
        add_special_tokens: bool = True,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Tokenize a caption, or a list of them; `max_length` holds for each of both tokenizers."""
        if refused := [name for name in NOT_OF_A_PAIR if kwargs.get(name)]:
            raise ValueError(f"the tokenizer of two text encoders does not take {', '.join(refused)}.")
        texts = [text] if isinstance(text, str) else list(text)
        rows: list[list[int]] = [[] for _ in texts]
        for offset, limit, tokenize in (
            (0, self.model_max_length, super().__call__),
            (SECOND, self.second.model_max_length, self.second),
        ):
            options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": verbose}
            if truncation:
                options |= {"truncation": True, "max_length": min(limit, max_length or limit)}
            for row, ids in zip(rows, tokenize(texts, **options)["input_ids"], strict=True):
                row += [token + offset for token in ids]
        found = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if isinstance(text, str) and return_tensors is None and not padding:
            return BatchEncoding({name: values[0] for name, values in found.items()})
        if padding in (False, None, "do_not_pad"):
            return BatchEncoding(found, tensor_type=return_tensors)
        return self.pad(found, padding=padding, return_tensors=return_tensors)

    def _save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, SECOND_FILE)
        self.second.backend_tokenizer.save(str(path))
        return *files, str(path)


def split_tokens(input_ids: Tensor, attention_mask: Tensor | None, limits: Sequence[int]) -> list[dict[str, Tensor]]:
    """Split `(batch, tokens)` of a [`LLM2CLIPPairTokenizer`] into those of each encoder, padded on the left.

    Args:
        limits: Largest number of tokens of each encoder.

    Returns:
        `input_ids` and `attention_mask` of the first and of the second.

    Raises:
        ValueError: A caption has no tokens of one of them: they are of another tokenizer.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_second = input_ids >= SECOND
    found = []
    for own, limit in zip((real & ~is_second, real & is_second), limits, strict=True):
        # By numbers of their own, since ONNX has no stable order.
        order = (own.long() * own.shape[1] + torch.arange(own.shape[1], device=own.device)).argsort(dim=1)
        mask = own.gather(1, order).long()
        ids = torch.where(mask.bool(), (input_ids % SECOND).gather(1, order), 0)
        # The shape of a graph cannot depend on its values.
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            lengths = mask.sum(dim=1)
            if not lengths.all():
                raise ValueError(
                    "a caption has no tokens of one of the two text encoders; load the tokenizer from the model's own "
                    "folder, with trust_remote_code=True."
                )
            limit = min(limit, int(lengths.max()))
        ids, mask = ids[:, -limit:], mask[:, -limit:]
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
