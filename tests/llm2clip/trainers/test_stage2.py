"""Stage 2 from its settings: the model that it makes, its modes, its data, and what it refuses before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, DamagedImageError, distinct_captions
from llm2clip.encoders import embed
from llm2clip.losses import sigmoid_loss
from llm2clip.store import EmbeddingCache, MissingCaptionError, StoreMismatchError
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Config, Stage2Recipe
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import fields_of, history, losses, run, weights
from tests.processes import run_ranks

QUICK: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "eval_sources": {}}
PROJECTION = "model.safetensors text_adapter.proj.weight"
FINISHED: dict[str, Any] = {"vision_model_name_or_path": "", "text_model_name_or_path": "", "projection_dim": None}

FROZEN = {"freeze_vision": "all", "vision_pooling": "cls_mean"}

# Each collective operation of the group may wait for one second, and the work takes three.
ALONE = """
import time
from datetime import timedelta
import torch.distributed as dist
from llm2clip.command_line.processes import on_main_process
dist.init_process_group("gloo", timeout=timedelta(seconds=1))
start = time.monotonic()
on_main_process(lambda: time.sleep(3))
assert time.monotonic() - start > 2.5
dist.destroy_process_group()
"""


def test_other_processes_wait_longer_than_a_collective_operation_may(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    run_ranks([str(tmp_path / "alone.py")], 2)


def test_trained_parts_are_float32_whatever_they_were_saved_in(inputs: Inputs, tmp_path: Path) -> None:
    AutoModel.from_pretrained(inputs.vision).to(torch.bfloat16).save_pretrained(tmp_path / "vision")
    AutoImageProcessor.from_pretrained(inputs.vision).save_pretrained(tmp_path / "vision")
    run("stage2", tmp_path / "out", inputs, vision_model_name_or_path=str(tmp_path / "vision"), **QUICK)
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}


def test_sigmoid_loss_trains_a_bias_that_the_model_keeps(inputs: Inputs, tmp_path: Path) -> None:
    run("stage2", tmp_path / "one", inputs, loss="sigmoid", tower_chunk_size=5, **{**QUICK, "max_steps": 3})
    run("stage2", tmp_path / "whole", inputs, loss="sigmoid", **{**QUICK, "max_steps": 3})
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    model = AutoModel.from_pretrained(tmp_path / "one", text_model=False).eval()
    assert model.logit_bias != -10
    pixels, embeds = torch.randn(3, 3, 28, 28), torch.randn(3, model.config.text_config.hidden_size)
    output = model(pixel_values=pixels, llm_embeds=embeds, return_loss=True)
    cosines = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, cosines * output.logit_scale + output.logit_bias)
    expected = sigmoid_loss(output.image_embeds, output.text_embeds, output.logit_scale, output.logit_bias)
    torch.testing.assert_close(output.loss, expected)
    # Trained further it keeps its loss.
    finished = {**FINISHED, "model_name_or_path": str(tmp_path / "one"), **QUICK}
    run("stage2", tmp_path / "two", inputs, **finished, loss="sigmoid")
    with pytest.raises(ValueError, match="loss is softmax, but the model has a logit bias"):
        run("stage2", tmp_path / "three", inputs, **finished)


def test_new_parts_start_as_in_the_original(inputs: Inputs, tmp_path: Path) -> None:
    def new_model(**changes: Any) -> LLM2CLIPModel:
        return run_stage2.open_model(build_config(Stage2Recipe, fields_of("stage2", tmp_path, inputs, **changes)))[0]

    assert 0 < new_model().visual_projection.weight.std() < 1e-4
    assert new_model().logit_bias is None
    assert new_model(logit_scale_init_value="2.5").logit_scale == 2.5
    assert new_model(loss="sigmoid").logit_bias == -10
    with pytest.raises(ValueError, match="has no logit scale; set logit_scale_init_value to a number"):
        new_model(logit_scale_init_value="checkpoint")
    model = new_model(visual_head="gated", **FROZEN)
    assert (model.config.vision_pooling, model.config.visual_head) == ("cls_mean", "gated")
    model.save_pretrained(tmp_path / "model")
    trained = {**FINISHED, "model_name_or_path": str(tmp_path / "model"), "freeze_vision": "all"}
    with pytest.raises(ValueError, match=r"visual_head is gated, but .* is already trained"):
        new_model(**trained, visual_head="gated")


def test_training_continues_from_an_llm2clip_model(inputs: Inputs, tmp_path: Path) -> None:
    run("stage2", tmp_path / "first", inputs, **QUICK)
    more = {**FINISHED, "model_name_or_path": str(tmp_path / "first"), **QUICK}
    with pytest.raises(ValueError, match=r"projection_dim is 24, but .* is already trained"):
        run("stage2", tmp_path / "second", inputs, **{**more, "projection_dim": 24})
    run("stage2", tmp_path / "second", inputs, **more)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first.keys() == second.keys()
    assert 0 < (second[PROJECTION] - first[PROJECTION]).abs().max() < 0.01


def test_online_llm_gives_the_same_losses_as_the_cache(inputs: Inputs, tmp_path: Path) -> None:
    run("stage2", tmp_path / "cache", inputs, **QUICK)
    run("stage2", tmp_path / "online", inputs, embedding_cache=None, online_text_model=True, **QUICK)
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cache"), abs=2e-3)
    saved = AutoModel.from_pretrained(tmp_path / "online", text_model=False)
    assert saved.config.text_model_fingerprint == LLM2CLIPTextModel.from_pretrained(inputs.text).fingerprint()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_rows_of_a_step_come_from_one_source_or_from_all(frozen: bool, inputs: Inputs, tmp_path: Path) -> None:
    found: dict[str, list[set[str]]] = {}
    states = {"freeze_vision": "all"} if frozen else {}
    for mixing in ("one_source_per_step", "proportional"):
        sources = [small_runs.concepts(max_samples=48), small_runs.concepts("validation", max_samples=40)]
        fields = fields_of("stage2", tmp_path / mixing, inputs, sources=sources, mixing=mixing, **states)
        config = build_config(Stage2Recipe, fields)
        trainer = run_stage2.build_trainer(config)
        second: int = trainer.train_dataset.starts[1]
        loader: Any = trainer.get_train_dataloader()
        batches = [[index.index for index in batch] for batch in loader.batch_sampler]
        found[mixing] = [{"second" if row >= second else "first" for row in rows} for rows in batches]
    assert sorted(map(sorted, found["one_source_per_step"])) == [["first"]] * 3 + [["second"]] * 2
    assert found["proportional"] == [{"first", "second"}] * 5


def damaged_source(folder: Path, *damaged: int) -> dict[str, Any]:
    """Sixty-four rows of the data, some of which have a damaged image."""
    table = datasets.load_dataset("parquet", data_files=f"{small_runs.CONCEPTS}/train.parquet", split="train[:64]")
    table = table.cast_column("image", datasets.Image(decode=False))

    def broken(row: dict[str, Any], number: int) -> dict[str, Any]:
        return {"image": {"bytes": f"image {number}".encode(), "path": None}} if number in damaged else {}

    table.map(broken, with_indices=True).to_parquet(folder / "rows.parquet")
    return {"path": str(folder / "rows.parquet"), "caption_columns": ["caption", "keywords"]}


@pytest.mark.parametrize("changes", [{}, FROZEN], ids=["trained", "frozen"])
def test_damaged_images_are_refused_or_skipped_and_listed(
    changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    shared = {"sources": [damaged_source(tmp_path, 3, 40)], "eval_sources": {}, **changes}
    with pytest.raises(DamagedImageError, match="cannot be used"):
        run("stage2", tmp_path / "raise", inputs, **shared)
    run("stage2", tmp_path / "skip", inputs, **shared, on_error="skip", save_strategy="no")
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped-0.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in listed}) == 2
    assert history(tmp_path / "skip")[-1]["skipped_samples"] == 2


@pytest.mark.parametrize("changes", [{}, FROZEN], ids=["trained", "frozen"])
def test_a_row_without_stored_embedding_is_refused_or_skipped(
    changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    """Row 3 has another caption, which is stored; row 40 has none."""
    source = damaged_source(tmp_path)
    table = datasets.Dataset.from_parquet(source["path"])
    new = {"caption": (3, 40), "keywords": (40,)}
    texts = {
        column: [f"new {column}" if row in rows else text for row, text in enumerate(table[column])]
        for column, rows in new.items()
    }
    changed = table.map(lambda _, row: {column: texts[column][row] for column in new}, with_indices=True)
    changed.to_parquet(source["path"])
    shared = {"sources": [source], "eval_sources": {}, **changes}
    with pytest.raises(MissingCaptionError, match="lacks 3 of the 128 captions of the training set"):
        run("stage2", tmp_path / "raise", inputs, **shared)
    run("stage2", tmp_path / "skip", inputs, **shared, on_error="skip", save_strategy="no")
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped-0.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in listed}
    other, none = table["key"][3], table["key"][40]
    assert reasons[none] == "its caption has no stored embedding"
    assert set(reasons) <= ({none} if changes else {other, none}), "row 3 is skipped where its new caption is drawn"


def test_a_resumed_run_counts_the_skipped_samples_of_its_own_steps(inputs: Inputs, tmp_path: Path) -> None:
    """Those of another run, and of the steps after the checkpoint, are in the file that a run finds."""
    folder, log = tmp_path / "run", tmp_path / "run" / "skipped-0.jsonl"
    folder.mkdir()
    log.write_text('{"key": "of another run", "reason": "it is damaged"}\n')
    changes = {"sources": [damaged_source(tmp_path, 3, 40)], "on_error": "skip", "eval_sources": {}, "save_steps": 2}
    run("stage2", folder, inputs, **changes)
    listed, counts = log.read_text(), [entry.get("skipped_samples", 0) for entry in history(folder)]
    assert (counts[1], counts[-1]) == (1, 2), "one of the two is met after step 2"
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run("stage2", folder, inputs, resume=True, **changes)
    assert [entry.get("skipped_samples", 0) for entry in history(folder)] == counts
    assert log.read_text() == listed


@pytest.mark.parametrize("changes", [{}, FROZEN, {"dataloader_num_workers": 1}], ids=["trained", "frozen", "worker"])
def test_a_batch_of_skipped_samples_alone_is_no_step_but_an_error_that_names_them(
    changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    keys = small_runs.rows_of_concepts(":64", "train")["key"]
    shared = {"sources": [damaged_source(tmp_path, *range(8, 64))], "on_error": "skip", "eval_sources": {}}
    shared |= {"per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 2, "max_steps": 64}
    with pytest.raises(ValueError, match="none of the 2 rows of a batch can be used") as error:
        run("stage2", tmp_path / "run", inputs, **shared, **changes)
    assert sum(key in str(error.value) for key in keys[8:]) == 2
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embedding_cache": None}, ValueError, "give either embedding_cache"),
        ({"embedding_cache": "/nowhere"}, FileNotFoundError, "/nowhere is not an embedding cache"),
        ({"sources": [small_runs.concepts(caption_columns=["title"])]}, ValueError, "title.*caption_de"),
        ({"sources": [{**small_runs.concepts(), "max_samples": "many"}]}, ValueError, "max_samples is 'many'"),
        ({"crop_scale": [0.9]}, ValueError, "crop_scale must be"),
        ({"patch_dropout": 1.0}, ValueError, "patch_dropout must be at least 0 and below 1"),
        ({"feature_dropout": 1.5, **FROZEN}, ValueError, "feature_dropout must be at least 0 and below 1"),
        ({"image_backend": "quick"}, ValueError, "image_backend is 'quick'"),
        ({"text_model_name_or_path": ""}, ValueError, "needs text_model_name_or_path"),
        ({"text_model_dtype": "bfloat16"}, ValueError, "text_model_dtype is bfloat16, but no LLM runs"),
        ({"shuffle_block": 0}, ValueError, "shuffle_block is 0, but no source is a stream"),
        ({"eval_sources": {}, "eval_embedding_cache": "x"}, ValueError, "there are no eval_sources"),
        ({"model_name_or_path": "m"}, ValueError, "but m is already trained"),
        ({"vision_model_revision": "v2"}, ValueError, "revision v2 is given, but .* is a folder"),
        (
            {"eval_sources": {"v": small_runs.concepts(embedding_cache="x")}},
            ValueError,
            "embedding_cache is x, but .* is read without it here",
        ),
        ({"loss": "sigmoid", "label_smoothing_factor": 0.1}, ValueError, "loss"),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run("stage2", tmp_path / "out", inputs, **changes)


def test_a_cache_of_another_encoder_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    other = LLM2CLIPTextModel.from_pretrained(inputs.text)
    with torch.no_grad():
        other.decoder.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(inputs.text).save_pretrained(tmp_path / "other")
    with pytest.raises(StoreMismatchError, match=str(other.fingerprint())):
        run("stage2", tmp_path / "out", inputs, text_model_name_or_path=str(tmp_path / "other"))
    run("stage2", tmp_path / "first", inputs, **QUICK)
    cache, sources = str(tmp_path / "cache"), [small_runs.concepts(max_samples=20)]
    embed.run(embed.EmbedConfig(str(tmp_path / "other"), output_dir=cache, sources=sources))
    finished = {**FINISHED, "model_name_or_path": str(tmp_path / "first"), "embedding_cache": cache}
    with pytest.raises(StoreMismatchError, match=str(other.fingerprint())):
        run("stage2", tmp_path / "out", inputs, **finished)


def test_a_trainer_refuses_a_cache_of_captions_after_an_instruction(inputs: Inputs, tmp_path: Path) -> None:
    run("stage2", tmp_path / "first", inputs, **QUICK)
    model: Any = AutoModel.from_pretrained(tmp_path / "first", text_model=False)
    cache, sources = str(tmp_path / "cache"), [small_runs.concepts(max_samples=20)]
    embed.run(embed.EmbedConfig(inputs.text, output_dir=cache, sources=sources, instruction="Describe: "))
    args = Stage2Config(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(StoreMismatchError, match=r"embedded after .*Describe"):
        Stage2Trainer(model, args, train_dataset=[], cache=EmbeddingCache.open(cache))


def test_a_plain_llm_is_a_text_tower_without_prompt(inputs: Inputs, tmp_path: Path) -> None:
    """The baseline without stage 1: embed, stage 2 and the result encode captions alike."""
    cache = str(tmp_path / "cache")
    settings: dict[str, Any] = {"text_model_name_or_path": inputs.llm, "output_dir": cache, "dtype": "float16"}
    embed.run(embed.EmbedConfig(**settings, sources=[small_runs.concepts()]))
    run("stage2", tmp_path / "out", inputs, text_model_name_or_path=inputs.llm, embedding_cache=cache, **QUICK)
    model, processor = (load.from_pretrained(tmp_path / "out") for load in (AutoModel, AutoProcessor))
    opened = EmbeddingCache.open(cache)
    assert opened.manifest.fingerprint == model.config.text_model_fingerprint
    captions = distinct_captions(CaptionSource.from_dict(small_runs.concepts()))[:8]
    found = model.text_model.encode(captions, processor.tokenizer)
    torch.testing.assert_close(found, opened.lookup(captions), atol=1e-2, rtol=1e-2)


def test_missing_captions_are_refused_before_training(inputs: Inputs, tmp_path: Path) -> None:
    columns = {"caption_columns": ["caption", "caption_de"]}
    evaluation = {"german": small_runs.concepts("validation", caption_columns=["caption_de"])}
    for changes, message in (
        ({"sources": [small_runs.concepts(**columns)]}, r"lacks \d+ of the \d+ captions of the training set"),
        ({"eval_sources": evaluation}, r"lacks \d+ of the \d+ captions of eval_sources 'german'"),
    ):
        with pytest.raises(MissingCaptionError, match=message):
            run("stage2", tmp_path, inputs, **changes)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "settings.json"}
    # Those that are never drawn need no embedding.
    run("stage2", tmp_path, inputs, sources=[small_runs.concepts(**columns, caption_weights=[1, 0])], **QUICK)
