"""Stage 2 with LoRA on the LLM: what trains, what is saved, what finds it again, and what would be stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from llm2clip import EmbeddingCache, LLM2CLIPModel, LLM2CLIPTextModel, Stage2Config, Stage2Trainer
from llm2clip.command_line.settings import build_config
from llm2clip.encoders import embed
from llm2clip.files.atomic import read_json, write_json
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub import push
from llm2clip.hub.build import build_folder
from llm2clip.models.identity import text_tower_fingerprint
from llm2clip.store import StoreMismatchError
from llm2clip.trainers import run_stage2
from llm2clip.trainers.lora import add_lora
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPProcessor
from tests import stranger
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import captioned, settings
from tests.llm2clip.trainers.stages import assert_equal, broken_after, joint_model, weights
from tests.loopback_hub import TOKEN, File, LoopbackHub, Repo

CAPTIONS = ["a red bicycle", "two small dogs at the sea"]
STRANGER = """
import json, sys
from transformers import AutoModel, AutoProcessor
found = []
for folder in sys.argv[2:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found.append(model.encode_text(json.loads(sys.argv[1]), processor).tolist())
print(json.dumps(found))
"""


def recipe(folder: Path, inputs: Inputs, **changes: Any) -> Stage2Recipe:
    fields = small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache) | {"embedding_cache": None}
    return build_config(Stage2Recipe, {**fields, "max_steps": 4, "save_steps": 2, "lora_rank": 4, **changes})


@pytest.fixture(scope="module")
def results(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run, saved as a merged model and as an adapter, which no test changes."""
    folder = tmp_path_factory.mktemp("lora")
    for name in ("merged", "adapter"):
        run_stage2.run(recipe(folder / name, inputs, save_format=name))
    return {name: folder / name for name in ("merged", "adapter")}


def test_vision_tower_adapter_and_lora_train_and_both_results_are_one_model(
    inputs: Inputs, results: dict[str, Path]
) -> None:
    merged, adapter = (LLM2CLIPModel.from_pretrained(results[name]).eval() for name in ("merged", "adapter"))
    base = LLM2CLIPTextModel.from_pretrained(inputs.text)
    assert merged.config.text_model_name_or_path is None
    assert read_json(results["adapter"] / "config.json")["text_model_name_or_path"] == "./text_model"
    assert merged.config.text_model_fingerprint == merged.text_model.fingerprint() != base.fingerprint()
    assert adapter.text_model.has_adapter
    assert adapter.config.text_model_fingerprint == merged.config.text_model_fingerprint
    torch.testing.assert_close(adapter.encode_text(CAPTIONS), merged.encode_text(CAPTIONS), atol=1e-5, rtol=0)
    before = base.state_dict()
    changed = {name for name, value in merged.text_model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all("_proj.weight" in name for name in changed)
    first, last = (weights(results["adapter"] / f"checkpoint-{step}") for step in (2, 4))
    moved = {name.split(" ")[1].split(".")[0] for name, value in last.items() if not value.equal(first[name])}
    assert {"vision_model", "text_adapter", "visual_projection"} <= moved
    for name in ("merged", "adapter"):
        assert "(LoRA of rank 4, alpha 32)" in (results[name] / "README.md").read_text()


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_what_was_trained_on_a_rounded_llm_loads(form: str, inputs: Inputs, tmp_path: Path) -> None:
    """The files of the LLM are in float32."""
    changes = {
        "text_model_dtype": "bfloat16",
        "save_format": form,
        "max_steps": 2,
        "save_steps": 1,
        "eval_sources": {},
    }
    run_stage2.run(recipe(tmp_path / "run", inputs, **changes))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        trained = LLM2CLIPModel.from_pretrained(folder, text_model_kwargs={"dtype": torch.bfloat16}).eval()
        found = LLM2CLIPModel.from_pretrained(folder).eval()
        recorded = read_json(folder / "config.json")["text_model_fingerprint"]
        assert found.config.text_model_fingerprint == trained.config.text_model_fingerprint == recorded
        torch.testing.assert_close(found.encode_text(CAPTIONS), trained.encode_text(CAPTIONS), atol=0.02, rtol=0)
        settings = {"text_model_name_or_path": str(folder), "output_dir": str(tmp_path / f"cache-{folder.name}")}
        embed.run(embed.EmbedConfig(**settings, sources=[small_runs.concepts("validation", max_samples=4)]))
        assert EmbeddingCache.open(settings["output_dir"]).manifest.fingerprint == recorded


def test_a_moved_result_loads_without_this_package(results: dict[str, Path], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("checkpoint-*")
    moved = [shutil.copytree(folder, tmp_path / form, ignore=ignored) for form, folder in results.items()]
    (tmp_path / "home").mkdir()
    found = stranger.answer(STRANGER, json.dumps(CAPTIONS), *moved, home=tmp_path / "home")
    for rows, folder in zip(found, results.values(), strict=True):
        expected = LLM2CLIPModel.from_pretrained(folder).encode_text(CAPTIONS)
        torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-5, rtol=0)


def test_the_llm_in_the_folder_is_found_by_whatever_reads_a_text_tower(
    results: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results["adapter"], tmp_path / "moved"))
    fingerprint = read_json(folder / "config.json")["text_model_fingerprint"]
    light = LLM2CLIPModel.from_pretrained(folder, text_model=False)
    assert light.config.text_model_name_or_path == str(folder / "text_model")
    assert text_tower_fingerprint(str(folder), None, light.config.text_config) == fingerprint
    for place in (folder, folder / "text_model"):
        assert LLM2CLIPTextModel.from_pretrained(place).fingerprint() == fingerprint
    # Saved elsewhere, it refers to the folder.
    light.save_pretrained(tmp_path / "elsewhere")
    assert LLM2CLIPModel.from_pretrained(tmp_path / "elsewhere").text_model.fingerprint() == fingerprint
    build_folder(folder, tmp_path / "built", license="apache-2.0", bundle_text_model=True)
    built = LLM2CLIPModel.from_pretrained(tmp_path / "built")
    assert (built.config.text_model_name_or_path, built.text_model.has_adapter) == (None, False)
    assert built.text_model.fingerprint() == fingerprint


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_old_rows_are_refused_and_new_ones_taken_when_the_model_is_continued(
    form: str, inputs: Inputs, results: dict[str, Path], tmp_path: Path
) -> None:
    known = {"model_name_or_path": str(results[form]), "vision_model_name_or_path": "", "text_model_name_or_path": ""}
    known |= {"projection_dim": None, "lora_rank": 0, "max_steps": 1}
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        run_stage2.run(recipe(tmp_path / "old", inputs, **known, embedding_cache=inputs.cache))
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    settings = {"text_model_name_or_path": str(results[form]), "output_dir": str(tmp_path / "cache")}
    embed.run(embed.EmbedConfig(**settings, sources=sources))
    run_stage2.run(recipe(tmp_path / "new", inputs, **known, embedding_cache=str(tmp_path / "cache")))
    whole = LLM2CLIPModel.from_pretrained(tmp_path / "new")
    assert whole.text_model.fingerprint() == whole.config.text_model_fingerprint
    # LoRA once more, on the LLM that LoRA has trained.
    again = recipe(tmp_path / "again", inputs, **{**known, "lora_rank": 2, "save_format": form})
    run_stage2.run(again)
    third = LLM2CLIPModel.from_pretrained(tmp_path / "again")
    assert third.text_model.fingerprint() == third.config.text_model_fingerprint
    assert third.config.text_model_fingerprint != whole.config.text_model_fingerprint


def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs: Inputs, results: dict[str, Path], tmp_path: Path) -> None:
    folder = broken_after(results["merged"], tmp_path / "run", 2)
    other = shutil.copytree(inputs.text, tmp_path / "other")
    tower = LLM2CLIPTextModel.from_pretrained(other)
    with torch.no_grad():
        tower.get_input_embeddings().weight.add_(0.01)
    tower.save_pretrained(other)
    with pytest.raises(ValueError, match="weights of the LLM: "):
        run_stage2.run(recipe(folder, inputs, text_model_name_or_path=str(other)), resume=True)
    run_stage2.run(recipe(folder, inputs), resume=True)
    assert_equal(results["merged"], folder)
    assert_equal(results["merged"] / "checkpoint-4", folder / "checkpoint-4")


