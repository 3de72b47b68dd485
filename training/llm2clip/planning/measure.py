"""What one training step of a recipe takes, measured on a model without data: activations and operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE, KEPT_LOGITS
from llm2clip.planning.costs import count_flops
from llm2clip.planning.live_memory import LiveMemory, tensors_of
from llm2clip.planning.models import (
    build_text_tower,
    image_size,
    text_config_of,
    trained_joint_model,
    trained_text_tower,
    with_fake_weights,
)
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import padded_mask
from modeling_llm2clip.modeling_llm2clip_utils import pool

# Computes outputs from a number of rows; the tokens of each are fixed.
Forward = Callable[[int], list[Tensor]]
# Tiles of logits that the loss holds at once: logits, their exponentials, their gradients.
TILES = 3
FLOAT = 4
# `encode_text` has batches of this many tokens on a GPU.
ENCODED_TOKENS = 16_384


@dataclass
class Step:
    """What a model and one of its training steps take, on one GPU that holds all of it.

    Attributes:
        trained: Numbers of elements of the trained parameters, by bytes of an element; `frozen`: of the others.
        activations: Bytes beside weights, gradients and optimizer states at the peak, with the loss.
        casts: Bytes of them that are 16-bit copies of float32 weights, which autocast keeps during a step.
        flops: Operations of a step per row (forward, recomputation and backward).
        largest_block: Bytes of the largest part that FSDP gathers at once; `outside`: of what is in no block.
        width: Width of the embeddings that the stage makes.
    """

    trained: dict[int, int] = field(default_factory=dict)
    frozen: dict[int, int] = field(default_factory=dict)
    activations: float = 0.0
    casts: float = 0.0
    flops: float = 0.0
    largest_block: float = 0.0
    outside: float = 0.0
    width: int = 0
    largest_trained_block: int = 0
    stand_ins: bool = False

    def count(self, trained: bool) -> int:
        """Number of trained or frozen parameters."""
        return sum((self.trained if trained else self.frozen).values())

    def bytes(self, trained: bool) -> int:
        """Bytes of the trained or frozen weights."""
        return sum(size * count for size, count in (self.trained if trained else self.frozen).items())


@dataclass(frozen=True)
class Lengths:
    """Tokens of a caption with its prompt: `longest` for memory, `mean` for operations."""

    longest: int | None
    mean: int


def measure(config: StageConfig | EmbedConfig, gpus: int, lengths: Lengths) -> Step:
    """Measure what a step of a recipe takes; see [`Step`]. Raises ValueError if a config cannot be read."""
    with FakeTensorMode():
        if isinstance(config, EmbedConfig):
            return _embedding(config, lengths)
        if isinstance(config, Stage2Recipe):
            model, forward, width = _stage2(config, lengths)
            return _training(config, model, forward, forward, width, 1, gpus)
        if isinstance(config, Stage1Recipe):
            tower = with_fake_weights(trained_text_tower(config))
            longest = lengths.longest or tower.config.max_text_length

            def forward_of(tokens: int) -> Forward:
                return lambda rows: [embed(tower, rows, tokens)]

            forwards = forward_of(longest), forward_of(lengths.mean)
            return _training(config, tower, *forwards, tower.config.hidden_size, roles_of(config), gpus)
        if isinstance(config, MNTPRecipe):
            tower, forward = _mntp(config)
            return _training(config, tower, forward, forward, 0, 1, gpus)
    raise TypeError(type(config).__name__)


def roles_of(config: Stage1Recipe) -> int:
    """Number of texts of a pair: anchor, positive, and a hard negative if a source has them."""
    return 3 if any(source.get("negative_column") for source in config.sources) else 2


def embed(tower: LLM2CLIPTextModel, rows: int, tokens: int) -> Tensor:
    """Embed captions without padding, as the tower's `forward` does, which reads the values of its masks."""
    states = _states(tower, rows, tokens)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    return tower.dense(pool(states, mask, mask, tower.config.pooling))


def _states(tower: LLM2CLIPTextModel, rows: int, tokens: int) -> Tensor:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    options: dict[str, Any] = {"position_ids": torch.arange(tokens)[None].expand(rows, -1), "use_cache": False}
    mask = None
    if tower.config.bidirectional:
        mask = padded_mask(tower.decoder, torch.ones(rows, tokens, dtype=torch.long), True)
    options = {name: options[name] for name in tower._arguments}
    return tower.decoder(input_ids=ids, attention_mask=mask, **options).last_hidden_state


def _stage2(config: Stage2Recipe, lengths: Lengths) -> tuple[nn.Module, Forward, int]:
    model = with_fake_weights(trained_joint_model(config))
    text = model.config.text_config
    tower = None
    if config.online_text_model:
        tower = with_fake_weights(build_text_tower(text, config.text_model_dtype, None)).requires_grad_(False).eval()
        model.text_model = tower

    def forward(rows: int) -> list[Tensor]:
        if tower is None:
            captions = torch.zeros(rows, text.hidden_size)
        else:
            with torch.no_grad():
                captions = embed(tower, rows, lengths.longest or lengths.mean)
        images: dict[str, Tensor] = {"pixel_values": torch.zeros(rows, 3, *image_size(model))}
        if config.freeze_vision == "all":
            images = {"vision_features": torch.zeros(rows, model.config.vision_width)}
        output = model(llm_embeds=captions, return_logits=False, **images)
        return [output.image_embeds, output.text_embeds]

    return model, forward, model.config.projection_dim


