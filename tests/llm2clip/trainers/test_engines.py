"""Engines, precisions, towers and parts that train: every combination trains and resumes as one process does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel
from transformers.utils import is_accelerate_available

from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers import engines
from tests.processes import run_ranks

TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2": "dinov2", "eva02": "eva02"}
PARTS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_vision": "all"},
    "tower": {},
    "lora": {"embedding_cache": None, "lora_rank": 4},
    "online": {"embedding_cache": None, "online_text_model": True},
}
# How far apart losses and weights may be, relatively; the loss of one process in bf16 is 0.01 from that in float32.
PRECISIONS = {"float32": 2e-5, "bf16": 0.02}
# Rows of all processes in a step.
BATCH = 8
Order = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def order(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Run parts with an engine, unless they were run before; returns the records of each process by part."""
    folder = tmp_path_factory.mktemp("engines")
    towers = {name: save_tower(folder / name, kind) for name, kind in TOWERS.items()}
    known: dict[Any, list[dict[str, Any]]] = {}

    def run(engine: str, precision: str, tower: str, *parts: str) -> list[dict[str, Any]]:
        key = engine, precision, tower, parts
        if key not in known:
            place, processes = folder / f"{len(known)}-{engine}-{precision}-{tower}", 1 if engine == "one" else 2
            place.mkdir()
            cells = {
                part: small_runs.stage2_fields(place / part, towers[tower], inputs.text, inputs.cache)
                | fields(precision, part, processes)
                for part in parts
            }
            path = place / "order.json"
            path.write_text(json.dumps({"engine": engine, "cells": cells}))
            run_ranks([engines.__file__, str(path)], processes)
            known[key] = [json.loads((place / f"records-{rank}.json").read_text()) for rank in range(processes)]
        return known[key]

    return run


def save_tower(folder: Path, kind: str) -> str:
    if kind == "eva02":
        return small_runs.save_vision_tower(folder)
    torch.manual_seed(0)
    AutoModel.from_config(tiny.other_vision_config(kind)).save_pretrained(folder)
    tiny.processor().image_processor.save_pretrained(folder)
    return str(folder)


def fields(precision: str, part: str, processes: int) -> dict[str, Any]:
    return {
        **PARTS[part],
        "bf16": precision == "bf16",
        # The files are in float32.
        **({"text_model_dtype": "bfloat16"} if precision == "bf16" and part in ("lora", "online") else {}),
        "sources": [small_runs.concepts(max_samples=2 * BATCH)],
        "eval_sources": {"validation": small_runs.concepts("validation", caption_columns=["caption"], max_samples=8)},
        "per_device_train_batch_size": BATCH // processes,
        "max_steps": 2,
        "save_steps": 1,
    }


def check(order: Order, engine: str, precision: str, tower: str, part: str, parts: tuple[str, ...]) -> None:
    both = [records[part] for records in order(engine, precision, tower, *parts)]
    assert not any("error" in record for record in both), next(x["error"] for x in both if "error" in x)
    (one,), two = [records[part] for records in order("one", precision, tower, *parts)], both[0]
    tolerance = PRECISIONS[precision]
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance)
    # Float32, whatever the towers compute in: the scale of 16 bits would be 0.03 off.
    assert two["scales"] == pytest.approx(one["scales"], abs=1e-4)
    assert two["dtypes"] == ["torch.float32"]
    assert two["reduced"] == (["torch.float32"] if engine == "fsdp" else [])
    assert two["weights"] == pytest.approx(one["weights"], rel=tolerance)
    assert two["resumed"] == pytest.approx(two["losses"], abs=1e-6)
    assert two["resumed_weights"] == pytest.approx(two["weights"], rel=1e-6)


# Every pair of an engine, a precision and a tower; the other ones are nightly.
PAIRS = {
    *(("ddp", "float32", tower) for tower in ("siglip", "eva02")),
    *(("fsdp", "bf16", tower) for tower in ("siglip", "eva02")),
    *(("ddp", "bf16", tower) for tower in ("clip", "dinov2")),
    *(("fsdp", "float32", tower) for tower in ("clip", "dinov2")),
}
RUNS = [
    pytest.param(*run, marks=[pytest.mark.nightly] * (run not in PAIRS))
    for run in itertools.product(("ddp", "fsdp"), PRECISIONS, TOWERS)
]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("engine", "precision", "tower"), RUNS)
def test_two_processes_train_as_one(engine: str, precision: str, tower: str, part: str, order: Order) -> None:
    check(order, engine, precision, tower, part, tuple(PARTS))


@pytest.mark.skipif(not is_accelerate_available("1.15.0"), reason="FSDP needs accelerate 1.15")
def test_fsdp_in_bf16_trains_as_one_process(order: Order) -> None:
    check(order, "fsdp", "bf16", "clip", "online", ("online",))
