"""What is counted without data is what real tensors take: weights and states of a trainer, kept activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from llm2clip import Stage1Trainer, Stage2Trainer
from llm2clip.convert.published import published_models
from llm2clip.planning.counts import count_flops, make_work
from llm2clip.planning.models import build_trained_joint_model
from llm2clip.planning.plan import PlanConfig, make_plan
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

ROWS, TOKENS, WIDTH = 8, 16, 64
TOWER = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


def make_recipe(stage: str, folder: Path, layers: int = 3, **changes: Any) -> Any:
    """Write the configs of small models; return the settings of a stage."""
    sizes = TOWER | {"num_hidden_layers": layers}
    decoder = LlamaConfig(**sizes, vocab_size=128, num_key_value_heads=2)
    LLM2CLIPTextConfig(decoder_config=decoder, max_text_length=TOKENS).save_pretrained(folder / "text")
    EVA02VisionConfig(**sizes, image_size=32, patch_size=8).save_pretrained(folder / "vision")
    shared = {"output_dir": str(folder / "run"), "max_steps": 1, "save_strategy": "no", "report_to": "none"}
    shared |= {"per_device_train_batch_size": ROWS, "disable_tqdm": True, "warmup_steps": 0, **changes}
    if stage == "stage1":
        return Stage1Recipe(**shared, model_name_or_path=str(folder / "text"))
    towers = {"vision_model_name_or_path": str(folder / "vision"), "text_model_name_or_path": str(folder / "text")}
    return Stage2Recipe(**shared, **towers, projection_dim=32)


def activations(recipe: Any) -> float:
    return make_plan(PlanConfig(gpus=1), recipe)["memory"]["one GPU"]["activations"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_weights_gradients_and_states_are_those_of_a_trainer(stage: str, tmp_path: Path) -> None:
    recipe = make_recipe(stage, tmp_path)
    planned = make_plan(PlanConfig(gpus=1), recipe)["memory"]["one GPU"]
    trainer = make_trainer(stage, recipe, tmp_path)
    trainer.train()
    parameters = [*trainer.model.parameters()]
    assert planned["weights"] == sum(x.nbytes for x in (*parameters, *trainer.model.buffers()))
    assert planned["gradients"] == sum(x.nbytes for x in parameters if x.requires_grad)
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]
    scalars = [x for state in trainer.optimizer.state.values() for x in state.values() if not x.ndim]
    # AdamW counts the steps of each parameter beside its moments, and the scale is a scalar.
    assert planned["optimizer"] == pytest.approx(sum(x.nbytes for x in moments), abs=4 * len(scalars))


def make_trainer(stage: str, recipe: Any, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows, mask = list(range(ROWS)), torch.ones(ROWS, TOKENS, dtype=torch.long)
    if stage == "stage1":
        model: Any = LLM2CLIPTextModel(LLM2CLIPTextConfig.from_pretrained(folder / "text"))
        ids = torch.randint(128, (2, ROWS, TOKENS), generator=generator)
        sides = dict(zip(("anchor", "positive"), ids, strict=True))
        batch = {key: {"input_ids": x, "attention_mask": mask, "pooling_mask": mask} for key, x in sides.items()}
        return Stage1Trainer(model=model, args=recipe, train_dataset=rows, data_collator=lambda rows: batch)
    model = build_trained_joint_model(recipe).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    pixels, captions = torch.randn(ROWS, 3, 32, 32), torch.randn(ROWS, WIDTH)
    batch = {"pixel_values": pixels, "llm_embeds": captions}
    return Stage2Trainer(model=model, args=recipe, train_dataset=rows, data_collator=lambda rows: batch)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_the_tensors_that_a_real_forward_pass_keeps(bf16: bool, tmp_path: Path) -> None:
    recipe = make_recipe("stage2", tmp_path, bf16=bf16)
    work = make_work(recipe, None)
    model = work.model.to_empty(device="cpu").train()
    weights = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, bf16),
    ):
        outputs = work.forward(ROWS, TOKENS)
    loss = 4 * (2 * 2 * ROWS * 32 + 4 * ROWS * ROWS)
    assert outputs[0].requires_grad
    assert activations(recipe) == pytest.approx(sum(kept.values()) + loss, rel=0.02)


def test_a_recomputed_layer_keeps_its_input_alone(tmp_path: Path) -> None:
    """Each layer more keeps a state of every token of anchors and positives; backward holds one layer at a time."""
    changes = {"activation_checkpointing": True, "lora_rank": 0}
    two, three = (activations(make_recipe("stage1", tmp_path, layers, **changes)) for layers in (2, 3))
    assert three - two == 2 * ROWS * TOKENS * WIDTH * 4


def test_chunks_keep_the_tensors_of_one_and_the_embeddings_of_all(tmp_path: Path) -> None:
    half, small = (
        activations(make_recipe("stage2", tmp_path, **changes))
        for changes in (
            {"per_device_train_batch_size": 2 * ROWS, "tower_chunk_size": ROWS},
            {"per_device_train_batch_size": ROWS},
        )
    )
    loss = [4 * (2 * 2 * rows * 32 + 4 * rows * rows) for rows in (2 * ROWS, ROWS)]
    # Both embeddings of the other half, and their gradients.
    assert half - loss[0] == small - loss[1] + 2 * 2 * ROWS * 32 * 4


def test_fsdp_divides_weights_gradients_and_states(tmp_path: Path) -> None:
    recipe = make_recipe("stage2", tmp_path)
    ddp, fsdp = make_plan(PlanConfig(gpus=64), recipe)["memory"].values()
    # DDP has buckets beside the gradients.
    assert fsdp["gradients"] == ddp["gradients"] / 2 / 64
    assert fsdp["optimizer"] == ddp["optimizer"] / 64
    layer = EVA02VisionModel(EVA02VisionConfig.from_pretrained(tmp_path / "vision")).blocks[0]
    gathered = fsdp["weights"] - ddp["weights"] / 64
    # Two of the three layers of the tower, and what is in none.
    assert ddp["weights"] - gathered == pytest.approx(sum(x.nbytes for x in layer.parameters()), rel=0.01)


def test_counted_operations_match_the_formulas() -> None:
    """EVA02-B/16: 12 layers of 4 d d + 3 d 2048 weights for 197 tokens, products of attention, patch embedding."""
    tokens, width = 197, 768
    weights = 12 * (4 * width * width + 3 * width * 2048)
    attention = 12 * 2 * tokens * tokens * width
    patches = 196 * width * 3 * 16 * 16
    config = published_models()["LLM2CLIP-EVA02-B-16"].config.vision_config
    with torch.device("meta"), torch.no_grad():
        model, pixels = EVA02VisionModel(config), torch.empty(1, 3, config.image_size, config.image_size)
        counted = count_flops(lambda: model(pixels))
    assert counted == pytest.approx(2 * (tokens * weights + attention + patches), rel=0.01)
