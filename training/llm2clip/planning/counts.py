"""What a step of a recipe takes, counted on a model without data: bytes of a GPU, and operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE, KEPT_LOGITS
from llm2clip.planning import models
from llm2clip.trainers.base_config import ContrastiveConfig, StageConfig
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip.modeling_llm2clip_utils import ACCELERATOR_BATCH_TOKENS

FLOAT = 4
# Tiles of logits that the loss holds at once: logits, their exponentials, their gradients.
TILES = 3


class Work(NamedTuple):
    """A model, and what a step computes with it.

    Attributes:
        forward: Computes the embeddings, or the loss, of a number of rows, whose captions have so many tokens.
        rows: Of a batch, on one GPU; `chunk` of one forward pass; `longest` captions in tokens.
        width: Of the embeddings.
        passes: How often a step runs it: what all of them keep lives until the loss.
        tower: A text tower that runs without gradients.
    """

    model: nn.Module
    forward: Callable[[int, int], list[Tensor]]
    rows: int
    chunk: int
    longest: int
    width: int = 0
    passes: int = 1
    tower: nn.Module | None = None


class KeptTensors:
    """Counts the bytes of what forward passes keep for backward: each storage once, and no weights.

    Attributes:
        storages: What is kept until backward.
        largest_layer: Bytes of the largest layer of those that backward recomputes, one at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, Any] = {}
        self.largest_layer = 0

    def count(self, run: Callable[[], Any]) -> float:
        """Run a function; returns the bytes at the beginning of backward."""
        with saved_tensors_hooks(self._add, lambda tensor: tensor):
            outputs = run()
        del outputs
        return sum(storage.nbytes() for storage in self.storages.values())

    def recompute(self, function: Any, *args: Any) -> Any:
        """Run a layer as [`torch.utils.checkpoint.checkpoint`] does: only its inputs are kept."""
        outside, self.storages = self.storages, {}
        output = function(*args)
        inside, self.storages = self.storages, outside
        for value in tree_leaves((args, function.keywords)) if inside else ():
            if isinstance(value, Tensor):
                self._add(value)
        layer = sum(storage.nbytes() for key, storage in inside.items() if key not in outside)
        self.largest_layer = max(self.largest_layer, layer)
        return output

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self.storages[storage._cdata] = storage
        return tensor


def make_work(config: StageConfig | EmbedConfig, longest: int | None) -> Work:
    """Build the model of a recipe, and what a step computes with it.

    Args:
        longest: Tokens of the longest captions with their prompt; None for the tower's limit.

    Raises:
        ValueError: A config cannot be read.
    """
    tower: Any
    if isinstance(config, EmbedConfig):
        text = models.read_text_config(config, "text_model_name_or_path")
        tower = models.build_text_tower(text, config.dtype, config.attn_implementation).requires_grad_(False)
        return Work(tower, _embedding(tower), 1, 1, longest or text.max_text_length, text.hidden_size, tower=tower)
    rows = config.per_device_train_batch_size
    chunk = min(getattr(config, "tower_chunk_size", None) or rows, rows)
    if isinstance(config, MNTPRecipe):
        tower = models.build_trained_text_tower(config)
        return Work(tower, _token_loss(config, tower), rows, rows, config.block_size)
    if isinstance(config, Stage1Recipe):
        tower = models.build_trained_text_tower(config)
        # Anchor, positive, and a hard negative if a source has them.
        roles = 3 if any(source.get("negative_column") for source in config.sources) else 2
        longest = longest or tower.config.max_text_length
        return Work(tower, _embedding(tower), rows, chunk, longest, tower.config.hidden_size, roles)
    assert isinstance(config, Stage2Recipe)
    model: Any = models.build_trained_joint_model(config)
    text, lora = model.config.text_config, config.lora_rank

    def forward(rows: int, tokens: int) -> list[Tensor]:
        captions = {"llm_embeds": torch.zeros(rows, text.hidden_size)}
        if lora:
            captions = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long)}
        elif model.text_model is not None:
            with torch.no_grad():
                captions = {"llm_embeds": _embedding(model.text_model.eval())(rows, tokens)[0]}
        size: Any = model.config.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = {"pixel_values": torch.zeros(rows, 3, height, width)}
        if config.freeze_vision == "all":
            # They are computed once, before the training.
            images = {"vision_features": torch.zeros(rows, model.config.vision_width)}
        output = model(**captions, **images, return_logits=False)
        return [output.image_embeds, output.text_embeds]

    longest, tower = longest or text.max_text_length, None if lora else model.text_model
    return Work(model, forward, rows, chunk, longest, model.config.projection_dim, tower=tower)


def _embedding(tower: Any) -> Callable[[int, int], list[Tensor]]:
    return lambda rows, tokens: [tower(input_ids=torch.zeros(rows, tokens, dtype=torch.long)).pooler_output]


def _token_loss(config: MNTPRecipe, tower: Any) -> Callable[[int, int], list[Tensor]]:
    # The head is the token embeddings, or as large.
    if not tower.config.decoder_config.tie_word_embeddings:
        tower.register_buffer("head", torch.empty_like(tower.get_input_embeddings().weight))

    def forward(rows: int, tokens: int) -> list[Tensor]:
        states = tower(input_ids=torch.zeros(rows, config.block_size, dtype=torch.long)).last_hidden_state
        scored = max(1, int(rows * config.block_size * config.mlm_probability))
        head = getattr(tower, "head", tower.get_input_embeddings().weight)
        logits = F.linear(states.flatten(0, 1)[:scored].to(head.dtype), head).float()
        return [F.cross_entropy(logits, torch.zeros(scored, dtype=torch.long), reduction="sum")]

    return forward


