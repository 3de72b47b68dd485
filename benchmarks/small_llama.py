"""A small Llama and captions for it, identical in every environment and without downloads."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from pathlib import Path

# Written by transformers 4, which cannot read the tokenizers of version 5.
TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "golden" / "llm2vec_llama_a_hf"
# llm2vec selects the prompt by this name; it is the prompt of the published LLM2CLIP text towers.
PROMPTED_NAME = "meta-llama/Meta-Llama-3-8B-Instruct"
PROMPT = {"prompt_prefix": "<|start_header_id|>user<|end_header_id|>\n\n", "prompt_suffix": "<|eot_id|>"}
HIDDEN, MLP, LAYERS, HEADS, KEY_HEADS = 512, 1408, 8, 8, 2
WORDS = (
    "a the of in on with red blue old small large quiet crowded wooden stone glass river market street mountain "
    "house bridge tower garden child woman man dog horse bird walks stands holds carries looks behind under near "
    "and while whose evening morning light shadow water snow yellow umbrella bicycle window painting station"
)


def captions(number: int) -> list[str]:
    """Generate distinct captions: many short ones, and a few long descriptions of up to 450 tokens."""
    rng, vocabulary = random.Random(0), WORDS.split()
    texts: dict[str, None] = {}
    while len(texts) < number:
        words = min(200, max(3, round(rng.lognormvariate(1.75, 1.05))))
        texts[" ".join(rng.choice(vocabulary) for _ in range(words))] = None
    return list(texts)


def new_folder() -> Path:
    """Create a temporary folder, which is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="llm2clip-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def write_llm(path: Path, hidden: int = HIDDEN, mlp: int = MLP, layers: int = LAYERS) -> Path:
    """Write the LLM and its tokenizer into a folder, in a form that transformers 4 and 5 read.

    Args:
        mlp: Intermediate size of the MLPs.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / file, path / file)
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 512,
        "_name_or_path": PROMPTED_NAME,
    }
    (path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        llm = AutoModel.from_config(AutoConfig.from_pretrained(path))
    generator = torch.Generator().manual_seed(0)
    # Large enough that attention is not uniform: a wrong mask then changes the result.
    weights = {
        name: torch.ones(weight.shape)
        if weight.ndim == 1
        else torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
        for name, weight in llm.named_parameters()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_text_tower(folder: Path, **sizes: int) -> Path:
    """Write such an LLM as a text tower, as stage 1 does; `sizes` are those of `write_llm`."""
    from llm2clip.models.towers import open_text_tower, save_text_tower

    save_text_tower(*open_text_tower(str(write_llm(new_folder(), **sizes)), dtype="float32", **PROMPT), folder)
    return folder
