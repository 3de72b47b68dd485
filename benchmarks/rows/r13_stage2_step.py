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
    from benchmarks.stage2_inputs import write_inputs

    return {
        **write_inputs(PICTURES, words=12, hidden=256, vision=VISION),
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
    """The same steps on prepared batches, without a Trainer."""
    from benchmarks.stage2_inputs import bare_loop, make_trainer

    fields = _fields()
    loader = make_trainer(fields).get_train_dataloader()
    batches = [batch for batch, _ in zip(loader, range(STEPS), strict=False)]

    def work() -> Outcome:
        losses, metrics = bare_loop(make_trainer(fields), batches)
        return Outcome({"losses": losses}, metrics)

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
