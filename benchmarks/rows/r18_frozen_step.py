"""R18: the overhead of a training step of stage 2 with both towers frozen."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

# Features of 768 values, as those of a ViT-S; its depth does not matter, since the features are stored before.
VISION = {"hidden": 384, "layers": 1, "patch": 16, "size": 112}
PICTURES, BATCH, STEPS, LOGGING_STEPS = 1024, 512, 40, 10


def _fields() -> dict[str, Any]:
    """Write data and towers into a temporary folder; return the settings of the run."""
    from benchmarks.stage2_inputs import write_inputs

    return {
        **write_inputs(PICTURES, words=6, hidden=512, vision=VISION),
        "freeze_vision": "all",
        "vision_pooling": "cls_mean",
        "standardize_features": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "dataloader_num_workers": 0,
        "adapter_num_layers": 1,
        "projection_dim": 256,
        "logging_steps": LOGGING_STEPS,
    }


def _ours() -> Work:
    from benchmarks import stage2_inputs

    trainer = stage2_inputs.make_trainer(_fields())

    def work() -> Outcome:
        losses, metrics = stage2_inputs.train(trainer)
        return Outcome({"losses": losses}, metrics)

    return work


def _bare_loop() -> Work:
    """The same steps on prepared batches, without a Trainer."""
    from benchmarks.stage2_inputs import bare_loop, make_trainer

    fields = _fields()
    loader, batches = make_trainer(fields).get_train_dataloader(), []
    while len(batches) < STEPS:
        loader.set_epoch(len(batches) // len(loader))
        batches += list(loader)

    def work() -> Outcome:
        losses, metrics = bare_loop(make_trainer(fields), batches)
        ends = range(LOGGING_STEPS, STEPS + 1, LOGGING_STEPS)
        means = [sum(losses[end - LOGGING_STEPS : end]) / LOGGING_STEPS for end in ends]
        return Outcome({"losses": means}, metrics)

    return work


def contests(device: str) -> list[Contest]:
    note = (
        f"Seconds are those of one step, from the end of the first to the end of the last of {STEPS}. Ours reads "
        "stored features and caption embeddings, draws captions, and logs every tenth step. The bare loop has its "
        "batches in memory, and is the limit."
    )
    goals = (Goal("bare loop", "wall", 1.1), Goal("bare loop", "cpu", 1.1))
    contestants = {"ours": Contestant(_ours), "bare loop": Contestant(_bare_loop)}
    title = f"features of 768, captions of 512, batch {BATCH}"
    return [Contest(title, contestants, goals, {"losses": 1e-4}, rounds=3, note=note)]


ROW = Row("R18", "a step of stage 2 with both towers frozen, all included", contests)
