"""The graphs that `llm2clip export-onnx` writes: from pixels or tokens to unit vectors of the common space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.encoders.query_encoder import QueryEncoder
from modeling_llm2clip.modeling_llm2clip_utils import unit_features

BATCH, LENGTH = torch.export.Dim("batch", max=2**15), torch.export.Dim("length", max=2**17)


class Graph(nn.Module):
    """What is exported.

    Args:
        model: What it is a part of.
        zeros: How many zeros follow each row, by which no cosine changes.

    Attributes:
        inputs: Sizes that may vary of each input, in the order of the arguments of `forward`.
        output: Name of the output, unit rows.
    """

    inputs: dict[str, Any]
    output = "text_embeds"

    def __init__(self, model: Any, zeros: int = 0) -> None:
        super().__init__()
        self.model, self.zeros = model, zeros

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random inputs with the given batch size."""
        raise NotImplementedError

    def _filled(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, self.zeros)) if self.zeros else rows


class VisionGraph(Graph):
    """Graph from pixels `(batch, channels, height, width)` to `image_embeds` `(batch, projection_dim + zeros)`.

    Args:
        image_size: Height and width, which are fixed.
        name: Name of the input.
    """

    output = "image_embeds"

    def __init__(self, model: Any, image_size: tuple[int, int], name: str, zeros: int) -> None:
        super().__init__(model, zeros)
        self.image_size, self.inputs = image_size, {name: {0: BATCH}}

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._filled(unit_features(self.model.get_image_features(pixel_values.to(self.model.dtype))))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.model.config.vision_config.num_channels, *self.image_size),)


class TextGraph(Graph):
    """Graph from `input_ids` and `attention_mask` `(batch, length)` to `text_embeds` `(batch, projection_dim)`.

    The tokens come from the tokenizer of the model, which adds its prompt, or from that of its query encoder.
    """

    inputs = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if isinstance(self.model, QueryEncoder):
            return self.model(input_ids, attention_mask)
        return unit_features(self.model.get_text_features(input_ids, attention_mask))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random captions of 8 to 8 + `batch` tokens after the prompt prefix, padded on the left."""
        if isinstance(self.model, QueryEncoder):
            table = self.model.backbone
            vocabulary = table.num_embeddings if self.model.is_static else self.model.config.vocab_size
            return self._random(vocabulary, 0, batch)
        text = self.model.config.text_config
        return self._random(text.decoder_config.vocab_size, text.num_prefix_tokens, batch)

    @staticmethod
    def _random(vocabulary: int, prefix: int, batch: int) -> tuple[Tensor, Tensor]:
        lengths = prefix + 8 + torch.arange(batch)
        positions = torch.arange(int(lengths.max()))
        mask = (positions >= lengths.max() - lengths[:, None]).long()
        return torch.randint(vocabulary, mask.shape), mask


class PaddedText(Graph):
    """Graph from `text` int32 `(batch, length)`, tokens that are padded to a fixed length, without a mask.

    Args:
        graph: The graph of tokens and masks.
        length: Tokens of every text.
        padding: The token that stands for padding and for nothing else.
        replacement: What the text model gets in its place.
    """

    inputs = {"text": {0: BATCH}}

    def __init__(self, graph: TextGraph, length: int, padding: int, replacement: int, zeros: int) -> None:
        super().__init__(graph, zeros)
        self.length, self.padding, self.replacement = length, padding, replacement

    def forward(self, text: Tensor) -> Tensor:
        is_token = text != self.padding
        ids = torch.where(is_token, text, self.replacement).long()
        return self._filled(self.model(ids, is_token.long()))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        ids, mask = (F.pad(rows, (0, self.length))[:, : self.length] for rows in self.model.example(batch))
        return (torch.where(mask.bool(), ids, self.padding).int(),)
