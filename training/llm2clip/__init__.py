"""LLM2CLIP for the Hugging Face Hub: models, training, embedding, evaluation and publishing.

Every name in `__all__` is imported when it is first used (PEP 562): `import llm2clip` alone does not load torch or
transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

# Type checkers and editors read the same names in __init__.pyi, which docs/make_api.py makes of this table.
MODULES = {
    "modeling_llm2clip": [
        "EVA02VisionConfig",
        "EVA02VisionModel",
        "LLM2CLIPConfig",
        "LLM2CLIPModel",
        "LLM2CLIPOutput",
        "LLM2CLIPProcessor",
        "LLM2CLIPTextConfig",
        "LLM2CLIPTextModel",
        "LLM2CLIPVisionModelWithProjection",
    ],
    "llm2clip.trainers.alignment": ["align"],
    "llm2clip.trainers.closed_form": ["ClosedFormAlignment", "PairSums", "closed_form_alignment"],
    "llm2clip.trainers.distill_config": ["DistillConfig"],
    "llm2clip.trainers.distill_trainer": ["DistillTrainer"],
    "llm2clip.trainers.keep_images": ["keep_images"],
    "llm2clip.trainers.lora": ["add_lora"],
    "llm2clip.trainers.mntp_config": ["MNTPConfig"],
    "llm2clip.trainers.mntp_trainer": ["MNTPTrainer"],
    "llm2clip.trainers.run_distill": ["attach_query_encoder", "distill_text"],
    "llm2clip.trainers.stage1_config": ["Stage1Config"],
    "llm2clip.trainers.stage1_trainer": ["Stage1Trainer"],
    "llm2clip.trainers.stage2_config": ["Stage2Config"],
    "llm2clip.trainers.stage2_trainer": ["Stage2Trainer"],
    "llm2clip.trainers.stored_rows": ["StoredPairsDataset", "store_pairs"],
    "llm2clip.trainers.student": ["Student"],
    "llm2clip.convert.conversion": ["convert_checkpoint"],
    "llm2clip.hub.build": ["build_folder"],
    "llm2clip.hub.merge": ["merge_models"],
    "llm2clip.hub.push": ["push_folder"],
    "llm2clip.losses": ["clip_loss", "hard_negative_info_nce", "info_nce", "sigmoid_loss"],
    "llm2clip.data": [
        "CaptionImageDataset",
        "CaptionSource",
        "EvalTransform",
        "PairSource",
        "Stage2Collator",
        "TrainTransform",
        "load_source",
    ],
    "llm2clip.checks.check_data": ["check_data"],
    "llm2clip.encoders": ["embed_captions", "embed_images", "load_encoder"],
    "llm2clip.encoders.patches": ["patch_similarity"],
    "llm2clip.store": ["EmbeddingCache", "PairedCache", "StoreManifest", "build_embedding_cache", "caption_manifest"],
    "llm2clip.evaluation": ["caption_retrieval_metrics", "metric_path", "retrieval_metrics"],
    "llm2clip.evaluation.benchmark": ["Benchmark", "BenchmarkError"],
    "llm2clip.evaluation.data": ["BenchmarkImages", "CaptionPairData", "DataPart", "RetrievalData"],
    "llm2clip.evaluation.evaluate": ["evaluate"],
    "llm2clip.evaluation.comparison": ["compare_results"],
    "llm2clip.search.search_index": ["SearchIndex"],
    "llm2clip.search.top_k": ["top_k"],
    "llm2clip.serving.app": ["create_app"],
    "llm2clip.models.embeddings": ["quantize_embeddings"],
    "llm2clip.models.new_model": ["from_vision_text_pretrained"],
    "llm2clip.models.towers": ["open_text_tower"],
    "llm2clip.cli": ["main"],
}
_MODULE_OF = {name: module for module, names in MODULES.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("modeling_llm2clip").__version__
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
