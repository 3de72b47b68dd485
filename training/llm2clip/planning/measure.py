"""What one training step of a recipe takes, measured on a model without data: activations and operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.losses.tiles import KEPT_LOGITS
from llm2clip.planning.costs import count_flops
from llm2clip.planning.live_memory import LiveMemory
from llm2clip.planning.models import (
    build_text_tower,
    image_size,
    text_config_of,
    trained_joint_model,
    trained_text_tower,
)
from llm2clip.trainers.base_config import ContrastiveConfig, StageConfig
from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import ACCELERATOR_BATCH_TOKENS

# Tiles of logits that the loss holds at once: logits, their exponentials, their gradients.
TILES = 3
FLOAT = 4


@dataclass
class Step:
    """What a model and one of its training steps take, on one GPU that holds all of it.

    Attributes:
        trained, frozen: Numbers of parameters, with buffers among the frozen; `trained_bytes`, `frozen_bytes`: theirs.
        largest_block: Bytes of the largest part that FSDP gathers at once; `outside`: of what is in no block.
        largest_trained_block: Trained parameters of the block that has most of them.
        width: Width of the embeddings that the stage makes.
        activations: Bytes beside weights, gradients and optimizer states at the peak, with the loss.
        casts: Bytes of them that are 16-bit copies of float32 weights, which autocast keeps during a step.
        flops: Operations of a step per row (forward, recomputation and backward).
        in_chunks: The towers compute the batch in chunks.
        state_values: Values that `frozen_states_dir` stores of each image.
    """

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    largest_block: int
    outside: int
    largest_trained_block: int
    width: int
    activations: float = 0.0
    casts: float = 0.0
    flops: float = 0.0
    in_chunks: bool = False
    state_values: int = 0


class Work(NamedTuple):
    """A model, and what a step computes with it.

    Attributes:
        forward: Computes the outputs of a number of rows, whose captions have so many tokens.
        rows: Of a batch, on one GPU; `width` of their embeddings.
        passes: How often a step runs it: the activations of all are kept until the loss.
    """

    model: nn.Module
    forward: Callable[[int, int], list[Tensor]]
    rows: int
    width: int
    passes: int = 1


def measure(config: StageConfig | EmbedConfig, gpus: int, longest: int | None, tokens: int) -> Step:
    """Measure what a step of a recipe takes; see [`Step`].

    Args:
        longest: Tokens of the longest captions with their prompt, for the memory; None for the tower's limit.
        tokens: Their mean number, for the operations.

    Raises:
        ValueError: A config cannot be read.
    """
    if isinstance(config, EmbedConfig):
        text = text_config_of(config.text_model_name_or_path, "text_model_name_or_path", config.text_model_revision)
        tower = build_text_tower(text, config.dtype, config.attn_implementation).requires_grad_(False).eval()
        longest = longest or text.max_text_length
        rows = max(1, ACCELERATOR_BATCH_TOKENS // longest)
        work = Work(tower, _embed(tower), min(rows, config.batch_size or rows), text.hidden_size)
    elif isinstance(config, Stage2Recipe):
        model = trained_joint_model(config)
        longest = longest or model.config.text_config.max_text_length
        work = _stage2(config, model)
    elif isinstance(config, MNTPRecipe):
        longest = config.block_size
        work = _mntp(config)
    else:
        assert isinstance(config, Stage1Recipe)
        tower = trained_text_tower(config)
        longest = longest or tower.config.max_text_length
        # Anchor, positive, and a hard negative if a source has them.
        roles = 3 if any(source.get("negative_column") for source in config.sources) else 2
        work = Work(tower, _embed(tower), config.per_device_train_batch_size, tower.config.hidden_size, roles)
    step = describe(work.model, work.width)
    if isinstance(config, Stage2Recipe) and config.frozen_states_dir is not None:
        joint = cast(LLM2CLIPModel, work.model)
        vision, (height, width) = joint.config.vision_config, image_size(joint)
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        step.state_values = (patches + 1) * vision.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Such tensors belong to a device, so that autocast and attention do what they do there. The model is built on
        # the meta device, because they cannot change their dtype, as LoRA layers do.
        work.model.to_empty(device="cpu")
        _run(config, work, step, gpus, longest, tokens)
    return step


def _embed(tower: LLM2CLIPTextModel) -> Callable[[int, int], list[Tensor]]:
    return lambda rows, tokens: [tower(input_ids=torch.zeros(rows, tokens, dtype=torch.long)).pooler_output]


def _stage2(config: Stage2Recipe, model: LLM2CLIPModel) -> Work:
    text = model.config.text_config
    if config.runs_text_model:
        model.text_model = build_text_tower(text, config.text_model_dtype, None).requires_grad_(False)
        with torch.device("meta"):
            add_lora(model.text_model, config)

    def forward(rows: int, tokens: int) -> list[Tensor]:
        captions = {"llm_embeds": torch.zeros(rows, text.hidden_size)}
        if config.lora_rank:
            captions = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long)}
        elif model.text_model is not None:
            with torch.no_grad():
                captions = {"llm_embeds": _embed(model.text_model.eval())(rows, tokens)[0]}
        images = {"pixel_values": torch.zeros(rows, 3, *image_size(model))}
        if config.freeze_vision == "all":
            images = {"vision_features": torch.zeros(rows, model.config.vision_width)}
        if config.distill_from:
            return [model(**captions).pooler_output]
        if config.distill_weight:  # the averaged weights embed the images too
            with torch.no_grad():
                model(**captions, **images, return_logits=False)
        output = model(**captions, **images, return_logits=False)
        return [output.image_embeds, output.text_embeds]

    return Work(model, forward, config.per_device_train_batch_size, model.config.projection_dim)


def _mntp(config: MNTPRecipe) -> Work:
    tower = trained_text_tower(config)
    decoder, dtype = tower.config.decoder_config, next(tower.decoder.parameters()).dtype
    head: Any = tower.get_input_embeddings()
    if not decoder.tie_word_embeddings:
        with torch.device("meta"):
            head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False, dtype=dtype).requires_grad_(False)
        tower.add_module("head", head)

    def forward(rows: int, tokens: int) -> list[Tensor]:
        tokens = config.block_size
        states = tower(input_ids=torch.zeros(rows, tokens, dtype=torch.long)).last_hidden_state
        scored = max(1, int(rows * tokens * config.mlm_probability))
        logits = F.linear(states.flatten(0, 1)[:scored].to(dtype), head.weight).float()
        return [F.cross_entropy(logits, torch.zeros(scored, dtype=torch.long), reduction="sum")]

    return Work(tower, forward, config.per_device_train_batch_size, 0)


def _run(config: StageConfig | EmbedConfig, work: Work, step: Step, gpus: int, longest: int, tokens: int) -> None:
    """Measure forward and backward of a batch, or its forward alone where nothing is trained."""
    model: Any = work.model
    rows, chunk, loss, half = work.rows, work.rows, 0.0, None
    if isinstance(config, StageConfig):
        model.train()
        if config.activation_checkpointing:
            # transformers before 5.23 has only the second.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
        half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    if isinstance(config, ContrastiveConfig):
        chunk = min(config.tower_chunk_size or rows, rows)
        loss = _loss_bytes(min(config.loss_chunk_size, rows), rows, rows * gpus, work)
    step.in_chunks = chunk < rows

    def forward(size: int, length: int) -> list[Tensor]:
        with torch.autocast("cpu", half or torch.bfloat16, half is not None):
            return [output for output in work.forward(size, length) if output.requires_grad]

    def backward(outputs: list[Tensor]) -> None:
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    with LiveMemory(model) as live:
        outputs = forward(chunk, longest)
        kept = live.now
        backward(outputs)
    del outputs
    # The other chunks keep their embeddings and the gradients of these.
    embeddings = 2 * (rows - chunk) * work.width * (work.passes + 1) * FLOAT
    step.activations = max(live.peak + (work.passes - 1) * kept, work.passes * kept + loss) + embeddings
    if half is not None:
        step.casts = 2 * sum(x.numel() for x in model.parameters() if x.ndim > 1 and x.dtype == torch.float32)
    model.zero_grad(set_to_none=True)
    step.flops = work.passes * count_flops(lambda: backward(forward(2, tokens))) / 2
    if step.in_chunks:
        with torch.no_grad():
            step.flops += work.passes * count_flops(lambda: forward(2, tokens)) / 2 * (1 - chunk / rows)


def _loss_bytes(tile: int, rows: int, global_rows: int, work: Work) -> float:
    """Bytes of the contrastive loss: unit vectors, gathered keys with their gradients, tiles, kept logits."""
    columns = max(1, work.passes - 1) * global_rows
    tiles = TILES * tile * columns + min(rows * columns, KEPT_LOGITS)
    return FLOAT * (2 * (columns + rows) * work.width + tiles)


def describe(model: nn.Module, width: int) -> Step:
    """Count the parameters of a model, and the bytes of its blocks, which FSDP gathers one after the other."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    total = sum(tensor.nbytes for tensor in tensors)
    # The classes of transformer layers, which FSDP wraps.
    layers = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [list(block.parameters()) for block in model.modules() if type(block).__name__ in layers]
    block_bytes = [sum(tensor.nbytes for tensor in block) for block in blocks]
    trained_in_blocks = [sum(tensor.numel() for tensor in block if tensor.requires_grad) for block in blocks]
    count = sum(tensor.numel() for tensor in trained)
    return Step(
        trained=count,
        frozen=sum(tensor.numel() for tensor in frozen),
        trained_bytes=sum(tensor.nbytes for tensor in trained),
        frozen_bytes=sum(tensor.nbytes for tensor in frozen),
        largest_block=max(block_bytes, default=total),
        outside=total - sum(block_bytes),
        largest_trained_block=max(trained_in_blocks, default=count),
        width=width,
    )
