"""`hub_configs/`: every config has the shapes of the original model, and the generated tables are up to date."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip.convert.conversion import _image_processor
from llm2clip.convert.original import original_layout
from llm2clip.convert.published import FOLDER, published_models
from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPProcessor
from tests.golden import load_golden
from tests.modeling_llm2clip import tiny

MADE = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "make_checkpoints.py"))
MANIFESTS = load_golden("state_dict_manifests_a").meta["models"]
OF_MANIFEST = {
    "EVA02-CLIP-L-14-336": "LLM2CLIP-EVA02-L-14-336",
    "EVA02-CLIP-B-16": "LLM2CLIP-EVA02-B-16",
    "OpenaiCLIP-L-14-336": "LLM2CLIP-Openai-L-14-336",
    "Llama3.2-1B-EVA02-L-14-336": "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336",
}

# Image sizes of the joint models, and what the processors that lay beside their configs had in common.
SIZES = {
    "LLM2CLIP-EVA02-B-16": 224,
    "LLM2CLIP-EVA02-L-14-224": 224,
    "LLM2CLIP-EVA02-L-14-336": 336,
    "LLM2CLIP-EVA02-bigE-14-plus": 224,
    "LLM2CLIP-Llama3.1-8B-siglip2-so400m-patch14-224": 224,
    "LLM2CLIP-Llama3.2-1B-EVA02-L-14-224": 224,
    "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336": 336,
    "LLM2CLIP-Openai-B-16": 224,
    "LLM2CLIP-Openai-L-14-224": 224,
    "LLM2CLIP-Openai-L-14-336": 336,
}
IMAGE_PROCESSOR = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_config_has_the_shapes_of_the_original(manifest: str) -> None:
    published = published_models()[OF_MANIFEST[manifest]]
    model = published.build()
    restored = original_layout(published.config.vision_config).restore(model.state_dict())
    expected = MANIFESTS[manifest]["parameters"]
    assert {name: list(tensor.shape) for name, tensor in restored.items()} == expected
    assert model.num_parameters() == MANIFESTS[manifest]["n_parameters"]


@pytest.mark.parametrize("name", published_models())
def test_published_config_instantiates_and_is_in_the_table(name: str) -> None:
    published = published_models()[name]
    model = published.build()
    table = (FOLDER / "README.md").read_text()
    assert f"| {model.num_parameters():,} |" in next(line for line in table.splitlines() if f"[{name}]" in line)
    fields = json.loads((FOLDER / name / "config.json").read_text())
    assert fields["architectures"] == [type(model).__name__]
    assert fields["auto_map"]["AutoModel"].endswith(type(model).__name__)
    assert (published.checkpoint is None) == bool(published.use)
    assert (published.checkpoint is None) != bool(published.needs)
    if published.is_joint:
        assert published.config.text_model_name_or_path


def test_every_config_is_listed_once() -> None:
    assert list(published_models()) == sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


@pytest.mark.parametrize("name", SIZES)
def test_the_processor_of_a_published_model_follows_from_its_size(name: str, tmp_path: Path) -> None:
    size = published_models()[name].config.vision_config.image_size
    assert size == SIZES[name]
    plan: Any = SimpleNamespace(vision_config=published_models()[name].config.vision_config)
    checkpoint: Any = SimpleNamespace(folder=None)
    LLM2CLIPProcessor(_image_processor(plan, checkpoint), tiny.processor().tokenizer).save_pretrained(tmp_path)
    saved, image = (
        json.loads((tmp_path / f"{kind}_config.json").read_text()) for kind in ("processor", "preprocessor")
    )
    expected = {
        **IMAGE_PROCESSOR, "crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size},
    }  # fmt: skip
    for found in (saved["image_processor"], image):
        assert {field: found[field] for field in expected} == expected
    assert saved["processor_class"] == image["processor_class"] == "LLM2CLIPProcessor"
    assert saved["auto_map"] == {"AutoProcessor": "processing_llm2clip.LLM2CLIPProcessor"}


def test_sizes_are_those_of_all_joint_models() -> None:
    assert set(SIZES) == {name for name, published in published_models().items() if published.is_joint}


def test_generated_tables_are_up_to_date() -> None:
    for path, text in MADE["documents"]().items():
        assert path.read_text() == text, f"run `python docs/make_checkpoints.py` ({path.name} is stale)"


def test_eva_towers_have_the_head_width_of_the_original() -> None:
    heads = {
        name: published.config.vision_config.hidden_size // published.config.vision_config.num_attention_heads
        for name, published in published_models().items()
        if published.is_joint and published.config.vision_config.model_type == EVA02VisionConfig.model_type
    }
    assert heads.pop("LLM2CLIP-EVA02-bigE-14-plus") == 112
    assert set(heads.values()) == {64}
