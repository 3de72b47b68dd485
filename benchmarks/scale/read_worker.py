"""A process that reads the training rows of stage 2 and does nothing with them; torchrun starts several.

    torchrun ... -m benchmarks.scale.read_worker SETTINGS.json

Writes `read-RANK.json` beside the settings: seconds to the first batch, rows and seconds after it, and seconds to the
first batch of a run that is resumed in the middle of the epoch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    from llm2clip.trainers.run_stage2 import build_trainer
    from llm2clip.trainers.stage2_config import Stage2Recipe
    from llm2clip.utils.processes import leave_process_group
    from llm2clip.utils.settings import build_config

    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    config = build_config(Stage2Recipe, settings["stage2"])
    trainer: Any = build_trainer(config)
    stream, batch = trainer.train_dataset, config.per_device_train_batch_size
    stream.batch_size, stream.start = batch, 0
    stream.lanes = lanes = stream.choose_lanes(config.dataloader_num_workers)
    figures = _read(iter(trainer.get_train_dataloader()), settings["batches"], batch)
    middle = stream.num_rows // (2 * batch * config.world_size)
    stream.start = middle * lanes.batch
    start = time.perf_counter()
    next(iter(trainer.get_train_dataloader()))
    figures |= {"resume_seconds": time.perf_counter() - start, "resumed_at": middle, "lanes": lanes.number}
    Path(path).with_name(f"read-{config.process_index}.json").write_text(json.dumps(figures), encoding="utf-8")
    leave_process_group()


def _read(batches: Iterator[Any], number: int, batch_size: int) -> dict[str, float]:
    start = time.perf_counter()
    keys = set(next(batches)["keys"])
    first = time.perf_counter()
    for _ in range(number):
        found = next(batches)
        assert found["llm_embeds"].shape[0] == batch_size
        keys |= set(found["keys"])
    seconds = time.perf_counter() - first
    if len(keys) != (number + 1) * batch_size:
        raise RuntimeError(f"{len(keys)} rows were read in {(number + 1) * batch_size}.")
    return {"first_seconds": first - start, "rows": number * batch_size, "seconds": seconds}


if __name__ == "__main__":
    main(sys.argv[1])
