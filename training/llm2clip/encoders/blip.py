"""BLIP as a model of images and texts in one space: the two towers of its retrieval model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import BlipForImageTextRetrieval
from transformers.modeling_outputs import BaseModelOutputWithPooling


class BlipRetrievalModel(BlipForImageTextRetrieval):
    """The published retrieval models of BLIP (`Salesforce/blip-itm-base-coco`), whose embeddings have no methods.

    They are those of its contrastive score (`use_itm_head=False`): the projected first token of each tower. The
    matching head, which reads an image and a text together, ranks no gallery and is not used.
    """

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor, **unused: Any
    ) -> BaseModelOutputWithPooling:
        """Compute `(texts, width)`, not normalised, as `pooler_output`."""
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(pooler_output=self.text_proj(output.last_hidden_state[:, 0]))

    def get_vision_features(self, pixel_values: Tensor) -> Tensor:
        """Compute the first token before the projection, `(images, hidden)`; `pooler_output` is normalised twice."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 0]

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Compute `(images, width)`, not normalised, as `pooler_output`."""
        return BaseModelOutputWithPooling(pooler_output=self.vision_proj(self.get_vision_features(pixel_values)))
