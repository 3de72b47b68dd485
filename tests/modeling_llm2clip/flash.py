"""Flash attention on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

from modeling_llm2clip.compatibility_llm2clip import VERSION


class FlashOnCPU:
    """Exact stand-ins for the functions of flash-attn, called by transformers' own code."""

    def __init__(self) -> None:
        self.sequences: list[list[int]] = []

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.equal(cu_seqlens_k)
        assert cu_seqlens_q[-1] == len(q)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        self.sequences.append(lengths)
        groups = q.shape[1] // k.shape[1]
        outputs = []
        for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.shape[-1] ** -0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
            hidden = (distance < 0) & torch.tensor(causal)
            if window_size[0] >= 0:
                hidden = hidden | (distance > window_size[0]) | (-distance > window_size[1])
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value))
        return torch.cat(outputs)

    def same_lengths(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        batch, tokens = q.shape[:2]
        ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
        kwargs |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": tokens, "max_seqlen_k": tokens}
        return self.varlen(*(x.flatten(0, 1) for x in (q, k, v)), **kwargs).unflatten(0, (batch, tokens))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashOnCPU:
    if VERSION < (5, 19):
        pytest.skip("before 5.19, transformers calls flash-attn in a form that the stand-in does not have")
    functions = FlashOnCPU()
    process = flash_utils._lazy_define_process_function(functions.varlen)
    pads = (flash_utils._pad_input, flash_utils._unpad_input)
    imported = ((functions.same_lengths, functions.varlen, None, *pads), (process, dict))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: imported)
    return functions
