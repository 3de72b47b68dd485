"""Every setting of a Trainer changes something or is refused, with the Trainer alone: no recipe, no command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm2clip import (
    DistillConfig,
    MNTPConfig,
    MNTPTrainer,
    Stage1Config,
    Stage2Config,
)
from llm2clip.trainers import stage1_trainer, stage2_trainer
from llm2clip.trainers.base_config import ContrastiveConfig, StageConfig
from llm2clip.trainers.text_tower_config import TextTowerConfig
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import distill, image_rows, mntp, settings, stage1, stage2
from tests.llm2clip.trainers.stages import run, weights

FROZEN = {"freeze_vision": "all"}
# What a run with other settings has to differ in: the trained weights, what it wrote, or an error, as a text in it.
WEIGHTS, FILES = "weights", "files"


def outcome(make: Callable[..., Any], inputs: Inputs, folder: Path, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    """Train, save, and return the weights, and the files with their sizes and the values of the log."""
    trainer = make(inputs, folder, **changes)
    trainer.train()
    trainer.save_model()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    files = sorted(
        (str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file()
    )
    return weights, (files, [*trainer.state.log_history[-1]])


# The changes of each setting, what else they need, and what they have to change. With several, in order.
STAGE2: dict[str, Any] = {
    "feature_dropout": (0.5, {}, WEIGHTS),
    "loss": ("sigmoid", {}, "the model has no logit bias"),
    "text_losses": ("all", {}, "the model has one text encoder"),
    "matryoshka_dims": ([8], {}, WEIGHTS),
    "shared_captions": ("positive", {}, None),
    "vision_learning_rate": (1e-2, {}, WEIGHTS),
    "text_learning_rate": (1e-2, {}, WEIGHTS),
    "vision_layer_decay": (0.5, {}, WEIGHTS),
    "patch_dropout": (0.5, {}, WEIGHTS),
    "freeze_vision": ("all", {}, WEIGHTS),
    "freeze_vision_layers": (1, {}, WEIGHTS),
    "save_format": ("adapter", {}, "the model has no LoRA layers"),
    "tower_chunk_size": (3, {}, None),
}
# Those of the command alone, with which it makes model and rows.
RECIPE: dict[str, Any] = {
    "projection_dim": (7, {}, WEIGHTS),
    "vision_pooling": ("mean", {}, WEIGHTS),
    "vision_layers": ([1], {}, WEIGHTS),
    "visual_head": ("gated", {}, WEIGHTS),
    "adapter_num_layers": (1, {}, WEIGHTS),
    "logit_scale_init_value": (1.0, {}, WEIGHTS),
    "crop_scale": ([0.2, 0.4], {}, WEIGHTS),
    "image_backend": ("fast", {"sources": "jpegs"}, WEIGHTS),
    "feature_dtype": ("bfloat16", FROZEN, WEIGHTS),
    "feature_views": (2, FROZEN, WEIGHTS),
    "feature_cache": ("elsewhere", FROZEN, FILES),
    "lora_rank": (2, {"embedding_cache": None, "online_text_model": True}, WEIGHTS),
    "lora_alpha": (128, {"embedding_cache": None, "lora_rank": 2}, WEIGHTS),
    "lora_dropout": (0.5, {"embedding_cache": None, "lora_rank": 2}, WEIGHTS),
    "lora_target_modules": (["q_proj"], {"embedding_cache": None, "lora_rank": 2}, WEIGHTS),
    "save_format": ("adapter", {"embedding_cache": None, "lora_rank": 2}, FILES),
}
STAGE1: dict[str, Any] = {
    "scale": (5.0, {}, WEIGHTS),
    "tower_chunk_size": (3, {}, None),
}
LORA: dict[str, Any] = {
    "lora_rank": (2, {}, WEIGHTS),
    "lora_alpha": (128, {"lora_rank": 2}, WEIGHTS),
    "lora_dropout": (0.5, {"lora_rank": 2}, WEIGHTS),
    "lora_target_modules": (["q_proj"], {"lora_rank": 2}, WEIGHTS),
    "save_format": ("adapter", {"lora_rank": 2}, FILES),
}
LORA: dict[str, Any] = {
    "lora_rank": (2, {}, WEIGHTS),
    "lora_alpha": (128, {}, WEIGHTS),
    "lora_dropout": (0.5, {}, WEIGHTS),
    "lora_target_modules": (["q_proj"], {}, WEIGHTS),
    "save_format": ("adapter", {}, FILES),
}
DISTILL: dict[str, Any] = {
    "matryoshka_dims": ([8], {}, WEIGHTS),
    "freeze_embeddings": (True, {}, WEIGHTS),
}
MNTP: dict[str, Any] = {
    "block_size": (4, {}, WEIGHTS),
    "mlm_probability": (0.7, {}, WEIGHTS),
    "mask_token": (".", {}, WEIGHTS),
}
# Those that give the same result on purpose have tests of their own.
ALL_CASES = [
    *((stage2, name, *case) for name, case in STAGE2.items()),
    *((stage1, name, *case) for name, case in {**STAGE1, **LORA}.items()),
    *((mntp, name, *case) for name, case in MNTP.items()),
    *((distill, name, *case) for name, case in DISTILL.items()),
]
CASES = [case for case in ALL_CASES if case[-1] is not None]


def own_fields(config: type, *bases: type) -> set[str]:
    """The settings that a config declares itself, without those of `bases` that it only gives another default."""
    known = {field.name for base in bases for field in dataclasses.fields(base)}  # type: ignore[arg-type]
    return {field.name for field in dataclasses.fields(config)} - known  # type: ignore[arg-type]


def test_every_setting_is_in_the_table() -> None:
    contrastive = {field.name for field in dataclasses.fields(ContrastiveConfig)}
    assert own_fields(Stage2Config, StageConfig) == set(STAGE2)
    assert own_fields(Stage1Config, TextTowerConfig) == set(STAGE1)
    assert own_fields(TextTowerConfig, StageConfig) == set(LORA)
    assert own_fields(MNTPConfig, TextTowerConfig) == set(MNTP)
    assert own_fields(DistillConfig, StageConfig) == set(DISTILL)
    assert contrastive <= set(STAGE1) & set(STAGE2)


@pytest.mark.parametrize(("make", "name", "value", "needs", "expected"), CASES, ids=[case[1] for case in CASES])
def test_a_setting_changes_something_or_is_refused(
    make: Any, name: str, value: Any, needs: dict[str, Any], expected: str, inputs: Inputs, tmp_path: Path
) -> None:
    if expected not in (WEIGHTS, FILES):
        with pytest.raises(ValueError, match=expected):
            outcome(make, inputs, tmp_path, **needs, **{name: value})
        return
    before, old = outcome(make, inputs, tmp_path / "without", **needs)
    after, new = outcome(make, inputs, tmp_path / "with", **needs, **{name: value})
    if expected == WEIGHTS:
        assert any(after[key].shape != before[key].shape or not after[key].equal(before[key]) for key in before)
    else:
        assert old != new


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a recipe, each once."""
    folders: dict[str, Path] = {}

    def usual(fields: dict[str, Any]) -> Path:
        key = json.dumps(fields, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("usual") / "run"
            run("stage2", folders[key], inputs, **fields)
        return folders[key]

    return usual


@pytest.mark.parametrize("name", RECIPE)
def test_a_setting_of_the_command_changes_something(
    name: str, usual: Callable[..., Path], inputs: Inputs, tmp_path: Path
) -> None:
    value, needs, expected = RECIPE[name]
    shared = {"max_steps": 2, "save_strategy": "no", "eval_sources": {}, **needs}
    if needs.get("sources") == "jpegs":
        shared["sources"] = [{"path": jpegs(tmp_path / "jpegs"), "caption_columns": ["caption"]}]
    if value == "elsewhere":
        value = str(tmp_path / value)
    if name == "lora_rank":
        run("stage2", tmp_path / "with", inputs, **{**shared, "online_text_model": False, name: value})
    else:
        run("stage2", tmp_path / "with", inputs, **{**shared, name: value})
    folders = (usual(shared), tmp_path / "with")
    if expected == FILES:
        old, new = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in folders)
        assert old != new
        return
    before, after = (weights(folder) for folder in folders)
    same = before.keys() == after.keys() and all(
        after[key].shape == before[key].shape and after[key].equal(before[key]) for key in before
    )
    assert not same


