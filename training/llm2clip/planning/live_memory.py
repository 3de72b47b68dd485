"""The memory that a computation takes, counted by its tensors, which need no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations within its context make, as long as they live.

    A storage counts once, however many tensors view it. Gradients that parameters keep do not count.

    Args:
        existing: Tensors from before, whose storages do not count: weights and inputs.

    Attributes:
        now: Bytes that live.
        peak: The largest `now` so far.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self._kept_apart: set[int] = set()
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return output

    def watch(self, module: nn.Module) -> None:
        """Leave out the gradients of a module's parameters, from when they are accumulated."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_apart)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))

    def _remove(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        del self._references[key]
        if key in self._kept_apart:
            self._kept_apart.discard(key)
        else:
            self.now -= size

    def _keep_apart(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        size = self._sizes.get(key, 0)
        if size and key not in self._kept_apart:
            self._kept_apart.add(key)
            self.now -= size


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]
