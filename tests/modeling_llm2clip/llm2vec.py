"""The text towers of the golden tensors of llm2vec."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import tiny
from tests.golden import FOLDER, Golden

FIXTURES = [f"llm2vec_{name}" for name in ("llama_a", "llama_b", "mistral_a", "qwen2_a", "gemma_a", "phi3_a")]


def load_text_model(golden: Golden, folder: Path, attention: str = "sdpa", pooling: str = "mean") -> LLM2CLIPTextModel:
    config = AutoConfig.from_pretrained(FOLDER / f"{golden.name}_hf")
    config.architectures = None
    config.save_pretrained(folder)
    save_file(golden.group("state"), folder / "model.safetensors", metadata={"format": "pt"})
    decoder = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype="float32")
    return tiny.wrapped(decoder, pooling=pooling).eval()
