"""Stage 2 from its settings: training, resuming, frozen layers, an online LLM, invalid input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
)

from llm2clip.data import CaptionSource, DamagedImageError, distinct_captions
from llm2clip.data.table_identity import data_revision
from llm2clip.encoders import embed
from llm2clip.hub.cards.card import read_card
from llm2clip.store import EmbeddingCache, MissingCaptionError, StoreMismatchError
from llm2clip.trainers import run_stage2
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.modeling_eva02 import EVA02Attention
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.modeling_llm2clip import tiny as tiny_models


def run(folder: Path, inputs: Inputs, resume: bool = False, **changes: Any) -> dict[str, Any]:
    fields = {**tiny.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache), **changes}
    return run_stage2.run(build_config(Stage2Recipe, fields), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).state_dict()


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_result_is_a_folder_for_the_hub(inputs: Inputs, tmp_path: Path) -> None:
    metrics = run(tmp_path, inputs, eval_strategy="steps", eval_steps=3)
    assert 0 <= metrics["eval_validation_text_to_image_recall@10"] <= 1
    model = AutoModel.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert model.config.text_model_name_or_path == inputs.text
    assert model.config.text_model_fingerprint == LLM2CLIPTextModel.from_pretrained(inputs.text).fingerprint()
    assert model.encode_text(["a dog", "a cat"], processor).shape == (2, 24)
    checkpoint = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "processor_config.json", "tokenizer.json", "modeling_llm2clip.py"} <= checkpoint


def test_llm_can_be_bundled(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path, inputs, bundle_text_model=True, max_steps=1, save_strategy="no")
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.text_model_name_or_path is None
    assert model.text_model.fingerprint() == LLM2CLIPTextModel.from_pretrained(inputs.text).fingerprint()


def test_the_card_names_the_evaluation_data_with_its_revision(inputs: Inputs, tmp_path: Path) -> None:
    table = load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/validation.parquet", split="train[:20]")
    (tmp_path / "bare").mkdir()
    table.to_parquet(tmp_path / "bare" / "train.parquet")
    bare = str(tmp_path / "bare")
    sources = {"validation": tiny.concepts("validation", caption_columns=["caption"], max_samples=40), "bare": bare}
    run(tmp_path / "out", inputs, eval_sources=sources, max_steps=1, save_strategy="no")
    results = read_card(tmp_path / "out")[0]["model-index"][0]["results"]
    found = {result["dataset"]["type"]: result["dataset"]["revision"] for result in results}
    assert found == {"concepts": data_revision(tiny.CONCEPTS), "bare": data_revision(bare)}


@pytest.mark.parametrize("changes", [{}, {"freeze_vision_layers": 1, "frozen_states_dir": True}])
@pytest.mark.parametrize("tower", ["eva02", "dinov2"])
def test_resumed_run_equals_an_uninterrupted_run(
    tower: str, changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    if tower == "dinov2":
        changes = {**changes, "vision_model_name_or_path": tiny.save_dinov2_tower(tmp_path / "vision")}
    if "frozen_states_dir" in changes:
        changes = {**changes, "frozen_states_dir": str(tmp_path / "states")}
    run(tmp_path / "unbroken", inputs, **changes)
    run(tmp_path / "broken", inputs, **{**changes, "max_steps": 6, "save_total_limit": 2})
    expected = weights(tmp_path / "unbroken")
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    run(tmp_path / "broken", inputs, resume=True, **changes)
    for name, value in weights(tmp_path / "broken").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    assert losses(tmp_path / "broken")[3:] == pytest.approx(losses(tmp_path / "unbroken")[3:], abs=1e-5)


def test_best_checkpoint_is_loaded_at_the_end(inputs: Inputs, tmp_path: Path) -> None:
    # The largest mean rank is the worst, and so not the last one.
    best = {"metric_for_best_model": "eval_validation_text_to_image_mean_rank", "greater_is_better": True}
    fields = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, **best}
    run(tmp_path / "run", inputs, vision_model_name_or_path=tiny.save_dinov2_tower(tmp_path / "vision"), **fields)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3
    expected = weights(Path(state["best_model_checkpoint"]))
    for name, value in weights(tmp_path / "run").items():
        assert value.equal(expected[name]), name


def test_image_backend_fast_is_used_for_training_images(
    inputs: Inputs, tmp_path: Path, decoded_to_tensors: list[str]
) -> None:
    fields = {"max_steps": 2, "save_strategy": "no", "crop_scale": [1.0, 1.0]}
    run(tmp_path / "exact", inputs, **fields)
    assert not decoded_to_tensors
    run(tmp_path / "fast", inputs, image_backend="fast", **fields)
    assert decoded_to_tensors
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "exact"), abs=1e-2)


def test_patch_dropout_reaches_the_tower(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    forward = EVA02Attention.forward

    def counted(self: EVA02Attention, hidden_states: torch.Tensor, rotary: torch.Tensor | None) -> Any:
        tokens.append(hidden_states.shape[1])
        return forward(self, hidden_states, rotary)

    monkeypatch.setattr(EVA02Attention, "forward", counted)
    fields = {"max_steps": 1, "save_strategy": "no", "eval_sources": {}}
    run(tmp_path / "all", inputs, **fields)
    (whole,) = set(tokens)
    tokens.clear()
    run(tmp_path / "half", inputs, patch_dropout=0.5, **fields)
    assert tokens[-1] == 1 + (whole - 1) // 2
    assert LLM2CLIPModel.from_pretrained(tmp_path / "half", text_model=False).vision_model.config.patch_dropout == 0.5
    CLIPVisionModel(tiny_models.other_vision_config("clip_vision_model")).save_pretrained(tmp_path / "clip")
    processor = {"image_processor_name_or_path": inputs.vision}
    with pytest.raises(ValueError, match="CLIPVisionModel has none"):
        run(tmp_path / "no", inputs, vision_model_name_or_path=str(tmp_path / "clip"), patch_dropout=0.5, **processor)


def test_online_llm_gives_the_same_losses_as_the_cache(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "cache", inputs, max_steps=3, save_strategy="no")
    run(tmp_path / "online", inputs, max_steps=3, save_strategy="no", embedding_cache=None, online_text_model=True)
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cache"), abs=2e-3)
    saved = AutoModel.from_pretrained(tmp_path / "online", text_model=False)
    assert saved.config.text_model_fingerprint is not None


def test_frozen_layers_keep_their_weights_and_stored_states_give_equal_losses(inputs: Inputs, tmp_path: Path) -> None:
    """Without augmentation, training from stored states equals training through the frozen layers."""
    fields = {"freeze_vision_layers": 1, "crop_scale": [1.0, 1.0], "max_steps": 4, "save_strategy": "no"}
    states = str(tmp_path / "states")
    run(tmp_path / "stored", inputs, frozen_states_dir=states, **fields)
    start = AutoModel.from_pretrained(inputs.vision)
    trained = weights(tmp_path / "stored")
    for name, value in start.named_parameters():
        frozen = name.startswith(("patch_embed", "cls_token", "pos_embed", "blocks.0."))
        assert trained[f"vision_model.{name}"].equal(value) == frozen, name
    first = losses(tmp_path / "stored")
    run(tmp_path / "again", inputs, frozen_states_dir=states, **fields)
    assert losses(tmp_path / "again") == first
    assert len(list((tmp_path / "states").glob("[!.]*"))) == 1


@pytest.mark.parametrize("model_type", ["eva02", "clip_vision_model", "dinov2"])
def test_upper_layers_on_stored_states_equal_the_whole_tower(model_type: str, inputs: Inputs) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    if model_type == "eva02":
        tower: Any = AutoModel.from_pretrained(inputs.vision)
    elif model_type == "dinov2":
        tower = Dinov2Model(AutoConfig.for_model("dinov2", **sizes))
    else:
        tower = CLIPVisionModel(AutoConfig.for_model(model_type, **sizes, intermediate_size=48))
    tower.eval()
    frozen = FrozenLayers(tower, 1, (28, 28))
    pixels = torch.randn(3, 3, 28, 28)
    expected = tower(pixels)
    states = frozen.compute(pixels)
    with frozen.replaced_by(states) as placeholder:
        actual = tower(placeholder)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
    torch.testing.assert_close(tower(pixels).pooler_output, expected.pooler_output)
    with pytest.raises(ValueError, match="freeze_vision_layers is 9, but the tower has"):
        FrozenLayers(tower, 9, (28, 28))
    with pytest.raises(ValueError, match="freeze_vision_layers is -9, but the tower has"):
        FrozenLayers(tower, -9, (28, 28))
    assert FrozenLayers(tower, -1, (28, 28)).num_layers == len(frozen.layers) - 1


def test_training_continues_from_an_llm2clip_model(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "first", inputs, max_steps=2, save_strategy="no")
    more = {"model_name_or_path": str(tmp_path / "first"), "max_steps": 1, "save_strategy": "no"}
    with pytest.raises(ValueError, match="is already trained; leave projection_dim unset"):
        run(tmp_path / "second", inputs, **more)
    run(tmp_path / "second", inputs, projection_dim=None, **more)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first.keys() == second.keys()
    change = (second["text_adapter.proj.weight"] - first["text_adapter.proj.weight"]).abs().max()
    assert 0 < change < 0.01


def test_resumed_run_on_a_streamed_source_equals_an_uninterrupted_run(inputs: Inputs, tmp_path: Path) -> None:
    fields = {"sources": [tiny.concepts(streaming=True)], "shuffle_block": 16}
    run(tmp_path / "unbroken", inputs, **fields)
    run(tmp_path / "broken", inputs, **fields)
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    run(tmp_path / "broken", inputs, resume=True, **fields)
    expected = weights(tmp_path / "unbroken")
    for name, value in weights(tmp_path / "broken").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def damaged_source(folder: Path) -> dict[str, Any]:
    """Sixty-four rows of the data, two of them with a damaged image."""
    table = load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/train.parquet", split="train[:64]")
    rows = [{key: row[key] for key in ("key", "caption", "keywords")} for row in table.remove_columns("image")]
    (folder / "images").mkdir()
    with (folder / "images" / "metadata.jsonl").open("w") as metadata:
        for number, (row, image) in enumerate(zip(rows, table["image"], strict=True)):
            name = f"{number}.png"
            if number in (3, 40):
                (folder / "images" / name).write_bytes(b"not an image")
            else:
                image.save(folder / "images" / name)
            metadata.write(json.dumps({**row, "file_name": name}) + "\n")
    return {"path": str(folder / "images"), "caption_columns": ["caption", "keywords"]}


def test_damaged_images_are_refused_or_skipped_and_listed(inputs: Inputs, tmp_path: Path) -> None:
    source = damaged_source(tmp_path)
    with pytest.raises(DamagedImageError, match="cannot be used"):
        run(tmp_path / "raise", inputs, sources=[source], save_strategy="no")
    run(tmp_path / "skip", inputs, sources=[source], on_error="skip", save_strategy="no")
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped-0.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    history = json.loads((tmp_path / "skip" / "trainer_state.json").read_text())["log_history"]
    assert history[-2].get("skipped_samples") == 2


def test_a_first_batch_whose_samples_are_all_skipped_does_not_end_the_run(inputs: Inputs, tmp_path: Path) -> None:
    source = damaged_source(tmp_path)
    for number in range(16):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"not an image")
    stream = {**source, "streaming": True, "max_samples": 32}
    changes = {"per_device_train_batch_size": 16, "shuffle_block": 0, "logging_steps": 1, "save_strategy": "no"}
    run(tmp_path / "run", inputs, sources=[stream], on_error="skip", eval_sources={}, max_steps=2, **changes)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry for entry in history if "grad_norm" in entry)
    assert (first["loss"], first["grad_norm"], first["skipped_samples"]) == (0, 0, 16)
    assert second["grad_norm"] > 0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_steps_of_skipped_samples_alone_change_nothing(loss: str, inputs: Inputs, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sources": [damaged_source(tmp_path)], "on_error": "skip", "eval_sources": {}}
    changes |= {"per_device_train_batch_size": 1, "max_steps": 64, "save_strategy": "no", "loss": loss}
    run(tmp_path / "run", inputs, **changes, logging_steps=1)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "grad_norm" in entry]
    assert history[-2].get("skipped_samples") == 2
    if loss == "sigmoid":  # a single pair has another loss of 0
        assert [entry["grad_norm"] == entry["loss"] == 0 for entry in steps].count(True) == 2


def test_a_run_counts_the_skipped_samples_of_its_own_steps(inputs: Inputs, tmp_path: Path) -> None:
    """Those of another run, and of the steps after the checkpoint, are in the file that a run finds."""
    log, folder = tmp_path / "run" / "skipped-0.jsonl", tmp_path / "run"
    folder.mkdir()
    log.write_text('{"key": "of another run", "reason": "it is damaged"}\n')
    changes = {"sources": [damaged_source(tmp_path)], "on_error": "skip", "eval_sources": {}, "save_steps": 2}
    run(folder, inputs, **changes)
    history, listed = (json.loads((folder / "trainer_state.json").read_text())["log_history"], log.read_text())
    counts = [entry.get("skipped_samples", 0) for entry in history]
    assert (counts[-1], counts[1]) == (2, 1), "one of the two is met after step 2"
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(folder, inputs, resume=True, **changes)
    resumed = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_samples", 0) for entry in resumed] == counts
    assert log.read_text() == listed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embedding_cache": None}, ValueError, "give either embedding_cache"),
        ({"embedding_cache": "/nowhere"}, FileNotFoundError, "/nowhere is not an embedding cache"),
        ({"sources": [tiny.concepts(caption_columns=["title"])]}, ValueError, "title.*caption_de"),
        ({"sources": [tiny.concepts(max_samples=200)]}, MissingCaptionError, "lacks .* captions"),
        ({"frozen_states_dir": "x"}, ValueError, "needs freeze_vision_layers"),
        ({"crop_scale": [0.9]}, ValueError, "crop_scale must be"),
        ({"sources": [{**tiny.concepts(), "max_samples": "many"}]}, ValueError, "max_samples is 'many'"),
        ({"patch_dropout": 1.0}, ValueError, "patch_dropout must be at least 0 and below 1"),
        ({"image_backend": "quick"}, ValueError, "image_backend is 'quick', but it has to be one of exact, fast"),
        ({"on_error": "ignore"}, ValueError, "on_error is 'ignore', but it has to be one of raise, skip"),
        ({"text_model_name_or_path": ""}, ValueError, "needs text_model_name_or_path"),
    ],
)
def test_invalid_settings_raise_a_clear_error(
    changes: dict[str, Any], error: type[Exception], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "out", inputs, **{"save_strategy": "no", **changes})


def test_cache_of_another_encoder_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Before training, for two towers and for a trained model."""
    other = LLM2CLIPTextModel.from_pretrained(inputs.text)
    with torch.no_grad():
        other.decoder.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(inputs.text).save_pretrained(tmp_path / "other")
    with pytest.raises(StoreMismatchError, match=str(other.fingerprint())):
        run(tmp_path / "out", inputs, text_model_name_or_path=str(tmp_path / "other"))
    run(tmp_path / "first", inputs, max_steps=1, save_strategy="no")
    cache = tmp_path / "cache"
    embed.run(
        embed.EmbedConfig(
            text_model_name_or_path=str(tmp_path / "other"), output_dir=str(cache), sources=[tiny.concepts()]
        )
    )
    changes = {"model_name_or_path": str(tmp_path / "first"), "projection_dim": None, "embedding_cache": str(cache)}
    with pytest.raises(StoreMismatchError, match=str(other.fingerprint())):
        run(tmp_path / "out", inputs, **changes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_llm_is_a_text_tower_without_prompt(dtype: str, inputs: Inputs, tmp_path: Path) -> None:
    """The baseline without stage 1: embed, stage 2 and the result encode captions alike."""
    cache = str(tmp_path / "cache")
    settings = {"text_model_name_or_path": inputs.llm, "output_dir": cache, "sources": [tiny.concepts()]}
    embed.run(embed.EmbedConfig(**settings, dtype=dtype))
    fields = {"text_model_name_or_path": inputs.llm, "embedding_cache": cache, "eval_sources": {}}
    run(tmp_path / "out", inputs, **fields, max_steps=1, save_strategy="no")
    model, processor = (load(tmp_path / "out") for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained))
    opened = EmbeddingCache.open(cache, model.config.text_model_fingerprint)
    captions = distinct_captions(CaptionSource.from_dict(tiny.concepts()))[:8]
    torch.testing.assert_close(
        model.text_model.encode(captions, processor.tokenizer), opened.lookup(captions), atol=1e-2, rtol=1e-2
    )