def count_step(config: StageConfig | EmbedConfig, work: Work, gpus: int, tokens: int) -> tuple[float, float]:
    """Count, with tensors without data, the bytes that a step keeps on a GPU, and its operations per row.

    Args:
        tokens: Mean tokens of a caption, for the operations.
    """
    model: Any = work.model
    half, recomputes = _half(config), isinstance(config, StageConfig) and config.activation_checkpointing

    def forward(rows: int, length: int) -> list[Tensor]:
        with torch.autocast("cpu", half or torch.bfloat16, half is not None):
            return [output for output in work.forward(rows, length) if output.requires_grad]

    def step(rows: int, length: int) -> None:
        if outputs := forward(rows, length):
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    # Such tensors are meta tensors that belong to a device, so that autocast and attention do what they do there. The
    # model is built on the meta device, because they cannot change their dtype, as LoRA layers do.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        if recomputes:
            # transformers before 5.23 has only the second.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
        flops = count_flops(lambda: step(2, tokens))
        if work.chunk < work.rows:
            with torch.no_grad():
                flops += count_flops(lambda: forward(2, tokens)) * (1 - work.chunk / work.rows)
        kept = KeptTensors(model)
        if recomputes:
            _run_layers(model, kept.recompute)
        activations = work.passes * kept.count(lambda: forward(work.chunk, work.longest)) + kept.largest_layer
        # The other chunks keep their embeddings and the gradients of these.
        activations += FLOAT * 2 * (work.rows - work.chunk) * work.width * (work.passes + 1)
        if isinstance(config, ContrastiveConfig):
            # Unit vectors, gathered keys with their gradients, tiles, kept logits.
            columns = max(1, work.passes - 1) * work.rows * gpus
            tiles = TILES * min(DEFAULT_TILE_SIZE, work.rows) * columns + min(work.rows * columns, KEPT_LOGITS)
            activations += FLOAT * (2 * (columns + work.rows) * work.width + tiles)
        if work.tower is not None:
            # Without gradients, what a layer makes is gone when the next one runs.
            rows, frozen = max(1, ACCELERATOR_BATCH_TOKENS // work.longest), KeptTensors(work.tower)
            rows = min(rows, getattr(config, "batch_size", None) or rows)
            _run_layers(work.tower.requires_grad_(True).train(), frozen.recompute)
            frozen.count(lambda: _embedding(work.tower)(rows, work.longest))
            work.tower.requires_grad_(False)
            activations += frozen.largest_layer
    return activations, work.passes * flops / 2


def _half(config: StageConfig | EmbedConfig) -> torch.dtype | None:
    """Return the type of a run's mixed precision."""
    if not isinstance(config, StageConfig):
        return None
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def _run_layers(model: nn.Module, function: Callable[..., Any]) -> None:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, function  # type: ignore


def count_flops(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of a function on tensors without data."""
    # torch has no counts for the attention that it would use on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_memory(
    config: StageConfig | EmbedConfig, work: Work, activations: float, gpus: int, state_bytes: int
) -> dict[str, dict[str, float]]:
    """Compute the bytes on a GPU by part, with their `total`: with DDP and, on several GPUs, with FSDP2.

    Args:
        state_bytes: Bytes of the optimizer per trained parameter of four bytes.
    """
    half = _half(config)
    tensors, chunked = [*work.model.parameters(), *work.model.buffers()], work.chunk < work.rows
    frozen, trained = (sum(x.nbytes for x in tensors if x.requires_grad is grad) for grad in (False, True))
    # DDP reduces gradients in buckets, which together are as large; the chunks of a batch sum theirs beside them.
    gradients, states = trained * (1 + (gpus > 1) + chunked), trained / FLOAT * state_bytes
    parts = {"weights": frozen + trained, "gradients": gradients, "optimizer": states}
    memory = {"one GPU" if gpus == 1 else "DDP": parts}
    if gpus > 1 and trained:
        # Accelerate trains float32 weights under mixed precision, and gathers them in 16 bits: two layers, the one at
        # work and the next, and what is in none.
        count = sum(x.numel() for x in tensors if x.requires_grad)
        trained = max(trained, FLOAT * count) if half else trained
        groups = [[*x.parameters()] for x in work.model.modules() if isinstance(x, GradientCheckpointingLayer)]
        groups.append(tensors)  # type: ignore[arg-type]
        sizes = [sum(x.numel() * (2 if half else x.element_size()) for x in group) for group in groups]
        gathered = sizes.pop() - sum(sizes) + 2 * max(sizes, default=0)
        memory["FSDP"] = {
            "weights": (frozen + trained) / gpus + gathered,
            "gradients": trained / gpus + FLOAT * count * chunked,
            "optimizer": trained / FLOAT * state_bytes / gpus,
        }
    for needed in memory.values():
        needed["activations"] = activations
        needed["total"] = sum(needed.values())
    return memory
