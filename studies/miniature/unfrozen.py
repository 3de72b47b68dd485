"""What the settings of stage 2 buy: LoRA on the LLM, two text encoders, a tower that trains, and a space that is kept.

`python -m studies.miniature.unfrozen runs/quickstart runs/study/unfrozen` trains all arms on what `make quickstart`
has made, some minutes each; a run that is finished is not repeated. At the end it writes `results/unfrozen.json`.

The pictures are those of `examples/data/concepts`: A are two sets of emojis, B are cliparts. Every arm trains on A
alone. `vit` starts from the ViT, so that B is a domain that no arm has seen. `clip` starts from a small CLIP that was
trained on A and B with MiniLM as its text tower, so that B shows what is left of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import yaml

from studies.miniature.material import DATA, HERE, Material

CONCEPTS = DATA / "concepts"
A, B = ("emoji-google", "emoji-fluent"), ("openclipart",)
SPLITS = {"train-a": ("train", A), "train-ab": ("train", A + B), "test-a": ("test", A), "test-b": ("test", B)}
SEEDS = (0, 1, 2)
SHARED: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "shared_captions": "positive",
    "adapter_num_layers": 1, "initializer": "normal", "projection_dim": 256, "dataloader_drop_last": True,
    "logging_steps": 20,
}  # fmt: skip
HEADS: dict[str, Any] = {"learning_rate": 1e-3, "num_train_epochs": 16, "per_device_train_batch_size": 256}
# The last two of eleven layers, from stored states of the others.
JOINT: dict[str, Any] = {
    "learning_rate": 1e-4, "num_train_epochs": 2, "per_device_train_batch_size": 128, "freeze_vision_layers": -2,
}  # fmt: skip
STEPS = 2 * 2699 // 128
KEPT_ADAPTER = {"distill_from": "{clip}"}
KEPT_TOWER = {"distill_weight": 0.2, "structure_weight": 255.0, "ema_half_life": STEPS / 4}
# Of each arm: its text encoders, settings of the first part (or the whole, if the tower is frozen) and of the second.
FROZEN: dict[str, tuple[list[str], dict[str, Any], None]] = {
    "plain": (["stage1"], {}, None),
    "two encoders": (["stage1", "e5"], {}, None),
    "kept space": (["stage1"], KEPT_ADAPTER, None),
    "two encoders, kept space": (["stage1", "e5"], KEPT_ADAPTER, None),
}
KEPT = ("kept space", "two encoders, kept space")
UNFROZEN: dict[str, tuple[list[str], dict[str, Any] | None, dict[str, Any]]] = {
    "no warm start": (["stage1"], None, {}),
    "plain": (["stage1"], {}, {}),
    "two encoders": (["stage1", "e5"], {}, {}),
    "LoRA": (["stage1"], {}, {"lora_rank": 8}),
    "kept space": (["stage1"], KEPT_ADAPTER, KEPT_TOWER),
    "two encoders, kept space": (["stage1", "e5"], KEPT_ADAPTER, KEPT_TOWER),
}


def arms() -> list[tuple[str, str, str, int]]:
    """List the runs: what they start from, part, arm and seed."""
    found = []
    for start, (part, table) in product(("vit", "clip"), (("frozen", FROZEN), ("unfrozen", UNFROZEN))):
        for arm in table:
            # Without a CLIP there is no space to keep; the cost of LoRA is the same from both starts.
            if (start == "vit" and arm in ("no warm start", *KEPT)) or (start == "clip" and arm == "LoRA"):
                continue
            found += [(start, part, arm, seed) for seed in SEEDS]
    # So that an unfinished study has all arms of some seeds; LoRA takes longest.
    return sorted(found, key=lambda run: (run[2] == "LoRA", run[1] != "frozen", run[3]))


class Study:
    """The folders of a study, and how its runs are trained and measured."""

    def __init__(self, quickstart: Path, folder: Path) -> None:
        self.folder, self.clip = folder, folder / "clip"
        self.vit = quickstart / "weights" / "vit-small-14-11-layers"
        self.texts = {
            "stage1": (quickstart / "stage1", quickstart / "cache" / "stage1"),
            "e5": (quickstart / "weights" / "multilingual-e5-small-4bit", quickstart / "cache" / "ready"),
            "minilm": (Material(folder).weights("minilm"), folder / "minilm-rows"),
        }

    def write_data(self) -> None:
        """Write the splits, and the rows of MiniLM."""
        for name, (split, sources) in SPLITS.items():
            path = self.folder / "data" / f"{name}.parquet"
            if not path.is_file():
                table = datasets.load_dataset("parquet", data_files=str(CONCEPTS / f"{split}.parquet"), split="train")
                table.filter(lambda row, kept=sources: row["source"] in kept).to_parquet(path)
        model, rows = self.texts["minilm"]
        source = {"path": str(self.data("train-ab")), "caption_columns": ["caption", "keywords"]}
        recipe = {"text_model_name_or_path": str(model), "output_dir": str(rows), "sources": [source]}
        if not (rows / "index.manifest").is_file():
            self.command("embed", "minilm", recipe)

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.parquet"

    def command(self, command: str, name: str, recipe: dict[str, Any]) -> dict[str, float]:
        """Run a command on a recipe; return its seconds, and the largest memory of its process."""
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe))
        begin = time.monotonic()
        with (path.with_suffix(".log")).open("w") as log:
            process = subprocess.Popen([sys.executable, "-m", "llm2clip", command, str(path)], stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{path} ended with {status}; see {log.name}.")
        return {
            "seconds": time.monotonic() - begin, "cpu_seconds": usage.ru_utime, "gib": usage.ru_maxrss / 2**20
        }  # fmt: skip

    def recipe(self, start: Path, encoders: list[str], seed: int, data: str) -> dict[str, Any]:
        names, caches = zip(*(self.texts[name] for name in encoders), strict=True)
        return {
            **SHARED,
            "vision_model_name_or_path": str(start),
            "text_model_name_or_path": [str(name) for name in names] if len(names) > 1 else str(names[0]),
            "embedding_cache": [str(cache) for cache in caches] if len(caches) > 1 else str(caches[0]),
            "sources": [{"path": str(self.data(data)), "caption_columns": ["caption", "keywords"]}],
            "feature_cache": str(self.folder / f"features-{start.name}"),
            "vision_pooling": "cls_mean",
            "feature_dropout": 0.2,
            "seed": seed,
        }

    def train_clip(self) -> None:
        """Train the small CLIP on A and B."""
        if (self.clip / "model.safetensors").is_file():
            return
        recipe = self.recipe(self.vit, ["minilm"], 0, "train-ab") | JOINT | {"warm_start": HEADS}
        recipe |= {"output_dir": str(self.clip), "frozen_states_dir": str(self.folder / "states-vit")}
        self.command("stage2", "clip", recipe)

    def run(self, start: str, part: str, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm, and measure it on both domains."""
        encoders, first, second = (FROZEN if part == "frozen" else UNFROZEN)[arm]
        first = None if first is None else {key: value.format(clip=self.clip) for key, value in first.items()}
        name = f"{start}-{part}-{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        recipe = self.recipe(self.vit if start == "vit" else self.clip, encoders, seed, "train-a")
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that was killed
        recipe["output_dir"] = str(self.folder / name)
        # A kept space brings its own heads, and its first part contrasts nothing.
        unused = ["vision_pooling", "initializer", "feature_dropout"] if first else []
        unused += ["feature_cache"] if first or first is None else []
        unused += ["shared_captions"] if first and second is None else []
        for field in unused:
            del recipe[field]
        if second is None:
            recipe |= {**HEADS, **(first or {}), "freeze_vision": "all"}
        else:
            recipe |= {**JOINT, **second, **({} if first is None else {"warm_start": {**HEADS, **first}})}
            recipe["frozen_states_dir"] = str(self.folder / f"states-{start}")
        cost = self.command("stage2", name, recipe)
        return {"start": start, "part": part, "arm": arm, "seed": seed, **cost, **self.measure(self.folder / name)}

    def measure(self, model: Path) -> dict[str, float]:
        output = model / "measured"
        tests = [str(self.data(name)) for name in ("test-a", "test-b")]
        command = [sys.executable, "-m", "llm2clip", "evaluate", str(model), "--benchmark", *tests]
        command += ["--caption-columns", "caption", "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, float] = {}
        for path in sorted(output.glob("*.json")):
            scores = json.loads(path.read_text())
            domain = "b" if "test-b" in path.name else "a"
            found |= {f"{key}_{domain}": value for key, value in scores["scores"].items()}
        return found


def summary(results: list[dict[str, Any]]) -> str:
    """Return the table: mean and standard deviation of R@10 over seeds, both directions averaged."""
    lines = [
        "| start | tower | arm | seeds | A, R@10 | B, R@10 | CPU s | GiB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in dict.fromkeys((row["start"], row["part"], row["arm"]) for row in results):
        rows = [row for row in results if (row["start"], row["part"], row["arm"]) == key]
        cells = []
        for domain in "ab":
            values = [100 * mean(row[f"{way}_recall@10_{domain}"] for way in WAYS) for row in rows]
            cells.append(f"{mean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else ""))
        # The first run of a tower also computes its features and states.
        cost = [f"{min(row['cpu_seconds'] for row in rows):.0f}", f"{max(row['gib'] for row in rows):.1f}"]
        cost = cost if key[1] else ["", ""]
        lines.append(f"| {' | '.join([*key, str(len(rows)), *cells, *cost])} |")
    return "\n".join(lines)


WAYS = ("text_to_image", "image_to_text")


def main(quickstart: str, folder: str, share: str = "0/1") -> None:
    """Run the arms that have no result yet; `share` is `K/N` for every Nth of them."""
    study = Study(Path(quickstart).resolve(), Path(folder).resolve())
    study.write_data()
    study.train_clip()
    path = study.folder / "results" / "clip.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        fields = {"start": "clip", "part": "", "arm": "the small CLIP itself", "seed": 0, "cpu_seconds": 0, "gib": 0}
        path.write_text(json.dumps({**fields, **study.measure(study.clip)}, indent=1))
    number, of = map(int, share.split("/"))
    for run in arms()[number::of]:
        path = study.folder / "results" / ("-".join(map(str, run)) + ".json").replace(" ", "-")
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(study.run(*run), indent=1))
    results = [json.loads(path.read_text()) for path in sorted((study.folder / "results").glob("*.json"))]
    if len(results) > len(arms()):  # another share may still run
        (HERE / "results" / "unfrozen.json").write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
