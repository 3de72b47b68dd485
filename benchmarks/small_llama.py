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


def captions(number: int, seed: int = 0) -> list[str]:
    """Generate distinct captions: many short ones, and a few long descriptions of up to 450 tokens.

    Args:
        number: Number of captions.
        seed: Random seed.
    """
    rng, vocabulary = random.Random(seed), WORDS.split()
    found: dict[str, None] = {}
    while len(found) < number:
        words = min(200, max(3, round(rng.lognormvariate(1.75, 1.05))))
        found[" ".join(rng.choice(vocabulary) for _ in range(words))] = None
    return list(found)


def new_folder() -> Path:
    """Create a temporary folder, which is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="llm2clip-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def write_llm(path: Path, hidden: int = HIDDEN, mlp: int = MLP, layers: int = LAYERS) -> Path:
    """Write the LLM and its tokenizer in a form that transformers 4 and 5 read.

    Args:
        path: The folder.
        hidden: Hidden size.
        mlp: Intermediate size of the MLPs.
        layers: Number of layers.
    """
    import torch
    from safetensors.torch import save_file

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
    generator = torch.Generator().manual_seed(0)
    keys = hidden // HEADS * KEY_HEADS
    shapes = {"embed_tokens": (config["vocab_size"], hidden), "norm": (hidden,)}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.self_attn.q_proj": (hidden, hidden),
            f"layers.{layer}.self_attn.k_proj": (keys, hidden),
            f"layers.{layer}.self_attn.v_proj": (keys, hidden),
            f"layers.{layer}.self_attn.o_proj": (hidden, hidden),
            f"layers.{layer}.mlp.gate_proj": (mlp, hidden),
            f"layers.{layer}.mlp.up_proj": (mlp, hidden),
            f"layers.{layer}.mlp.down_proj": (hidden, mlp),
            f"layers.{layer}.input_layernorm": (hidden,),
            f"layers.{layer}.post_attention_layernorm": (hidden,),
        }
    # Large enough that attention is not uniform: a wrong mask then changes the result.
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
