"""An embedding model of sentence-transformers as the text tower of both stages and of a folder for the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2clip import cli, embed_captions
from llm2clip.command_line.settings import build_config
from llm2clip.encoders import embed
from llm2clip.models.towers import open_text_tower, save_text_tower
from llm2clip.store import EmbeddingCache
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel
from tests.builders import embedding_models, small_runs
from tests.builders.embedding_models import TEXTS
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import run

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@dataclass
class Trained:
    """An embedding model, its tower, and the joint model that stage 2 has trained on its cached embeddings."""

    reference: SentenceTransformer
    plain: str
    text: str
    cache: Path
    joint: Path


@pytest.fixture(scope="module", params=["gemma3_text", "t5", "xlm-roberta"])
def trained(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder: Path = tmp_path_factory.mktemp("embedding_tower")
    reference = embedding_models.save(folder / "text", request.param)
    text, cache = str(folder / "text"), str(folder / "cache")
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    fields = {"text_model_name_or_path": text, "output_dir": cache, "sources": sources}
    if request.param == "xlm-roberta":
        # As with E5: no prompt is the default one, so `embed` gives it, and stage 2 takes that of the cache.
        reference.default_prompt_name, fields["prompt_prefix"] = "query", "query: "
    embed.run(build_config(embed.EmbedConfig, fields))
    if request.param != "xlm-roberta":
        # Its Dense layers are read from a saved tower alone.
        changes = {"text_model_name_or_path": text, "embedding_cache": cache}
        with pytest.raises(ValueError, match=r"text_model_name_or_path is .* with Dense layers"):
            run("stage2", folder / "joint", inputs, **changes)
        text = str(folder / "tower")
        save_text_tower(*open_text_tower(str(folder / "text")), text)
    changes = {"text_model_name_or_path": text, "embedding_cache": cache, "max_steps": 2, "save_strategy": "no"}
    run("stage2", folder / "joint", inputs, **changes)
    return Trained(reference, str(folder / "text"), text, folder / "cache", folder / "joint")


def expected_text(trained: Trained, model: LLM2CLIPModel) -> Tensor:
    """What the joint model makes of the embeddings of sentence-transformers."""
    embeds = trained.reference.encode(TEXTS, convert_to_tensor=True)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.get_text_features(llm_embeds=embeds).pooler_output, dim=-1)


def test_cache_model_and_embed_captions_have_the_embeddings_of_sentence_transformers(trained: Trained) -> None:
    captions = ["a dog", "a red bus"]
    expected = trained.reference.encode(captions, convert_to_tensor=True)
    prompt = trained.reference.prompts.get(trained.reference.default_prompt_name) or ""
    tower, tokenizer = open_text_tower(trained.plain, prompt_prefix=prompt)
    torch.testing.assert_close(embed_captions(captions, tower, tokenizer), expected, **CLOSE)
    plain, tokenizer = open_text_tower(trained.plain)
    torch.testing.assert_close(embed_captions(["a dog"], trained.plain), plain.encode(["a dog"], tokenizer), **CLOSE)
    cache = EmbeddingCache.open(trained.cache)
    assert (cache.width, cache.manifest.fingerprint) == (expected.shape[1], tower.fingerprint())
    assert cache.manifest.identity["prompt_prefix"] == prompt
    model = LLM2CLIPModel.from_pretrained(trained.joint).eval()
    text = model.config.text_config
    assert model.config.text_model_name_or_path == trained.text
    assert text.bidirectional is None
    found = model.encode_text(TEXTS, LLM2CLIPProcessor.from_pretrained(trained.joint))
    torch.testing.assert_close(found, expected_text(trained, model), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["t5"], indirect=True)
def test_a_built_folder_has_the_embedding_model_and_exports_to_onnx(trained: Trained, tmp_path: Path) -> None:
    """The build compares it with what a process without this package computes, the export the graph with the model."""
    out = tmp_path / "out"
    assert cli.main(["build", str(trained.joint), str(out), "--bundle-text-model"]) == 0
    model = LLM2CLIPModel.from_pretrained(out).eval()
    assert model.config.text_model_name_or_path is None
    joint = SentenceTransformer(str(out), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(joint.encode(TEXTS, convert_to_tensor=True), expected_text(trained, model), **CLOSE)
    assert cli.main(["export-onnx", str(out), "--parts", "text"]) == 0


@pytest.mark.parametrize("save_format", ["merged", "adapter"])
def test_stage1_trains_lora_on_an_encoder_with_dense_layers(save_format: str, inputs: Inputs, tmp_path: Path) -> None:
    text = str(tmp_path / "text")
    embedding_models.save(tmp_path / "text", "t5")
    unset = dict.fromkeys(("prompt_prefix", "prompt_suffix", "max_text_length"))
    fields = {"model_name_or_path": text, "max_steps": 2, "save_strategy": "no", "save_format": save_format, **unset}
    with pytest.raises(ValueError, match=r"lora_target_modules .* do not fit .*T5EncoderModel.*all-linear"):
        run("stage1", tmp_path / "out", inputs, **fields)
    run("stage1", tmp_path / "out", inputs, **fields, lora_target_modules=["all-linear"])
    before, tokenizer = open_text_tower(text)
    after, saved = open_text_tower(str(tmp_path / "out"))
    assert saved("a dog")["input_ids"] == tokenizer("a dog")["input_ids"]
    torch.testing.assert_close(after.dense.state_dict(), before.dense.state_dict())
    change = (after.eval().encode(TEXTS, tokenizer) - before.eval().encode(TEXTS, tokenizer)).abs().max()
    assert change > 1e-3
    assert LLM2CLIPTextModel.from_pretrained(tmp_path / "out").has_adapter is (save_format == "adapter")


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_mntp_refuses_embedding_models(family: str, inputs: Inputs, tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "text", family)
    with pytest.raises(ValueError, match="is an embedding model of sentence-transformers, which is trained already"):
        run("mntp", tmp_path / "out", inputs, model_name_or_path=str(tmp_path / "text"))
