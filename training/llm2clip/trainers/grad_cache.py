"""GradCache: contrastive batches whose activations do not fit into memory (Gao et al. 2021, arXiv 2101.06983).

The loss needs the embeddings of the whole batch, but not the activations of the towers. Embeddings are computed chunk
by chunk without storing activations, and the backward pass recomputes the activations of one chunk at a time. The
gradients equal those of the whole batch at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

Inputs = dict[str, Tensor]
Run = Callable[[nn.Module, Inputs], tuple[Tensor, ...]]


def in_chunks(run: Run, model: nn.Module, inputs: Mapping[str, Tensor], chunk_size: int | None) -> tuple[Tensor, ...]:
    """Run a model on chunks of rows, with the activations of one chunk in memory; returns the outputs of all rows.

    The last chunk keeps its activations from forward to backward. Those of the others are recomputed in backward,
    in the same state of the random number generators and of autocast.

    With FSDP2, all chunks are recomputed, and their gradients are summed in each process and reduced over processes
    once, with the last chunk.

    Args:
        run: Calls the given model with the given inputs and returns tensors with as many rows.
        model: The model, possibly wrapped in `DistributedDataParallel`, or divided by `fully_shard`.
        inputs: Tensors with equal numbers of rows, without gradients.
        chunk_size: Rows per chunk; `None` runs all rows at once.

    Raises:
        ValueError: FSDP1 or DeepSpeed's ZeRO-3 divides the model.
    """
    num_rows = _rows(inputs)
    if chunk_size is None or chunk_size >= num_rows:
        return run(model, dict(inputs))
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(
            "tower_chunk_size does not work with version 1 of FSDP, which expects one backward pass per forward pass; "
            "set fsdp_version: 2, as in fsdp.yaml, or leave tower_chunk_size unset."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "tower_chunk_size does not work with DeepSpeed's ZeRO-3, whose parameters are empty between forward "
            "passes; use ZeRO-2 or FSDP2 (fsdp.yaml), or leave tower_chunk_size unset."
        )
    # The incomplete chunk comes first, since the last chunk is the one that is not recomputed.
    sizes = [num_rows % chunk_size or chunk_size] + [chunk_size] * ((num_rows - 1) // chunk_size)
    parts = zip(*(tensor.split(sizes) for tensor in inputs.values()), strict=True)
    chunks = [dict(zip(inputs, part, strict=True)) for part in parts]
    if isinstance(model, FSDPModule):
        return _RecomputedShards.apply(run, model, chunks, torch.zeros((), requires_grad=True))
    # DDP expects one forward per backward: that of the last chunk, whose hooks wait for the gradients of all chunks.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    trained = {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
    first = _Recomputed.apply(run, inner, chunks[:-1], list(trained), *trained.values())
    last = run(model, chunks[-1])
    return tuple(torch.cat(parts) for parts in zip(first, last, strict=True))


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


def embed_captions(text_model: nn.Module, captions: Inputs) -> tuple[Tensor]:
    """Compute the embeddings of a text tower, for [`in_chunks`]."""
    return (text_model(**captions).pooler_output,)


class _Recomputed(torch.autograd.Function):
    """Compute the outputs of chunks, and build their graphs in backward, one at a time."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, model: nn.Module, chunks: list[Inputs], names: list[str], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.work = _ChunkBackward(run, model), chunks, names
        ctx.save_for_backward(*parameters)
        ctx.states, outputs = [], []
        for chunk in chunks:
            ctx.states.append(_State(chunk))
            outputs.append(run(model, chunk))
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        chunk_backward, chunks, names = ctx.work
        sizes = [_rows(chunk) for chunk in chunks]
        # Stand-ins accumulate the gradients in place, so that the parameters' hooks (DDP) run once.
        stand_ins = {
            f"model.{name}": parameter.detach().requires_grad_()
            for name, parameter in zip(names, ctx.saved_tensors, strict=True)
        }
        by_chunk = zip(*(grad.split(sizes) for grad in grad_outputs), strict=True)
        for chunk, state, grads in zip(chunks, ctx.states, by_chunk, strict=True):
            functional_call(chunk_backward, stand_ins, (chunk, state, grads))
        return (None, None, None, None, *(stand_in.grad for stand_in in stand_ins.values()))


class _RecomputedShards(torch.autograd.Function):
    """Compute the outputs of chunks with a model that FSDP2 divides, and build their graphs in backward.

    The last input needs a gradient, which makes autograd call `backward`. FSDP keeps the gradients of the parameters.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, model: FSDPModule, chunks: list[Inputs], _: Tensor) -> tuple[Tensor, ...]:
        ctx.work, ctx.states, outputs = (run, model, chunks), [], []
        for chunk in chunks:
            ctx.states.append(_State(chunk))
            outputs.append(run(cast(nn.Module, model), chunk))
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        run, model, chunks = ctx.work
        chunk_backward = _ChunkBackward(run, model)
        by_chunk = zip(*(grad.split([_rows(chunk) for chunk in chunks]) for grad in grad_outputs), strict=True)
        # In a step with several batches, only the last of them reduces its gradients.
        reduces = GradientState().sync_gradients
        try:
            for number, (chunk, state, grads) in enumerate(zip(chunks, ctx.states, by_chunk, strict=True)):
                model.set_requires_gradient_sync(reduces and number == len(chunks) - 1)
                chunk_backward(chunk, state, grads)
        finally:
            model.set_requires_gradient_sync(reduces)
        return None, None, None, None


class _ChunkBackward(nn.Module):
    """Forward and backward of one chunk, as a module for `functional_call`."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        super().__init__()
        self.run, self.model = run, model

    def forward(self, chunk: Inputs, state: _State, grad_outputs: tuple[Tensor, ...]) -> None:
        with torch.enable_grad(), state.restored():
            outputs = self.run(self.model, chunk)
        used = [i for i, output in enumerate(outputs) if output.requires_grad]
        torch.autograd.backward([outputs[i] for i in used], [grad_outputs[i] for i in used])


class _State:
    """The state that a model's outputs depend on besides its inputs: random number generators and autocast."""

    def __init__(self, inputs: Inputs) -> None:
        self.device_type = next(iter(inputs.values())).device.type
        self.cpu_generator = torch.get_rng_state()
        self.devices, self.generators = get_device_states(*inputs.values())
        self.autocast = torch.is_autocast_enabled(self.device_type)
        self.autocast_dtype = torch.get_autocast_dtype(self.device_type)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context, the saved state is restored."""
        has_generators = bool(self.devices)
        with (
            torch.random.fork_rng(self.devices, device_type=self.device_type if has_generators else "cuda"),
            torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=self.autocast),
        ):
            torch.set_rng_state(self.cpu_generator)
            if has_generators:
                set_device_states(self.devices, self.generators, device_type=self.device_type)
            yield