def test_missing_training_captions_raise_before_training(inputs: Inputs, tmp_path: Path) -> None:
    columns = {"caption_columns": ["caption", "caption_de"]}
    with pytest.raises(MissingCaptionError, match=r"lacks \d+ captions of the training set"):
        run(tmp_path, inputs, sources=[tiny.concepts(**columns)])
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "settings.json"}
    # Those that are never drawn need no embedding.
    run(tmp_path, inputs, sources=[tiny.concepts(**columns, caption_weights=[1, 0])], max_steps=1, save_strategy="no")


def test_missing_evaluation_captions_raise_before_training(inputs: Inputs, tmp_path: Path) -> None:
    evaluation = {"german": tiny.concepts("validation", caption_columns=["caption_de"])}
    with pytest.raises(MissingCaptionError, match=r"lacks \d+ of the \d+ captions of eval_sources 'german'"):
        run(tmp_path, inputs, eval_sources=evaluation)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "settings.json"}


def test_stored_states_depend_on_the_preprocessing(inputs: Inputs, tmp_path: Path) -> None:
    states = {"freeze_vision_layers": 1, "frozen_states_dir": str(tmp_path / "states")}
    run(tmp_path / "a", inputs, **states, max_steps=1, save_strategy="no")
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "processor")
    other = {"image_processor_name_or_path": str(tmp_path / "processor")}
    run(tmp_path / "b", inputs, **states, **other, max_steps=1, save_strategy="no")
    assert len(list((tmp_path / "states").glob("[!.]*"))) == 2
    vision = tiny.save_vision_tower(tmp_path / "vision", patch_dropout=0.5)
    with pytest.raises(ValueError, match="patch_dropout does not work with frozen_states_dir"):
        run(tmp_path / "c", inputs, vision_model_name_or_path=vision, **states)