@pytest.mark.parametrize("changes", [{"tower_chunk_size": 5}, {"activation_checkpointing": True}], ids=str)
def test_chunks_and_recomputed_activations_give_the_same_gradients(
    changes: dict[str, Any], inputs: Inputs, results: dict[str, Path], tmp_path: Path
) -> None:
    run_stage2.run(recipe(tmp_path, inputs, **changes))
    assert_equal(results["merged"] / "checkpoint-2", tmp_path / "checkpoint-2", atol=1e-5)


def test_a_first_part_reads_the_cache_and_lora_starts_from_its_heads(inputs: Inputs, tmp_path: Path) -> None:
    first = {"freeze_vision": "all", "embedding_cache": inputs.cache, "max_steps": 2, "lora_rank": 0}
    config = recipe(tmp_path, inputs, parts=[first, {}], max_steps=1, learning_rate=1e-12, weight_decay=0.0)
    run_stage2.run(config)
    start = LLM2CLIPModel.from_pretrained(tmp_path / "part1", text_model=False)
    assert start.config.text_model_name_or_path == inputs.text
    second = LLM2CLIPModel.from_pretrained(tmp_path)
    assert second.config.text_model_name_or_path is None
    for name, value in start.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_cache": "x"}, "lora_rank trains the LLM, so that stored embeddings would be stale"),
        ({"sources": [small_runs.concepts(embedding_cache="x")]}, "stored embeddings would be stale"),
        ({"freeze_vision": "all"}, "freeze_vision: all reads stored embeddings of the LLM"),
        ({"lora_rank": 0, "lora_alpha": 8}, "lora_alpha is 8, but it needs lora_rank above 0"),
        ({"lora_rank": 0, "save_format": "adapter"}, "save_format is adapter, but it needs lora_rank above 0"),
        ({"lora_target_modules": ["nothing"]}, "do not fit the text model"),
    ],
    ids=str,
)
def test_what_would_be_stale_or_ignored_is_refused(
    changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage2.run(recipe(tmp_path / "run", inputs, **changes))


def trainer(inputs: Inputs, name: str, folder: Path, rank: int = 8, rows: Any = None, **changes: Any) -> Any:
    """A Trainer on a model to which LoRA layers are added before."""
    model, processor = LLM2CLIPModel.from_pretrained(name, text_model=False), LLM2CLIPProcessor.from_pretrained(name)
    add_lora(model, rank)
    given = {key: changes.pop(key) for key in ("cache",) if key in changes}
    fields = {"max_steps": 2, "learning_rate": 1e-2, "output_dir": str(folder), **changes}
    given |= {"train_dataset": captioned(inputs) if rows is None else rows, "processing_class": processor}
    return Stage2Trainer(model, Stage2Config(**settings(folder, **fields)), **given)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_trainer_loads_the_llm_and_saves_what_it_trained(form: str, inputs: Inputs, tmp_path: Path) -> None:
    name = joint_model(inputs, tmp_path / "model")
    own = trainer(inputs, name, tmp_path / "out", save_format=form)
    before = LLM2CLIPTextModel.from_pretrained(inputs.text).fingerprint()
    own.train()
    own.save_model()
    trained = own.model.eval()
    found = LLM2CLIPModel.from_pretrained(tmp_path / "out")
    assert found.text_model.fingerprint() == trained.text_model.fingerprint() != before
    torch.testing.assert_close(
        found.encode_text(CAPTIONS), trained.encode_text(CAPTIONS, own.processing_class), atol=1e-5, rtol=0
    )
    assert found.text_model.has_adapter == (form == "adapter")
    # By hand it is not saved without the LLM, which no repository has.
    with pytest.raises(ValueError, match="merge_adapter"):
        trained.save_pretrained(tmp_path / "by_hand")


def test_lora_follows_the_rate_of_the_text_side(inputs: Inputs, tmp_path: Path) -> None:
    own = trainer(inputs, joint_model(inputs, tmp_path / "model"), tmp_path / "out", text_learning_rate=0.5)
    groups = {name: group for group in own.create_optimizer().param_groups for name in group["param_names"]}
    lora = [name for name in groups if ".lora_" in name]
    assert len(lora) == 2 * 7 * own.model.config.text_config.decoder_config.num_hidden_layers
    assert {groups[name]["lr"] for name in lora} == {0.5}


def test_a_trainer_refuses_rows_that_would_be_stale(inputs: Inputs, tmp_path: Path) -> None:
    name = joint_model(inputs, tmp_path / "model")
    with pytest.raises(ValueError, match="stored embeddings would be stale; leave cache unset"):
        trainer(inputs, name, tmp_path / "out", cache=EmbeddingCache.open(inputs.cache))
    width = LLM2CLIPModel.from_pretrained(name, text_model=False).config.text_config.hidden_size
    rows = [{"pixel_values": torch.zeros(3, 28, 28), "llm_embeds": torch.ones(width)}] * 8
    with pytest.raises(ValueError, match="llm_embeds are stale"):
        trainer(inputs, name, tmp_path / "out", rows=rows, max_steps=1).train()


def test_layers_refer_to_a_folder_that_the_run_leaves_as_it_is(inputs: Inputs, tmp_path: Path) -> None:
    name = joint_model(inputs, tmp_path / "model")
    bundled = LLM2CLIPModel.from_pretrained(name)
    bundled.save_pretrained(tmp_path / "bundled", save_text_model=True)
    LLM2CLIPProcessor.from_pretrained(name).save_pretrained(tmp_path / "bundled")
    with pytest.raises(ValueError, match="which the run writes into; give the run another output_dir"):
        trainer(inputs, str(tmp_path / "bundled"), tmp_path / "bundled")
    fitted = trainer(inputs, str(tmp_path / "bundled"), tmp_path / "fitted")
    fitted.train()
    fitted.save_model()
    found = LLM2CLIPModel.from_pretrained(tmp_path / "fitted")
    assert found.text_model.fingerprint() == found.config.text_model_fingerprint
    assert found.config.text_model_fingerprint != bundled.config.text_model_fingerprint
    bundled.config.text_model_name_or_path, bundled.name_or_path = None, ""
    with pytest.raises(ValueError, match="in memory alone; LoRA needs one in a folder or on the Hub"):
        add_lora(bundled)


def test_a_pushed_adapter_is_found_in_the_repo_of_the_model(
    hub: LoopbackHub, inputs: Inputs, results: dict[str, Path], tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("checkpoint-*", FOLDER_MANIFEST)
    folder = Path(shutil.copytree(results["adapter"], tmp_path / "model", ignore=ignored))

    def upload() -> None:
        config = push.PushConfig(folder=str(folder), repo_id="tester/tiny", check=False)
        push.run(config, HfApi(endpoint=hub.url, token=TOKEN))

    with pytest.raises(ValueError, match="others cannot load"):
        upload()
    tower = Repo("tester/tower", "model")
    files = {path.name: File(path.read_bytes(), lfs=False) for path in Path(inputs.text).iterdir() if path.is_file()}
    tower.commit("main", files, "a tower")
    hub.repos["model", tower.name] = tower
    place = folder / "text_model" / "adapter_config.json"
    write_json(place, {**read_json(place), "base_model_name_or_path": tower.name})
    upload()
    expected = LLM2CLIPModel.from_pretrained(folder)
    found = LLM2CLIPModel.from_pretrained("tester/tiny")
    assert found.config.text_model_name_or_path == "tester/tiny/text_model"
    assert found.text_model.fingerprint() == expected.config.text_model_fingerprint
    assert LLM2CLIPTextModel.from_pretrained("tester/tiny").fingerprint() == expected.config.text_model_fingerprint
    config = found.config.text_config
    assert text_tower_fingerprint("tester/tiny/text_model", None, config) == expected.config.text_model_fingerprint
