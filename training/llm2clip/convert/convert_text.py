"""Convert the checkpoint of an LLM to a text tower."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm2clip.convert.checkpoint import Checkpoint, compare_tensors, open_checkpoint
from llm2clip.utils.attention_probe import verify_text_tower
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.progress import track
from llm2clip.utils.towers import original_prompt, prompted, save_text_tower
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel

DECODER = "decoder."
PREFIXES = ("model.", "")
DROPPED = {
    r"lm_head\..*": "the language modeling head is not part of an encoder",
    r".*rotary_emb\.inv_freq": "computed from the config",
}


def contains_decoder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is that of an LLM."""
    kind = checkpoint.config.get("model_type")
    return _prefix(checkpoint) is not None and isinstance(kind, str) and kind in CONFIG_MAPPING


def _prefix(checkpoint: Checkpoint) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in checkpoint), None)


def convert_text_tower(
    checkpoint: Checkpoint, folder: Path, source: str, adapters: Sequence[str] = (), prompt_name: str | None = None
) -> dict[str, Any]:
    """Write an LLM as the folder of an [`LLM2CLIPTextModel`], with the prompt that the original code uses for it.

    Args:
        checkpoint: Weights of the LLM, in a folder with its config and tokenizer.
        folder: An empty folder.
        source: The name of the checkpoint that the user gave.
        adapters: PEFT adapters to merge, in this order.
        prompt_name: Name of the LLM that determines its prompt.

    Raises:
        ValueError: Weights are missing, not finite or of another shape than in the config, an adapter does not belong
            to the LLM, or the LLM cannot be a text tower.
    """
    assert checkpoint.folder is not None
    fields = dict(checkpoint.config)
    name = prompt_name or fields.get("_name_or_path") or source
    prefix, suffix = original_prompt(fields["model_type"], str(name))
    files = len(checkpoint.files)
    print(f"recognized: an LLM of type {fields['model_type']}, {len(checkpoint)} tensors, {files} file(s)")
    print(f"prompt of {name!r}: " + (f"{prefix!r} caption {suffix!r}" if prefix or suffix else "none"))
    fields.pop("auto_map", None)
    with wrap_read_errors(checkpoint.folder / "config.json"):
        decoder_config = CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
    with wrap_read_errors(checkpoint.folder):
        tokenizer, prompt = prompted(
            AutoTokenizer.from_pretrained(checkpoint.folder), {"prompt_prefix": prefix, "prompt_suffix": suffix}
        )
        config = LLM2CLIPTextConfig(decoder_config=decoder_config, **prompt)
    dtype = _checked(checkpoint, config)
    with wrap_read_errors(checkpoint.folder):
        base = LLM2CLIPTextModel.from_decoder(str(checkpoint.folder), decoder_kwargs={"dtype": dtype})
    decoder: Any = base.decoder
    for adapter in adapters:
        decoder = _merged(decoder, adapter)
    tower = LLM2CLIPTextModel(config, decoder=decoder)
    verify_text_tower(tower)
    save_text_tower(tower, tokenizer, folder)
    if tower.fingerprint(open_checkpoint(folder)) != tower.config.fingerprint:
        raise RuntimeError("the weights changed when they were saved; please report this.")
    recognized = "an LLM" + "".join(f" + {adapter}" for adapter in adapters)
    return {"recognized": recognized, "prompt": prefix + "..." + suffix}


def _checked(checkpoint: Checkpoint, config: LLM2CLIPTextConfig) -> torch.dtype:
    """Check that all weights of the tower are there and finite, print what becomes of them, and return their dtype."""
    assert checkpoint.folder is not None
    with wrap_read_errors(checkpoint.folder / "config.json"), torch.device("meta"):
        model = LLM2CLIPTextModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = _prefix(checkpoint) or ""
    dropped = {name: reason for name in checkpoint for end, reason in DROPPED.items() if re.fullmatch(end, name)}
    names = {name: DECODER + name.removeprefix(prefix) for name in checkpoint if name not in dropped}
    found = {ours: checkpoint.shapes[theirs] for theirs, ours in names.items()}
    compare_tensors(f"the LLM {checkpoint.path}", expected, found)
    print(f"renamed ({len(names)}): {prefix}* -> {DECODER}*")
    for theirs, reason in dropped.items():
        print(f"dropped: {theirs}: {reason}")
    print("missing: none")
    dtypes = set[torch.dtype]()
    for name in track(names, "Checking weights", unit="weight"):
        tensor = checkpoint[name]
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {checkpoint.origin[name]} contains NaN or infinity: it is damaged.")
        dtypes.add(tensor.dtype)
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _merged(decoder: Any, adapter: str) -> Any:
    peft_config = PeftConfig.from_pretrained(adapter)
    model = PeftModel(decoder, peft_config)
    wanted = {name for name in model.state_dict() if "lora_" in name}
    missing = wanted & set(model.load_adapter(adapter, "default", is_trainable=False).missing_keys)
    if missing:
        raise ValueError(
            f"{adapter} has no weights for {len(missing)} of the layers in its config "
            f"({', '.join(sorted(missing)[:3])}): it is the adapter of another LLM, or of one with a language "
            "modeling head."
        )
    print(f"merged: {adapter} (rank {peft_config.r}, alpha {peft_config.lora_alpha})")
    return model.merge_and_unload()
