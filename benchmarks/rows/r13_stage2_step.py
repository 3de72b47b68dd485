"""R13: the overhead of a training step of stage 2."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

# A ViT-S/16 at 112 pixels.
VISION = {"hidden": 384, "layers": 12, "patch": 16, "size": 112}
BATCH, STEPS = 32, 5
# More than the steps consume: the worker prefetches until the end.
PICTURES = BATCH * (STEPS + 4)


def _fields() -> dict[str, Any]:
    """Write data and towers into a temporary folder; return the settings of the run."""
    from benchmarks import stage2_inputs

    folder = stage2_inputs.temporary_folder()
    sources = stage2_inputs.write_pictures(folder, PICTURES, words=12)
    text = stage2_inputs.write_text_tower(folder, hidden=256, layers=1)
    return {
        "vision_model_name_or_path": str(stage2_inputs.write_vision_tower(folder, **VISION)),
        "text_model_name_or_path": str(text),
        "embedding_cache": str(stage2_inputs.embed(folder, text, sources)[0]),
        "sources": sources,
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "projection_dim": 512,
    }


def _ours() -> Work:
    from benchmarks import stage2_inputs

    fields = _fields()

    def work() -> Outcome:
        losses, metrics = stage2_inputs.train(stage2_inputs.make_trainer(fields))
        return Outcome({"losses": losses}, metrics)

    return work


def _bare_loop() -> Work:
    """Forward, loss, backward and optimizer on prepared batches, with the same model and settings."""
    import torch

    from benchmarks.stage2_inputs import StepClock, make_trainer
    from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule

    fields = _fields()
    trainer = make_trainer(fields)
    config = trainer.args
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(STEPS), strict=False)]

    def work() -> Outcome:
        model = make_trainer(fields).model.train()
        groups = parameter_groups(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            vision_layer_decay=config.vision_layer_decay,
        )
        optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = warmup_cosine_schedule(optimizer, 0, STEPS)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        labels, clock, losses = torch.arange(BATCH), StepClock(), []
        for batch in batches:
            output = model(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"])
            logits = output.logits_per_image
            loss = torch.nn.functional.cross_entropy(logits, labels) / 2
            loss = loss + torch.nn.functional.cross_entropy(logits.T, labels) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                clamp_logit_scale(model)
            losses.append(loss.item())
            clock.step_ends()
        return Outcome({"losses": losses}, clock.metrics())

    return work


def contests(device: str) -> list[Contest]:
    note = (
        "Seconds are those of one step, from the end of the first to the end of the last of "
        f"{STEPS}. Ours reads JPEGs from parquet, decodes, crops and collates in one worker process, gathers the "
        "cached embeddings, and logs after every step; *wall* is what a user with two cores waits, *cpu* is the main "
        "process alone. The bare loop has its batches in memory, and is the limit."
    )
    goals = (Goal("bare loop", "wall", 1.08), Goal("bare loop", "cpu", 1.08))
    contestants = {"ours": Contestant(_ours), "bare loop": Contestant(_bare_loop)}
    return [Contest(f"ViT-S/16 at 112 px, batch {BATCH}", contestants, goals, {"losses": 1e-4}, rounds=3, note=note)]


ROW = Row("R13", "a step of stage 2 with cached embeddings, all included", contests)
