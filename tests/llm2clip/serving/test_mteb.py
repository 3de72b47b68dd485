"""mteb's client of OpenAI-like servers embeds texts and images through ours."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch
from mteb.models import OpenAIAPIEncodeWrapper

from llm2clip.encoders import Encoder
from tests.modeling_llm2clip.awkward_images import picture

TEXTS = ["a small dog", "zwei Kinder spielen Fußball", "a red bus " * 40, "a cat", "a bus"]
PICTURES = [picture(40 + side, 50) for side in range(5)]


@pytest.mark.parametrize("use_chat_template", [True, False])
def test_mteb_gets_the_embeddings_of_the_encoder(
    use_chat_template: bool, client: httpx.Client, encoder: Encoder
) -> None:
    wrapper = OpenAIAPIEncodeWrapper(
        str(client.base_url), "tiny", modalities=["text", "image"], use_chat_template=use_chat_template, max_retries=1
    )

    def encode(batches: Any) -> torch.Tensor:
        options: Any = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 2}
        return torch.from_numpy(np.asarray(wrapper.encode(batches, show_progress_bar=False, **options)))

    rows = encode([{"text": TEXTS[:3]}, {"text": TEXTS[3:]}])
    torch.testing.assert_close(rows, encoder.encode_text(TEXTS), rtol=0, atol=1e-5)
    rows = encode([{"image": PICTURES[:3]}, {"image": PICTURES[3:]}])
    torch.testing.assert_close(rows, encoder.encode_image(PICTURES), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="messages"):  # which have two embeddings, not one
        encode([{"image": PICTURES[:1], "text": TEXTS[:1]}])
