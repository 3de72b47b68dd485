"""Small models of every type of transformers, and what they are given."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

MAKE_MODELS = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "make_models.py"))


@contextmanager
def embedded_batches() -> Iterator[list[Any]]:
    """Collect the token ids of every forward pass in this context."""
    batches: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            batches.append(args[0])

    handle = register_module_forward_pre_hook(record)
    try:
        yield batches
    finally:
        handle.remove()
