"""Convert the checkpoint of an LLM to a text tower, shard by shard, with one shard in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm2clip.command_line.progress import track
from llm2clip.convert.checkpoint import Checkpoint, compare_tensors, open_checkpoint
from llm2clip.files.atomic import write_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.models.attention_probe import probe_from_disk, verify_text_tower
from llm2clip.models.towers import original_prompt, prompted, save_text_tower
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

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
    checkpoint: Checkpoint, folder: Path, source: str, adapters: Sequence[str], prompt_name: str | None
) -> dict[str, Any]:
    """Write an LLM as the folder of an [`LLM2CLIPTextModel`], with the prompt that the original code uses for it.

    Args:
        checkpoint: Weights of the LLM, in a folder with its config and tokenizer.
        folder: An empty folder.
        source: The name of the checkpoint that the user gave.
        adapters: PEFT adapters to merge; this loads the whole LLM into memory.
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
    print(f"prompt of {name!r}: " + (f"{prefix!r}, the caption, {suffix!r}" if prefix or suffix else "no prompt"))
    fields.pop("auto_map", None)
    with wrap_read_errors(checkpoint.folder / "config.json"):
        decoder_config = CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
    with wrap_read_errors(checkpoint.folder):
        tokenizer, prompt = prompted(
            AutoTokenizer.from_pretrained(checkpoint.folder), {"prompt_prefix": prefix, "prompt_suffix": suffix}
        )
        config = LLM2CLIPTextConfig(decoder_config=decoder_config, **prompt)
    if adapters:
        _merge(checkpoint, config, tokenizer, adapters, folder)
    else:
        _stream(checkpoint, config, tokenizer, folder)
    recognized = "an LLM" + "".join(f" + {adapter}" for adapter in adapters)
    return {"recognized": recognized, "prompt": prefix + "..." + suffix}


def _stream(
    checkpoint: Checkpoint, config: LLM2CLIPTextConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    assert checkpoint.folder is not None
    with wrap_read_errors(checkpoint.folder / "config.json"), torch.device("meta"):
        model = LLM2CLIPTextModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = _prefix(checkpoint) or ""
    dropped = {name: reason for name in checkpoint for end, reason in DROPPED.items() if re.fullmatch(end, name)}
    names = {name: DECODER + name.removeprefix(prefix) for name in checkpoint if name not in dropped}
    compare_tensors(
        f"the LLM {checkpoint.path}", expected, {ours: checkpoint.shapes[theirs] for theirs, ours in names.items()}
    )
    print(f"renamed ({len(names)}): {prefix}* -> {DECODER}*")
    for theirs, reason in dropped.items():
        print(f"dropped: {theirs}: {reason}")
    print("missing: none")
    weight_map, total, dtypes = dict[str, str](), 0, set[torch.dtype]()
    for number, file in enumerate(track(checkpoint.files, "Writing shards", unit="file"), start=1):
        shard = {
            ours: checkpoint[name].contiguous() for name, ours in names.items() if checkpoint.origin[name] == file
        }
        part = f"-{number:05d}-of-{len(checkpoint.files):05d}" if len(checkpoint.files) > 1 else ""
        target = f"model{part}.safetensors"
        for name, tensor in shard.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} in {file} contains NaN or infinity: the checkpoint is damaged.")
            weight_map[name] = target
            total += tensor.nbytes
            dtypes.add(tensor.dtype)
        save_file(shard, folder / target, metadata={"format": "pt"})
        del shard
    if len(checkpoint.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    config.dtype = config.decoder_config.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    written = open_checkpoint(folder)
    config.fingerprint = model.fingerprint(written)
    config.architectures = [LLM2CLIPTextModel.__name__]
    custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_readable_by_version_4(folder)
    compare_tensors("an LLM", expected, written.shapes)
    with wrap_read_errors(checkpoint.folder):
        config.verified_attention = probe_from_disk(str(folder))
    config.save_pretrained(folder)


def _merge(
    checkpoint: Checkpoint,
    config: LLM2CLIPTextConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[str],
    folder: Path,
) -> None:
    base = LLM2CLIPTextModel.from_decoder(str(checkpoint.folder))
    decoder: Any = base.decoder
    for adapter in adapters:
        peft_config = PeftConfig.from_pretrained(adapter)
        model = PeftModel(decoder, peft_config)
        wanted = {name for name in model.state_dict() if "lora_" in name}
        missing = wanted & set(model.load_adapter(adapter, "default", is_trainable=False).missing_keys)
        if missing:
            raise ValueError(
                f"{adapter} has no weights for {len(missing)} of the layers in its config "
                f"({', '.join(sorted(missing)[:3])}): it is the adapter of another LLM, or of one with a "
                "language modeling head."
            )
        decoder = model.merge_and_unload()
        print(f"merged: {adapter} (rank {peft_config.r}, alpha {peft_config.lora_alpha})")
    tower = LLM2CLIPTextModel(config, decoder=decoder)
    verify_text_tower(tower)
    save_text_tower(tower, tokenizer, folder)
    loaded = LLM2CLIPTextModel.from_pretrained(folder)
    if loaded.fingerprint() != tower.fingerprint():
        raise RuntimeError("the merged weights changed when they were saved; please report this.")
