"""Stage 2 with two text encoders side by side: an LLM after stage 1, and the text half of a CLIP model."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from llm2clip import EmbeddingCache, Stage2Config, Stage2Trainer, cli, load_encoder
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.encoders import embed
from llm2clip.hub import export_onnx
from llm2clip.hub.export_onnx import ExportOnnxConfig
from llm2clip.hub.upload_files import model_files
from llm2clip.losses import clip_loss
from llm2clip.store import PairedCache, StoreMismatchError
from llm2clip.store.shards import ShardFile
from llm2clip.store.store import caption_keys
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from llm2clip.utils.text_identity import read_fingerprint, tokenizer_fingerprint
from llm2clip.utils.towers import describe_text_tower, open_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel
from modeling_llm2clip.tokenization_llm2clip import tokenize_captions
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.models import LENGTH, save_transformers
from tests.llm2clip.trainers.rows import settings
from tests.llm2clip.trainers.stages import assert_equal, broken_after, llm2clip, losses

TEXTS = ["a dog", "two children play football in a park", "a red bus " * 30]


class Pair(NamedTuple):
    names: list[str]
    caches: list[str]
    vision: str


@pytest.fixture(scope="module")
def pair(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("pair")
    save_transformers("clip", folder / "clip")
    clip = str(folder / "clip")
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    fields = {"text_model_name_or_path": clip, "output_dir": str(folder / "cache"), "sources": sources}
    embed.run(build_config(embed.EmbedConfig, fields))
    return Pair([inputs.text, clip], [inputs.cache, str(folder / "cache")], clip)


def fields_of(pair: Pair, folder: Path, **changes: Any) -> dict[str, Any]:
    fields = small_runs.stage2_fields(folder, pair.vision, "", "")
    return {**fields, "text_model_name_or_path": pair.names, "embedding_cache": pair.caches, **changes}


@pytest.fixture(scope="module")
def trained(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trained")
    run_stage2.run(build_config(Stage2Recipe, fields_of(pair, folder / "run", max_steps=2, save_strategy="no")))
    return folder / "run"


def side_by_side(pair: Pair, texts: list[str]) -> Tensor:
    """What each text encoder gives alone, of unit length."""
    towers = map(open_text_tower, pair.names)
    return torch.cat([F.normalize(tower.encode(texts, tokenizer), dim=-1) for tower, tokenizer in towers], dim=-1)


def test_the_text_half_of_clip_is_a_text_tower(pair: Pair) -> None:
    tower, tokenizer = open_text_tower(pair.vision)
    clip = CLIPModel.from_pretrained(pair.vision).eval()
    tokens = AutoTokenizer.from_pretrained(pair.vision)(TEXTS, truncation=True, max_length=LENGTH, padding=True)
    inputs = {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = clip.text_model(**inputs).last_hidden_state
        expected = clip.text_projection(states[torch.arange(len(TEXTS)), inputs["attention_mask"].sum(1) - 1])
    torch.testing.assert_close(tower.encode(TEXTS, tokenizer), expected, atol=1e-5, rtol=1e-5)


def test_a_pair_gives_the_rows_of_both_and_has_their_identity(pair: Pair, tmp_path: Path) -> None:
    tower, tokenizer = open_text_tower(pair.names)
    expected = side_by_side(pair, TEXTS)
    torch.testing.assert_close(tower.encode(TEXTS, tokenizer), expected, atol=1e-6, rtol=1e-5)
    config, described = describe_text_tower(pair.names)
    assert config.hidden_size == expected.shape[1]
    assert tokenizer_fingerprint(described) == tokenizer_fingerprint(tokenizer)
    assert read_fingerprint(pair.names, None, config) == tower.fingerprint()
    assert tokenize_captions(TEXTS, tokenizer, config).num_cut == 2, "one of both cuts them"
    swapped, _ = open_text_tower(pair.names[::-1])
    assert swapped.fingerprint() != tower.fingerprint()
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, saved = open_text_tower(str(tmp_path))
    eager = LLM2CLIPTextModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert {half.decoder.config._attn_implementation for half in (eager, eager.second)} == {"eager"}
    assert again.fingerprint() == tower.fingerprint() == read_fingerprint(str(tmp_path), None, config)
    torch.testing.assert_close(again.encode(TEXTS, saved), expected, atol=1e-6, rtol=1e-5)
    assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(tokenizer)


def test_the_rows_of_two_caches_side_by_side(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardFile, "keys", None)  # those of all rows are not read
    first, second = map(EmbeddingCache.open, pair.caches)
    both = PairedCache(first, second)
    captions = distinct_captions(CaptionSource.from_dict(small_runs.concepts()))[:5]
    expected = torch.cat([F.normalize(cache.lookup(captions), dim=-1) for cache in (first, second)], dim=-1)
    torch.testing.assert_close(both.lookup(captions), expected, atol=1e-3, rtol=0)
    assert pickle.loads(pickle.dumps(both)).lookup(captions).equal(both.lookup(captions))
    assert both.contains([*captions, "no caption of this data"]).tolist() == [*[True] * 5, False]
    with pytest.raises(KeyError, match="1 of 6 keys have no row"):
        both.read(both.find(caption_keys([*captions, "no caption of this data"])))
    with pytest.raises(KeyError, match="lacks 1 of 1 captions"):
        both.rows(["no caption of this data"])


def test_a_trained_model_names_both_and_encodes_with_both_or_one(pair: Pair, trained: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(trained).eval()
    assert model.config.text_model_name_or_path == pair.names
    assert "language model beside a" in (trained / "README.md").read_text()
    rows, width = side_by_side(pair, TEXTS), model.text_adapter.widths[0]
    first, second = rows.clone(), rows.clone()
    first[:, width:], second[:, :width] = 0, 0
    options: list[tuple[Tensor, dict[str, Any]]] = [(first, {"encoder": "first"}), (second, {"encoder": "second"})]
    for embeds, encoder in [(rows, {"processor": LLM2CLIPProcessor.from_pretrained(trained)}), (rows, {}), *options]:
        with torch.no_grad():
            expected = F.normalize(model.get_text_features(llm_embeds=embeds).pooler_output, dim=-1)
        torch.testing.assert_close(model.encode_text(TEXTS, **encoder), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("half", [0, 1])
def test_a_missing_half_is_named(half: int, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_model_name_or_path"][half] = str(tmp_path / "gone")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="gone"):
        LLM2CLIPModel.from_pretrained(tmp_path / "model")


def test_another_pair_is_refused(pair: Pair, trained: Path, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(trained)
    with pytest.raises(ValueError, match="clip has other Dense layers than its config says"):
        model.load_text_model(pair.names[::-1])
    with pytest.raises(ValueError, match="width"):
        model.load_text_model(pair.names[0])
    with pytest.raises(ValueError, match="for one text encoder"):
        LLM2CLIPTextModel.from_pretrained(pair.names, config=model.config.text_config)
    with pytest.raises(ValueError, match="no instruction"):
        model.encode_text(TEXTS, instruction="Describe it:")
    plain = AutoTokenizer.from_pretrained(pair.names[0])("a dog", return_tensors="pt")
    with pytest.raises(ValueError, match="no tokens of one"):
        model.get_text_features(**plain)
    for changes, message in (
        ({"embedding_cache": pair.caches[::-1]}, "the prompt takes 54 tokens; max_length 12 leaves none for captions"),
        (
            {"embedding_cache": [pair.caches[1]] * 2},
            "were embedded after '', but the model reads them after",
        ),
        (
            {"embedding_cache": pair.caches[0]},
            "with fingerprint .*, but the text encoder in use has fingerprint",
        ),
        ({"embedding_cache": [*pair.caches, pair.caches[0]]}, "3 embedding caches"),
        ({"text_model_name_or_path": [*pair.names, pair.names[0]]}, "give one or two"),
    ):
        with pytest.raises((StoreMismatchError, ValueError), match=message):
            run_stage2.run(build_config(Stage2Recipe, fields_of(pair, tmp_path / "run", **changes)))


@pytest.mark.parametrize(("losses", "chunk"), [("both", None), ("each", 3), ("all", None), ("all", 3)])
def test_the_losses_of_each_and_of_both(
    losses: str, chunk: int | None, pair: Pair, trained: Path, tmp_path: Path
) -> None:
    captions = distinct_captions(CaptionSource.from_dict(small_runs.concepts()))[:8]
    stored = PairedCache(*map(EmbeddingCache.open, pair.caches)).lookup(captions)
    inputs = {"pixel_values": torch.randn(8, 3, 28, 28), "llm_embeds": stored}
    args = Stage2Config(**settings(tmp_path, text_losses=losses, tower_chunk_size=chunk))
    trainer = Stage2Trainer(LLM2CLIPModel.from_pretrained(trained, text_model=False), args, train_dataset=[{}])
    model = trainer.model.train()
    loss, _ = trainer.loss_and_outputs(model, dict(inputs))
    loss.backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()

    rows, (width, other) = inputs["llm_embeds"], model.text_adapter.widths
    first, second = rows[:, :width], rows[:, width:]
    views = {
        "both": [rows],
        "each": [F.pad(first, (0, other)), F.pad(second, (width, 0))],
        "all": [rows, F.pad(first, (0, other)), F.pad(second, (width, 0))],
    }[losses]
    images = F.normalize(model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
    expected = []
    for view in views:
        texts = F.normalize(model.get_text_features(llm_embeds=view).pooler_output, dim=-1)
        expected.append(clip_loss(images, texts, model.logit_scale.exp()))
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(grads[name], value.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_what_needs_two_text_encoders_is_refused_with_one(saved_model: Path, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(saved_model)
    with pytest.raises(ValueError, match="one text encoder"):
        Stage2Trainer(model, Stage2Config(**settings(tmp_path, text_losses="all")), train_dataset=[])
    with pytest.raises(ValueError, match="1 text encoder"):
        model.encode_text(TEXTS, encoder="first")


@pytest.mark.slow
def test_a_built_folder_holds_both_for_everyone(trained: Path, tmp_path: Path) -> None:
    """The build compares it with what a process without this package computes, the export the graph with the model."""
    out = tmp_path / "out"
    assert cli.main(["build", str(trained), str(out), "--bundle-text-model"]) == 0
    model = LLM2CLIPModel.from_pretrained(out).eval()
    assert model.config.text_model_name_or_path is None
    assert isinstance(model.text_model.second, LLM2CLIPTextModel)
    assert {"second_tokenizer.json", "tokenization_llm2clip.py"} <= set(model_files(out).uploaded)
    assert model_files(out).others == []
    expected = LLM2CLIPModel.from_pretrained(trained).encode_text(TEXTS)
    torch.testing.assert_close(model.encode_text(TEXTS), expected, atol=1e-6, rtol=1e-5)
    joint = SentenceTransformer(str(out), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(joint.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(load_encoder(str(out)).encode_text(TEXTS), expected, atol=1e-6, rtol=1e-5)
    for layout, message in {"transformers.js": "two text encoders", "plain": "no graph"}.items():
        settings: Any = {"layout": layout, "output_dir": str(tmp_path / "onnx")}
        with pytest.raises(ValueError, match=message):
            export_onnx.run(ExportOnnxConfig(model=str(out), **settings))


@pytest.mark.slow
def test_online_as_from_caches_and_two_processes_and_a_resumed_run_equal_one(pair: Pair, tmp_path: Path) -> None:
    fields = fields_of(pair, tmp_path / "one", text_losses="all", warm_start={"max_steps": 2})
    llm2clip("stage2", fields)
    batch = fields["per_device_train_batch_size"] // 2
    two = {"output_dir": str(tmp_path / "two"), "save_strategy": "no", "per_device_train_batch_size": batch}
    llm2clip("stage2", {**fields, **two}, 2)
    for part in ("warm_start", "."):
        assert losses(tmp_path / "two" / part) == pytest.approx(losses(tmp_path / "one" / part), abs=1e-4)
    # As a run that was killed after its first checkpoint.
    folder = broken_after(tmp_path / "one", tmp_path / "broken", 3)
    llm2clip("stage2", {**fields, "output_dir": str(folder)}, 1, "--resume")
    assert_equal(tmp_path / "one", folder)
    for name, changes in {"stored": {}, "online": {"embedding_cache": None, "online_text_model": True}}.items():
        fields = fields_of(pair, tmp_path / name, max_steps=2, save_strategy="no", **changes)
        run_stage2.run(build_config(Stage2Recipe, fields))
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "stored"), abs=1e-3)
