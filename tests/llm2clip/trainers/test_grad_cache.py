"""GradCache: gradients equal those of the whole batch, with random layers, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm2clip.losses import clip_loss
from llm2clip.trainers.grad_cache import in_chunks
from modeling_llm2clip import EVA02VisionModel
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import losses, run, weights
from tests.processes import run_ranks


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor]:
    return (nn.functional.normalize(model(**inputs).pooler_output, dim=-1),)


def random_tower() -> EVA02VisionModel:
    """A tower with patch dropout, stochastic depth and attention dropout."""
    torch.manual_seed(0)
    fields = {"patch_dropout": 0.5, "drop_path_rate": 0.3, "attention_dropout": 0.2, "initializer_range": 0.1}
    return EVA02VisionModel(tiny.vision_config(**fields)).train()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_and_random_numbers_equal_those_of_chunks_that_store_activations(autocast: bool) -> None:
    pixels = torch.randn(10, 3, 28, 28)
    texts = nn.functional.normalize(torch.randn(10, random_tower().config.hidden_size), dim=-1)

    def step(kept: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        model = random_tower()
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if kept:
                images = torch.cat([embed(model, {"pixel_values": chunk})[0] for chunk in pixels.split([2, 4, 4])])
            else:
                (images,) = in_chunks(embed, model, {"pixel_values": pixels}, 4)
            loss = clip_loss(images, texts, 10.0)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return images.detach(), gradients, torch.rand(3)

    expected, actual = step(kept=True), step(kept=False)
    assert actual[0].equal(expected[0])
    assert len(actual[1]) == len(expected[1]) > 10
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        # In one graph, the gradients of the chunks are added up in bfloat16.
        atol = float(theirs.abs().max()) * (2e-2 if autocast else 1e-5)
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    assert actual[2].equal(expected[2]), "the next step draws the same numbers"


def test_one_chunk_at_a_time_has_a_graph_and_the_last_one_runs_once() -> None:
    model = random_tower()
    calls: list[tuple[bool, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((torch.is_grad_enabled(), len(kwargs["pixel_values"]))),
        with_kwargs=True,
    )
    (images,) = in_chunks(embed, model, {"pixel_values": torch.randn(10, 3, 28, 28)}, 4)
    assert calls == [(False, 2), (False, 4), (True, 4)]
    images.square().sum().backward()
    assert calls[3:] == [(True, 2), (True, 4)]


SHORT: dict[str, Any] = {"max_steps": 3, "save_strategy": "no", "max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
LAYERS = {"freeze_vision_layers": 1}
ONLINE = {"embedding_cache": None, "online_text_model": True, "text_model_dtype": "float32"}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        # Adam divides a gradient by its size, which makes the rounding of small ones visible in the losses.
        ("stage1", {"optim": "sgd"}),
        ("stage2", {}),
        ("stage2", {"bf16": True}),
        ("stage2", LAYERS),
        ("stage2", ONLINE),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_stage_in_chunks_equals_the_stage_on_whole_batches(
    stage: str, changes: dict[str, Any], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = {**SHORT, "eval_sources": {}, **changes}
    run(stage, tmp_path / "whole", inputs, **shared)
    run(stage, tmp_path / "chunked", inputs, **shared, tower_chunk_size=3)
    # Where the processor multiplies bfloat16 itself, it rounds by the shape of the product.
    allowed = 1e-2 if changes.get("bf16") else 1e-5
    assert losses(tmp_path / "chunked") == pytest.approx(losses(tmp_path / "whole"), abs=allowed)
    chunked = weights(tmp_path / "chunked")
    for name, value in weights(tmp_path / "whole").items():
        # On average, for Adam divides a gradient by its size, which makes the rounding of small ones visible.
        assert (chunked[name] - value).abs().mean() < (1e-4 if changes.get("bf16") else 1e-5), name


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from llm2clip.losses import clip_loss
from llm2clip.trainers.grad_cache import in_chunks
from llm2clip.command_line.processes import leave_process_group
from tests.llm2clip.trainers.test_grad_cache import embed, whole_batch

dist.init_process_group("gloo")
rank = dist.get_rank()
model, pixels, texts = whole_batch()
kind, cut = sys.argv[2], int(sys.argv[3])
own = slice(cut) if rank == 0 else slice(cut, None)
if kind == "shards":
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
else:
    model = torch.compile(DistributedDataParallel(model), backend="eager")
(images,) = in_chunks(embed, model, {"pixel_values": pixels[own]}, 4)
loss = clip_loss(images, texts[own], 10.0)
loss.backward()
named = [(name.replace("_orig_mod.module.", ""), x.grad) for name, x in model.named_parameters()]
gradients = {name: x.full_tensor() if kind == "shards" else x for name, x in named if x is not None}
if rank == 0:
    torch.save(gradients, sys.argv[1])
leave_process_group()
"""


def whole_batch() -> tuple[EVA02VisionModel, Tensor, Tensor]:
    """A tower without random layers, 20 images, and as many embeddings of captions."""
    torch.manual_seed(0)
    model = EVA02VisionModel(tiny.vision_config(initializer_range=0.1)).train()
    return (
        model,
        torch.randn(20, 3, 28, 28),
        nn.functional.normalize(torch.randn(20, model.config.hidden_size), dim=-1),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cut"), [("shards", 13), ("shards", 19), ("compiled", 10)])
def test_chunks_of_a_wrapped_model_have_the_gradients_of_one_process(kind: str, cut: int, tmp_path: Path) -> None:
    """Also where skipped rows leave processes with other numbers of chunks, or with fewer rows than chunks."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    run_ranks([str(tmp_path / "sharded.py"), str(tmp_path / "gradients.pt"), kind, str(cut)], 2)
    model, pixels, texts = whole_batch()
    clip_loss(embed(model, {"pixel_values": pixels})[0], texts, 10.0).backward()
    found = torch.load(tmp_path / "gradients.pt")
    expected = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-5, msg=name)