def _mntp(config: MNTPRecipe) -> tuple[LLM2CLIPTextModel, Forward]:
    tower = with_fake_weights(trained_text_tower(config))
    decoder = tower.config.decoder_config
    dtype = next(tower.decoder.parameters()).dtype
    head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False, dtype=dtype).requires_grad_(False)
    if not decoder.tie_word_embeddings:
        tower.add_module("planned_head", head)

    def forward(rows: int) -> list[Tensor]:
        states = _states(tower, rows, config.block_size)
        scored = max(1, int(rows * config.block_size * config.mlm_probability))
        logits = head(states.flatten(0, 1)[:scored].to(dtype)).float()
        return [F.cross_entropy(logits, torch.zeros(scored, dtype=torch.long), reduction="sum")]

    return tower, forward


def _training(
    config: StageConfig, model: nn.Module, forward: Forward, short: Forward, width: int, passes: int, gpus: int
) -> Step:
    """Measure forward and backward of a batch: memory with `forward`, operations with `short`.

    Args:
        passes: How often a step runs it: the activations of all are kept until the loss.
    """
    model.train()
    if config.activation_checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        parts: list[Any] = [model, getattr(model, "decoder", None), getattr(model, "vision_model", None)]
        for part in parts:
            if part is not None and getattr(part, "supports_gradient_checkpointing", False):
                part.activation_checkpointing_enable(options)
    rows = config.per_device_train_batch_size
    chunk = getattr(config, "tower_chunk_size", None)
    chunk = chunk if chunk is not None and chunk < rows else None
    step = describe(model, width)
    step.stand_ins = chunk is not None

    def run(compute: Forward, size: int) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16 if config.bf16 else torch.float16, config.bf16 or config.fp16):
            return compute(size)

    def train(compute: Forward, size: int) -> None:
        outputs = [output for output in run(compute, size) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    with LiveMemory(tensors_of(model)) as live:
        live.watch(model)
        outputs = run(forward, chunk or rows)
        kept = live.now
        outputs = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    del outputs
    loss = _loss_bytes(config, rows, rows * gpus, width, passes)
    # The other chunks keep their embeddings and the gradients of these.
    embeddings = 0 if chunk is None else 2 * (rows - chunk) * width * (passes + 1) * FLOAT
    step.activations = max(live.peak + (passes - 1) * kept, passes * kept + loss) + embeddings
    if config.bf16 or config.fp16:
        step.casts = 2 * sum(x.numel() for x in model.parameters() if x.ndim > 1 and x.dtype == torch.float32)
    model.zero_grad(set_to_none=True)
    step.flops = passes * count_flops(lambda: train(short, 2)) / 2
    if chunk is not None:
        with torch.no_grad():
            step.flops += passes * count_flops(lambda: run(short, 2)) / 2 * (1 - chunk / rows)
    return step


def _loss_bytes(config: StageConfig, rows: int, global_rows: int, width: int, passes: int) -> float:
    """Bytes of the contrastive loss: unit vectors, gathered keys with their gradients, tiles, kept logits."""
    if isinstance(config, MNTPRecipe):
        return 0
    columns = max(1, passes - 1) * global_rows
    tile = min(getattr(config, "loss_chunk_size", DEFAULT_TILE_SIZE), rows)
    tiles = TILES * tile * columns + min(rows * columns, KEPT_LOGITS)
    return FLOAT * (2 * columns * width + 2 * rows * width + tiles)


def _embedding(config: EmbedConfig, lengths: Lengths) -> Step:
    text = text_config_of(config.text_model_name_or_path, "text_model_name_or_path", config.text_model_revision)
    tower = with_fake_weights(build_text_tower(text, config.dtype, config.attn_implementation))
    tower.requires_grad_(False).eval()
    step = describe(tower, tower.config.hidden_size)
    longest = lengths.longest or text.max_text_length
    rows = max(1, ENCODED_TOKENS // longest)
    rows = rows if config.batch_size is None else min(rows, config.batch_size)
    with torch.no_grad(), LiveMemory(tensors_of(tower)) as live:
        embed(tower, rows, longest)
    step.activations = live.peak
    with torch.no_grad():
        step.flops = count_flops(lambda: embed(tower, 1, lengths.mean))
    return step


def describe(model: nn.Module, width: int) -> Step:
    """Count the parameters of a model, and the bytes of its blocks, which FSDP gathers one after the other."""
    step = Step(width=width)
    for parameter in model.parameters():
        sizes = step.trained if parameter.requires_grad else step.frozen
        sizes[parameter.element_size()] = sizes.get(parameter.element_size(), 0) + parameter.numel()
    for buffer in model.buffers():
        step.frozen[buffer.element_size()] = step.frozen.get(buffer.element_size(), 0) + buffer.numel()
    total = step.bytes(True) + step.bytes(False)
    names = block_names(model)
    blocks = [block for block in model.modules() if type(block).__name__ in names]
    held = [sum(x.numel() * x.element_size() for x in block.parameters()) for block in blocks]
    trained = [sum(x.numel() for x in block.parameters() if x.requires_grad) for block in blocks]
    step.largest_block, step.outside = max(held, default=total), total - sum(held)
    step.largest_trained_block = max(trained, default=step.count(True))
    return step


def block_names(model: nn.Module) -> set[str]:
    """Names of the classes of a model's transformer layers, which FSDP wraps."""
    found = (getattr(part, "_no_split_modules", None) or () for part in model.modules())
    return {name for names in found for name in names}
