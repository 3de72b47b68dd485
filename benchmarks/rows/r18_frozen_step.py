"""R18: the overhead of a training step of stage 2 with both towers frozen."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

# Features of 768 values, as those of a ViT-S; its depth does not matter, since the features are stored before.
VISION = {"hidden": 384, "layers": 1, "patch": 16, "size": 112}
PICTURES, BATCH, STEPS = 1024, 512, 40


def _fields() -> dict[str, Any]:
    """Write data and towers into a temporary folder; return the settings of the run."""
    from benchmarks import stage2_inputs

    folder = stage2_inputs.temporary_folder()
    sources = stage2_inputs.write_pictures(folder, PICTURES, words=6)
    text = stage2_inputs.write_text_tower(folder, hidden=512, layers=1)
    return {
        "vision_model_name_or_path": str(stage2_inputs.write_vision_tower(folder, **VISION)),
        "text_model_name_or_path": str(text),
        "embedding_cache": str(stage2_inputs.embed(folder, text, sources)[0]),
        "sources": sources,
        "output_dir": str(folder / "out"),
        "freeze_vision": "all",
        "vision_pooling": "cls_mean",
        "standardize_features": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "dataloader_num_workers": 0,
        "adapter_num_layers": 1,
        "projection_dim": 256,
        # In the bare loop too, reading the loss is a part of logging.
        "logging_steps": 1,
    }


def _ours() -> Work:
    from benchmarks import stage2_inputs

    trainer = stage2_inputs.make_trainer(_fields())

    def work() -> Outcome:
        losses, metrics = stage2_inputs.train(trainer)
        return Outcome({"losses": losses}, metrics)

    return work


def _bare_loop() -> Work:
    """Forward, loss, backward and optimizer on prepared batches, with the same model and settings."""
    import torch
    from torch.nn import functional as F

    from benchmarks.stage2_inputs import StepClock, make_trainer
    from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule

    trainer = make_trainer(_fields())
    config, model = trainer.args, trainer.model.train()
    loader, batches = trainer.get_train_dataloader(), []
    while len(batches) < STEPS:
        loader.set_epoch(len(batches) // len(loader))
        batches += list(loader)

    def work() -> Outcome:
        rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
        groups = parameter_groups(model, **rates, vision_layer_decay=config.vision_layer_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = warmup_cosine_schedule(optimizer, 0, STEPS)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        labels, clock, losses = torch.arange(BATCH), StepClock(), []
        for batch in batches:
            images = model.get_image_features(vision_features=batch["vision_features"]).pooler_output
            texts = model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
            logits = model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
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
        f"Seconds are those of one step, from the end of the first to the end of the last of {STEPS}. Ours reads "
        "stored features and caption embeddings, draws captions, and logs after every step. The bare loop has its "
        "batches in memory, and is the limit."
    )
    goals = (Goal("bare loop", "wall", 1.1), Goal("bare loop", "cpu", 1.1))
    contestants = {"ours": Contestant(_ours), "bare loop": Contestant(_bare_loop)}
    title = f"features of 768, captions of 512, batch {BATCH}"
    return [Contest(title, contestants, goals, {"losses": 1e-4}, rounds=3, note=note)]


ROW = Row("R18", "a step of stage 2 with both towers frozen, all included", contests)
