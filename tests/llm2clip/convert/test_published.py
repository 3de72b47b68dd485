"""`hub_configs/`: every config has the shapes of the original model, and a row in the table."""

from __future__ import annotations

import json

import pytest

from llm2clip.convert.original import original_layout
from llm2clip.convert.published import FOLDER, published_models
from modeling_llm2clip import EVA02VisionConfig
from tests.golden import load_golden

MANIFESTS = load_golden("state_dict_manifests_a").meta["models"]
MANIFEST_FIELDS = {
    "EVA02-CLIP-L-14-336": "LLM2CLIP-EVA02-L-14-336",
    "EVA02-CLIP-B-16": "LLM2CLIP-EVA02-B-16",
    "OpenaiCLIP-L-14-336": "LLM2CLIP-Openai-L-14-336",
    "Llama3.2-1B-EVA02-L-14-336": "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336",
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_config_has_the_shapes_of_the_original(manifest: str) -> None:
    published = published_models()[MANIFEST_FIELDS[manifest]]
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
    if published.is_joint:
        assert published.config.text_model_name_or_path


def test_every_config_is_listed_once() -> None:
    assert list(published_models()) == sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def test_eva_towers_have_the_head_width_of_the_original() -> None:
    heads = {
        name: published.config.vision_config.hidden_size // published.config.vision_config.num_attention_heads
        for name, published in published_models().items()
        if published.is_joint and published.config.vision_config.model_type == EVA02VisionConfig.model_type
    }
    assert heads.pop("LLM2CLIP-EVA02-bigE-14-plus") == 112
    assert set(heads.values()) == {64}