def jpegs(folder: Path) -> str:
    """Pictures that are read otherwise by the fast decoder."""
    folder.mkdir()
    rows = []
    for number, row in enumerate(small_runs.rows_of_concepts(":32", "train")):
        row["image"].convert("RGB").save(folder / f"{number}.jpg", quality=30)
        rows.append({"file_name": f"{number}.jpg", "caption": row["caption"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize("kind", ["all", "layers", "rows"])
def test_a_frozen_tower_stays_and_frozen_layers_stay(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"freeze_vision_layers": 1} if kind == "layers" else {"freeze_vision": "all"}
    rows = image_rows(tiny.HIDDEN) if kind == "rows" else None
    trainer = stage2(inputs, tmp_path, rows, **changes)
    tower = {name: value.clone() for name, value in trainer.model.vision_model.state_dict().items()}
    head = trainer.model.visual_projection.weight.clone()
    trainer.train()
    now = trainer.model.vision_model.state_dict()
    changed = {name for name in tower if not now[name].equal(tower[name])}
    assert not [name for name in changed if name.startswith(("blocks.0.", "patch_embed", "cls_token", "pos_embed"))]
    assert bool(changed) == (kind == "layers")
    assert not trainer.model.visual_projection.weight.equal(head)


@pytest.mark.parametrize("make", [stage1, stage2])
def test_chunks_are_of_the_size_that_is_set(
    make: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = stage1_trainer if make is stage1 else stage2_trainer
    sizes, in_chunks = set(), module.in_chunks
    monkeypatch.setattr(module, "in_chunks", lambda *args: (sizes.add(args[-1]), in_chunks(*args))[1])
    make(inputs, tmp_path, tower_chunk_size=3).train()
    assert sizes == {3}


def test_settings_that_an_own_collator_does_not_follow_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    language_model: Any = AutoModelForCausalLM.from_pretrained(inputs.llm)
    tower, head = tiny.wrapped(language_model.base_model), language_model.get_output_embeddings()
    with pytest.raises(ValueError, match=r"mlm_probability is 0\.5, but the given data_collator does not follow"):
        MNTPTrainer(tower, MNTPConfig(**settings(tmp_path, mlm_probability=0.5)), list, head=head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze_vision": "all", "patch_dropout": 0.5},
            "patch_dropout is 0.5, but freeze_vision: all trains no layer",
        ),
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "has no lr_scheduler_kwargs"),
        ({"bf16_full_eval": True}, "bf16_full_eval is True, but evaluation"),
        ({"eval_do_concat_batches": False}, "recalls are over all rows"),
        ({"remove_unused_columns": True}, "remove_unused_columns is True, but"),
        ({"label_names": ["labels"]}, "label_names is .*, but the losses"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        (
            {"freeze_vision": "all", "vision_layer_decay": 0.5},
            "vision_layer_decay is 0.5, but freeze_vision: all trains no layer",
        ),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0, but the model has no LoRA layers"),
        ({"eval_steps": 2}, "eval_steps is 2, but it is for eval_strategy: steps"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 2},
            "warmup_steps is 2, but this lr_scheduler_type has no",
        ),
        ({"fsdp_config": {"version": 2}}, "fsdp is unset"),
        ({"use_liger_kernel": True}, "it has no kernels for these models"),
        ({"do_predict": True}, "there is nothing to predict"),
        ({"deepspeed": "zero2.json"}, "models are sharded by FSDP2 here"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers is 0"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(
    changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        stage2(inputs, tmp_path, **changes)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        # What transformers 5.6 writes into the settings, which a part of a recipe copies.
        (Stage2Config, {"fsdp_config": {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False}}),
        (Stage1Config, {"lora_rank": 0, "lora_dropout": 0.05, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}),
        (DistillConfig, {"lr_scheduler_type": "constant"}),  # whose default is a warm-up
    ],
)
def test_settings_that_nobody_means_to_count_are_taken(config: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    made = config(output_dir=str(tmp_path), use_cpu=True, **fields)
    assert dataclasses.replace(made, seed=1).seed == 1


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(stage2, "label_smoothing_factor", 0.1)],
)
def test_settings_of_a_loss_are_refused_with_a_loss_of_ones_own(
    make: Any, name: str, value: Any, inputs: Inputs, tmp_path: Path
) -> None:
    trainer = make(inputs, tmp_path, **{name: value})
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: 0
    with pytest.raises(ValueError, match=f"{name} is {value}, but compute_loss_func computes the loss"):
        trainer._validate_settings()


def test_rows_have_to_say_which_of_them_share_a_caption(inputs: Inputs, tmp_path: Path) -> None:
    trainer = stage2(inputs, tmp_path, image_rows(tiny.HIDDEN), shared_captions="positive")
    with pytest.raises(ValueError, match="shared_captions is positive, but the rows have no caption_id"):
        trainer.train()


def test_rows_are_measured_by_their_loss_alone(inputs: Inputs, tmp_path: Path) -> None:
    trainer = mntp(inputs, tmp_path)
    with pytest.raises(ValueError, match="compute_metrics is given, but eval_dataset has its loss alone"):
        MNTPTrainer(trainer.model, trainer.args, head=trainer.head, compute_metrics=lambda prediction: {})


def test_stage1_has_no_label_smoothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, but the losses of this stage have none"):
        Stage1Config(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
