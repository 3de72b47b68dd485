"""The sigmoid loss of SigLIP: binary classification of every image-text pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses.matches import gather_batch
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE, Gradients, Positives, Tiles


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    caption_ids: Tensor | None = None,
    image_caption_ids: Tensor | None = None,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """Compute the sigmoid loss over the batch of all ranks (SigLIP, Zhai et al. 2023, arXiv 2303.15343).

    `-1/n sum_ij log sigmoid(t_ij (scale image_i . text_j + bias))`, where `t_ij` is 1 if text j is a caption of image
    i and -1 otherwise. With ids, all captions of an image count, whichever row they were sampled for. The paper starts
    training at a scale of 10 and a bias of -10.

    Loss and gradients are computed in one pass over the logits, in tiles of rows. Computation is in float32 (float64
    for float64 inputs), regardless of autocast and of the inputs' dtype.

    See [`clip_loss`] for the result, the errors and the other arguments.

    Args:
        logit_bias: 0-d summand of all logits.
    """
    batch = gather_batch("sigmoid_loss", image_embeds, text_embeds, caption_ids, image_caption_ids)
    inputs = [image_embeds, batch.texts]
    for number in (logit_scale, logit_bias):
        # Not `new_tensor`, whose copy to a GPU would wait for it.
        inputs.append(number if isinstance(number, Tensor) else image_embeds.new_full((), number, dtype=torch.float32))
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad ignores no_grad; detached inputs make forward skip the gradients.
        inputs = [x.detach() for x in inputs]
    return _TiledSigmoidLoss.apply(*inputs, batch.positives, tile_size) * batch.weight


class _TiledSigmoidLoss(torch.autograd.Function):
    """Sum of `softplus(-t z)` over logits `z` with `t` in {-1, 1}; the gradient of `z` is `-t sigmoid(-t z)`."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, positives: Positives, tile_size: int
    ) -> Tensor:
        tiles = Tiles(queries, keys, scale, tile_size)
        gradients = Gradients(tiles, tiles.scale.new_ones(()), ctx.needs_input_grad[:3])
        losses, bias_gradients = tiles.queries.new_zeros(2, len(queries))
        buffer = tiles.buffer()
        with torch.autocast(queries.device.type, enabled=False):
            for start, stop in tiles.bounds():
                logits = tiles.logits(start, stop, buffer[: stop - start]).add_(bias)
                pairs = positives(start, stop)
                logits[pairs] = -logits[pairs]
                losses[start:stop] = F.softplus(logits).sum(dim=1)
                if any(ctx.needs_input_grad):
                    grad_logits = logits.sigmoid_()
                    grad_logits[pairs] = -grad_logits[pairs]
                    bias_gradients[start:stop] = grad_logits.sum(dim=1)
                    gradients.add(start, stop, grad_logits)
        grad_bias = bias_gradients.sum() if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(gradients.queries, gradients.keys, gradients.scale, grad_bias)
        ctx.dtypes = (queries.dtype, keys.dtype, scale.dtype, bias.dtype)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Apply the factor (1/rows, the loss scale of fp16 training) before rounding to the inputs' dtype.
        grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None)
