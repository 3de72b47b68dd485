"""Names of settings: what other tools call ours, and which of transformers' Trainer `--help` shows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# The first in the help of a stage.
MOST_USED = (
    *("vision_model_name_or_path", "text_model_name_or_path", "model_name_or_path", "student"),
    *("sources", "embedding_cache", "eval_sources", "output_dir"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tower_chunk_size", "bf16", "activation_checkpointing", "warmup_steps", "lr_scheduler_type", "weight_decay"),
    *("lora_rank", "lora_alpha", "lora_dropout", "seed"),
)
# The options of the Trainer that `--help` shows, of more than a hundred.
SHOWN_TRAINER_OPTIONS = (
    *("logging_steps", "report_to", "run_name", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("push_to_hub", "hub_model_id", "dataloader_num_workers", "max_grad_norm", "optim", "fp16", "torch_compile"),
)
# What users of open_clip, sentence-transformers and timm type. Of several settings, the first that the command has is
# meant.
NAMES_ELSEWHERE = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "opt": "optim",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "grad_clip_norm": "max_grad_norm",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "accum_freq": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "grad_checkpointing": "activation_checkpointing",
    "precision": "bf16 dtype",
    "torch_dtype": "dtype text_model_dtype",
    "workers": "dataloader_num_workers num_workers",
    "train_data": "sources",
    "dataset": "sources data",
    "dataset_name": "sources data",
    "data": "sources",
    "data_path": "sources",
    "val_data": "eval_sources",
    "eval_dataset": "eval_sources",
    "logs": "output_dir",
    "output": "output_dir",
    "save_frequency": "save_steps",
    "model": "model_name_or_path vision_model_name_or_path text_model_name_or_path",
    "pretrained": "vision_model_name_or_path model_name_or_path",
    "llm": "text_model_name_or_path model_name_or_path",
    "embed_dim": "projection_dim",
    "lock_image": "freeze_vision",
    "temperature": "scale logit_scale_init_value",
    "lora_r": "lora_rank",
    "target_modules": "lora_target_modules",
    "max_length": "max_text_length block_size",
    "max_seq_length": "max_text_length block_size",
}


def nearest_field(name: str, known: Iterable[str]) -> str | None:
    """The setting that was probably meant by a name: the one that other tools call so, or the one most like it."""
    known, name = list(known), name.strip("-").replace("-", "_").lower()
    named = [field for field in NAMES_ELSEWHERE.get(name, "").split() if field in known]
    return next(iter([*named, *difflib.get_close_matches(name, known, n=1)]), None)
