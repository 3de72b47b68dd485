"""What the commands are given: tiny models and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.builders import embedding_models, small_runs, tiny
from tests.documents import stand_ins
from tests.faults.commands import OUT
from tests.golden import load_golden
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.evaluation.strange import write_strange
from tests.llm2clip.quickstart.tiny_run import PROFILE, save_data

GOLDEN = "customclip_a"
STEPS = {"max_steps": 4, "save_steps": 2, "disable_tqdm": True}


def write_inputs(folder: Path) -> None:
    """Write models, data and recipes; the recipes of a stage read what the stages before it have made in `made`."""
    llm = small_runs.save_llm(folder / "llm")
    vision = small_runs.save_vision_tower(folder / "vision")
    _write_data(folder)
    text, cache = (str(folder / "made" / name / OUT) for name in ("stage1", "embed"))
    stage1 = {**small_runs.stage1_fields(Path(OUT), llm), **STEPS}
    concepts = [small_runs.concepts(max_samples=64), small_runs.concepts("validation", max_samples=20)]
    mntp_source = {"path": small_runs.GLOSSES, "caption_columns": ["gloss"], "max_samples": 100}
    shards = {"path": str(folder / "shards/*.tar"), "caption_columns": ["json.shortSV_captions"], "streaming": True}
    embed = {"text_model_name_or_path": text, "output_dir": OUT}
    recipes: dict[str, dict[str, Any]] = {
        "stage1": stage1,
        "mntp": {**stage1, "sources": [mntp_source], "block_size": 32},
        "embed": {**embed, "sources": concepts, "shard_size": 40},
        "quickstart": PROFILE,
        "sidecars": {**embed, "sources": [shards], "store": "sidecars"},
        "stage2": {
            **small_runs.stage2_fields(Path(OUT), vision, text, cache),
            **STEPS,
            "sources": [concepts[0]],
            "eval_sources": {},
            "parts": [{"freeze_vision": "all"}, {"freeze_vision_layers": 1}],
        },
    }
    for name, fields in recipes.items():
        # Every JSON file is a YAML file.
        (folder / f"{name}.yaml").write_text(json.dumps(fields))


def _write_data(folder: Path) -> None:
    (folder / "shards").mkdir()
    stand_ins.shards(folder / "shards")
    (folder / "pictures").mkdir()
    for number, row in enumerate(stand_ins.rows()):
        row["image"].convert("RGB").resize((32, 32)).save(folder / "pictures" / f"{number:02d}.png")
    golden = load_golden(GOLDEN)
    checkpoints.original_pt(golden, folder / "original.pt")
    checkpoints.model_config(golden, folder)
    checkpoints.llm_of(golden, folder / "golden_llm")
    tiny.save(folder / "model")
    embedding_models.save(folder / "bert", "bert")
    save_data(folder / "captioned", {"train": 32, "validation": 16, "test": 16})
    write_strange(folder)
