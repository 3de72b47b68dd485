"""R14: stage 2 with cached embeddings, with the frozen LLM online, and with LoRA on the LLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

VISION = {"hidden": 256, "layers": 8, "patch": 16, "size": 112}
LLM = {"hidden": 512, "layers": 6}
# About 60 tokens with the prompt.
WORDS = 20
BATCH, STEPS = 32, 4
PICTURES = BATCH * (STEPS + 4)
# All linear layers, as in the paper.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _fields(cached: bool) -> tuple[dict[str, Any], float]:
    """Write the inputs; return the settings of the run and the CPU seconds of the embedding cache."""
    from benchmarks import stage2_inputs

    folder = stage2_inputs.temporary_folder()
    sources = stage2_inputs.write_pictures(folder, PICTURES, WORDS)
    text = stage2_inputs.write_text_tower(folder, **LLM)
    fields = {
        "vision_model_name_or_path": str(stage2_inputs.write_vision_tower(folder, **VISION)),
        "text_model_name_or_path": str(text),
        "sources": sources,
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "projection_dim": 256,
        "adapter_num_layers": 2,
    }
    if not cached:
        return {**fields, "online_text_model": True}, 0.0
    cache, seconds = stage2_inputs.embed(folder, text, sources)
    return {**fields, "embedding_cache": str(cache)}, seconds


def _from_cache() -> Work:
    from benchmarks import stage2_inputs

    fields, seconds = _fields(cached=True)

    def work() -> Outcome:
        losses, metrics = stage2_inputs.train(stage2_inputs.make_trainer(fields))
        once = seconds / PICTURES * BATCH
        return Outcome({"losses": losses, "first loss": losses[0]}, {**metrics, "embedding a batch once": once})

    return work


def _with_llm(prepare: Callable[[Any], None]) -> Work:
    from benchmarks import stage2_inputs

    fields, _ = _fields(cached=False)

    def work() -> Outcome:
        trainer = stage2_inputs.make_trainer(fields)
        prepare(trainer.model.text_model)
        losses, metrics = stage2_inputs.train(trainer)
        return Outcome({"losses": losses, "first loss": losses[0]}, metrics)

    return work


def _frozen(text_model: Any) -> None:
    """Leave the LLM unchanged."""


def _add_lora(text_model: Any) -> None:
    """Add LoRA as in stage 1; the output is unchanged before the first step."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS), text_model)


def contests(device: str) -> list[Contest]:
    note = (
        "Seconds are those of one step, of the main process. By arithmetic the LLM's forward pass is 1.3 of the "
        "vision tower's training step here, as Llama-3.1-8B's on captions of 110 tokens is of EVA02-L/14-336's. The "
        "paper's table (appendix, 16 A100) has 1.3 h, 5.5 h and 17 h, ratios of 0.24 and 0.08: there the cache also "
        "leaves room for a four times larger batch. Embedding a batch once, which every epoch after the first has "
        "for nothing, is in the figures of results.jsonl. There is no limit to compare with."
    )
    title = f"ViT of 6M, LLM of 21M parameters, batch {BATCH}"
    cache = Contestant(_from_cache)
    online, lora = (Contestant(partial(_with_llm, prepare)) for prepare in (_frozen, _add_lora))
    against_online, against_lora = Goal("LLM online", "cpu", 0.6), Goal("LoRA", "cpu", 0.4)
    peers = {"ours": cache, "LLM online": online}, {"ours": cache, "LoRA": lora}
    return [
        Contest(f"{title}; frozen LLM online", peers[0], (against_online,), {"losses": 1e-3}, rounds=2, note=note),
        Contest(f"{title}; LoRA on the LLM", peers[1], (against_lora,), {"first loss": 1e-3}, rounds=2),
    ]


ROW = Row("R14", "a step of stage 2 with the frozen LLM's embeddings from the cache", contests)
