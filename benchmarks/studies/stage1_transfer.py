"""Which settings of stage 1 transfer: `python -m benchmarks.studies.stage1_transfer RUN OUTPUT [VARIANT ...]`.

Each variant of stage 1 is judged as a text encoder under frozen towers, by two runs of stage 2 that end at their best
epoch on a validation set:

- *transfer*: neither stage has seen a picture or caption of Openclipart. Settings are chosen by the recall on 1,200 of
  its training rows, and reported on those of its validation and test rows.
- *in domain*: stage 2 has all training rows; chosen and reported on the validation and test splits.

RUN is a finished `llm2clip quickstart`, whose towers, features and raw LLM are used. Results are appended to
OUTPUT/results.jsonl; a variant that is there is not run again. All variants train in bfloat16, which takes half the
time, and with the original's scale of 50 unless they name another.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from torch.nn import functional as F

from llm2clip.data import CaptionSource, PairSource, distinct_captions
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.embed import EmbedConfig, embed_into_cache
from llm2clip.hub.merge import merge_models
from llm2clip.quickstart.data import BUNDLED, QuickstartData
from llm2clip.quickstart.domains import without_domain, write_without_domain
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers import run_mntp, run_stage1, run_stage2
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import build_config
from llm2clip.utils.towers import open_text_tower

COLUMNS = ["caption", "keywords"]
LANGUAGES = ["caption", *(f"caption_{code}" for code in ("de", "fr", "es", "zh", "ja", "ru", "ar", "hi"))]
VALIDATION_ROWS = 1200
# A hard negative scores below this share of the positive (NV-Retriever, arXiv 2407.15831: TopK-PercPos).
PERCENT_OF_POSITIVE = 0.95
RECALLS = (1, 5, 10)
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
ORIGINAL = {"scale": 50.0}
BFLOAT16 = {"bf16": True, "attn_implementation": "eager"}


class Study:
    """The towers and data of a study."""

    def __init__(self, run: Path, output: Path, seed: int) -> None:
        self.run, self.output, self.seed = run, output, seed
        self.profile = load_recipe(find_recipe("quickstart_study"))
        self.data = QuickstartData.find(None, COLUMNS)
        every_column = QuickstartData.find(None, [*COLUMNS, *LANGUAGES[1:]])
        self.domains = without_domain(every_column, output / "domains")
        self.tuning = output / "data" / "tuning.parquet"
        if not self.tuning.exists():
            write_without_domain(every_column, "source", "openclipart", output / "domains")
            rows = datasets.load_dataset("parquet", data_files=f"{self.data.path}/train.parquet", split="train")
            rows = rows.filter(lambda source: source == "openclipart", input_columns="source")
            rows.shuffle(seed=0).select(range(VALIDATION_ROWS)).to_parquet(self.tuning)

    def pairs(self, columns: list[str], weight: float) -> dict[str, Any]:
        """Pairs of captions of the training rows outside Openclipart."""
        source = self.domains.source("train", columns)
        return {"path": source.path, "split": source.split, "caption_columns": columns, "weight": weight}

    def glosses(self, weight: float) -> dict[str, Any]:
        """Pairs of words and definitions."""
        return asdict(self.data.gloss_pairs("train")) | {"weight": weight}

    def stage1(self, name: str, base: Path | None = None, **changes: Any) -> Path:
        """Train a variant of stage 1."""
        folder = self.output / f"{name}-{self.seed}"
        if not (folder / "config.json").exists():
            sources = [self.glosses(1), self.pairs(COLUMNS, 2)]
            fields = {**self.profile["stage1"], **ORIGINAL, **QUIET, **BFLOAT16, "sources": sources, "seed": self.seed}
            fields |= {"model_name_or_path": str(base or self.run / "raw"), "output_dir": str(folder), **changes}
            for name_of_saves in ("save_steps", "save_total_limit"):
                fields.pop(name_of_saves, None)
            run_stage1.run(build_config(Stage1Recipe, fields))
        return folder

    def mntp(self) -> Path:
        """Train masked next token prediction on the texts of stage 1."""
        folder = self.output / f"mntp-{self.seed}"
        if not (folder / "config.json").exists():
            glosses = CaptionSource(str(BUNDLED / "glosses"), split="train", caption_columns=["lemmas", "gloss"])
            fields: dict[str, Any] = {**QUIET, **BFLOAT16, "max_steps": 120, "per_device_train_batch_size": 4}
            fields |= {"block_size": 128, "learning_rate": 5e-4, "lora_rank": 16, "lora_alpha": 32, "seed": self.seed}
            fields["sources"] = [asdict(glosses), asdict(self.domains.source("train", COLUMNS))]
            fields["model_name_or_path"] = str(self.run / "weights" / "smollm2-135m-instruct")
            run_mntp.run(build_config(MNTPRecipe, {**fields, "output_dir": str(folder)}))
        return folder

    def hard_negatives(self, tower: Path) -> list[dict[str, Any]]:
        """Mine a negative for each pair with a text tower."""
        model, tokenizer = open_text_tower(str(tower), dtype="bfloat16")
        encoder = OurEncoder(model.eval(), tokenizer)
        found = []
        for name, source, columns, weight in (
            ("glosses", self.data.gloss_pairs("train"), ["lemmas", "gloss"], 1),
            ("captions", self.domains.source("train", COLUMNS), COLUMNS, 2),
        ):
            table = datasets.load_dataset("parquet", data_files=_files(source), split="train")
            mined = _mine(encoder, list(dict.fromkeys(zip(*(table[column] for column in columns), strict=True))))
            path = self.output / "data" / f"hard-{name}-{self.seed}.parquet"
            mined.to_parquet(path)
            fields = {"anchor_column": "anchor", "positive_column": "positive", "negative_column": "negative"}
            found.append({"path": str(path), "split": path.stem, "weight": weight, **fields})
        return found

    def judge(self, name: str, tower: Path) -> dict[str, Any]:
        """Embed all captions with a text tower and train and measure stage 2 twice."""
        data, state = self.data, process_state()
        held_out = CaptionSource(str(self.tuning), split=self.tuning.stem, caption_columns=COLUMNS[:1])
        sources = [data.source(data.train, COLUMNS), data.source(data.validation, COLUMNS[:1]), data.test_source()]
        model, tokenizer = open_text_tower(str(tower), dtype="bfloat16")
        cache = self.output / f"cache-{name}-{self.seed}"
        encoder = OurEncoder(model.eval(), tokenizer)
        embed_into_cache(distinct_captions(sources), encoder, str(cache), str(tower), EmbedConfig(), state)
        query = COLUMNS[:1]
        strict = {
            "validation": self.domains.source("validation", query),
            "tuning": held_out,
            "test": self.domains.source("test", query),
        }
        whole = {"validation": data.source(data.validation, query), "test": data.test_source()}
        return {
            "transfer": self._stage2(tower, cache, self.domains.source("train", COLUMNS), strict),
            "in domain": self._stage2(tower, cache, data.source(data.train, COLUMNS), whole),
        }

    def _stage2(
        self, tower: Path, cache: Path, train: CaptionSource, evaluation: dict[str, CaptionSource]
    ) -> dict[str, float]:
        """Return the recalls, in %, of the epoch with the best R@10 on `validation`."""
        fields = {**self.profile["stage2"], **self.profile["frozen"], **QUIET, "eval_strategy": "epoch"}
        fields |= {"freeze_vision": "all", "seed": self.seed, "logging_steps": 1000}
        fields |= {
            "vision_model_name_or_path": str(self.run / "weights" / "vit-small-14-11-layers"),
            "text_model_name_or_path": str(tower),
            "embedding_cache": str(cache),
            "feature_cache": str(self.run / "cache" / "features"),
            "output_dir": str(self.output / "stage2"),
            "sources": [asdict(train)],
            "eval_sources": {name: asdict(source) for name, source in evaluation.items()},
        }
        trainer = run_stage2.build_trainer(build_config(Stage2Recipe, fields))
        trainer.train()
        epochs: dict[float, dict[str, float]] = {}
        for line in trainer.state.log_history:
            epochs.setdefault(line["epoch"], {}).update(line)
        measured = [line for line in epochs.values() if "eval_validation_text_to_image_recall@10" in line]
        best = max(measured, key=lambda line: line["eval_validation_text_to_image_recall@10"])
        recalls = {
            f"{name}@{k}": round(100 * best[f"eval_{name}_text_to_image_recall@{k}"], 1)
            for name in evaluation
            for k in RECALLS
        }
        return {"epoch": best["epoch"], **recalls}


def _files(source: CaptionSource | PairSource) -> str:
    path = Path(source.path)
    return str(path / f"{source.split}.parquet") if path.is_dir() else str(path)


def _mine(encoder: OurEncoder, pairs: list[tuple[str, str]]) -> datasets.Dataset:
    """Give each pair the most similar text of another one that is not too close to the positive."""
    anchors, positives = (F.normalize(encoder.embed([pair[side] for pair in pairs]), dim=-1) for side in (0, 1))
    own: dict[str, set[str]] = {}
    for anchor, positive in pairs:
        own.setdefault(anchor.lower(), set()).add(positive)
    found: list[tuple[str, str, str]] = []
    for (anchor, positive), scores, score in zip(
        pairs, anchors @ positives.T, (anchors * positives).sum(dim=1), strict=True
    ):
        for row in scores.where(scores < PERCENT_OF_POSITIVE * score, -1).topk(8).indices.tolist():
            if pairs[row][1] not in own[anchor.lower()]:
                found.append((anchor, positive, pairs[row][1]))
                break
    return datasets.Dataset.from_dict(
        dict(zip(("anchor", "positive", "negative"), zip(*found, strict=True), strict=True))
    )


def variants(study: Study) -> dict[str, Any]:
    """The text encoders of the study by name, as functions that make them."""
    run = study.run

    def mixed(gloss: float, captions: float) -> list[dict[str, Any]]:
        return [study.glosses(gloss), study.pairs(COLUMNS, captions)]

    def merged(alpha: float) -> Path:
        folder, tuned = study.output / f"merge-{alpha}-{study.seed}", study.stage1("scale-50")
        if not folder.exists():
            merge_models(run / "raw", tuned, folder, alpha)
        return folder

    languages = [study.glosses(1), study.pairs(COLUMNS, 1), study.pairs(LANGUAGES, 1)]
    return {
        "raw causal": lambda: run / "raw-causal",
        "raw bidirectional": lambda: run / "raw",
        "e5": lambda: run / "weights" / "multilingual-e5-small-4bit",
        "scale 50": lambda: study.stage1("scale-50"),
        "scale 20": lambda: study.stage1("scale-20", scale=20.0),
        "scale 10": lambda: study.stage1("scale-10", scale=10.0),
        "scale 20, 540 steps": lambda: study.stage1("scale-20-steps-540", scale=20.0, max_steps=540),
        "scale 20, batch 64": lambda: study.stage1("scale-20-batch-64", scale=20.0, per_device_train_batch_size=64),
        "scale 20, glosses 3 : captions 1": lambda: study.stage1(
            "scale-20-glosses-3", scale=20.0, sources=mixed(3, 1)
        ),
        "learning rate 3e-4": lambda: study.stage1("rate-3e-4", learning_rate=3e-4),
        "glosses 3 : captions 1": lambda: study.stage1("glosses-3", sources=mixed(3, 1)),
        "translations": lambda: study.stage1("translations", sources=languages),
        "hard negatives": lambda: study.stage1("hard", sources=study.hard_negatives(study.stage1("scale-50"))),
        "MNTP first": lambda: study.stage1("after-mntp", base=study.mntp()),
        "merged with raw, alpha 0.5": lambda: merged(0.5),
    }


def main() -> None:
    """Run variants and print their recalls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("variants", nargs="*", help="names of variants; default: all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(options.run.resolve(), options.output.resolve(), options.seed)
    known, results = variants(study), study.output / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(line["variant"], line["seed"]) for line in map(json.loads, lines)}
    for name in options.variants or known:
        if name not in known:
            parser.error(f"there is no variant {name!r}; choose from: {', '.join(known)}.")
        if (name, options.seed) in done:
            continue
        line = {"variant": name, "seed": options.seed, **study.judge(name.replace(" ", "-"), known[name]())}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
