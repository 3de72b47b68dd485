"""Losses on 2 and 4 gloo processes, compared to the original's numbers and to one process with all rows.

Starting processes is slow, so each world runs every scenario once and the tests check the results of the ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses import clip_loss, hard_negative_info_nce, sigmoid_loss
from llm2clip.losses.distillation import cosine_distance
from tests.golden import load_golden
from tests.processes import run_ranks

Results = list[dict[str, Any]]

# Rank 1 of the larger world has no rows, as when all its images are damaged.
ROWS = {1: [8], 2: [5, 3], 4: [3, 0, 4, 1]}
NEGATIVES = {1: [5], 2: [5, 0], 4: [2, 0, 0, 3]}
WIDTH = 6


def split(x: Tensor, rows: list[int], rank: int) -> Tensor:
    return x.split(rows)[rank]


def example() -> dict[str, Tensor]:
    """Make the global batch of the scenarios without golden numbers; identical in every process."""
    generator = torch.Generator().manual_seed(7)
    rows, captions, per_image = sum(ROWS[1]), 6, 4
    owned = torch.stack([torch.randperm(captions, generator=generator)[:per_image] for _ in range(rows)])
    # The first five images have only two captions, so that K can differ between ranks.
    owned[:5, 2:] = -1
    return {
        "image": torch.randn(rows, WIDTH, generator=generator),
        "text": torch.randn(rows, WIDTH, generator=generator),
        "negative": torch.randn(sum(NEGATIVES[1]), WIDTH, generator=generator),
        "sampled": owned[:, 0].clone(),
        "owned": owned,
    }


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def with_gradients(loss_of: Callable[..., Tensor], **inputs: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    loss = loss_of(**leaves)
    loss.backward()
    grads = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {"loss": loss.detach(), **grads}


def golden_clip(name: str, smoothing: float, rank: int, world: int) -> dict[str, Tensor]:
    golden = load_golden(name)
    image, text = golden["in/image_features"], golden["in/text_features"]
    return with_gradients(
        lambda image, text, log_scale: clip_loss(image, text, log_scale.exp(), label_smoothing=smoothing),
        image=image.chunk(world)[rank],
        text=text.chunk(world)[rank],
        log_scale=golden["in/log_scale"],
    )


def golden_hard_negative(name: str, negatives: bool, rank: int, world: int) -> dict[str, Tensor]:
    golden = load_golden(name)
    inputs = {key: golden[f"in/{key}"].tensor_split(world)[rank] for key in ("q", "d", "n") if key != "n" or negatives}
    return with_gradients(lambda q, d, n=None: hard_negative_info_nce(q, d, n, scale=50.0), **inputs)


def shared_captions(rank: int, world: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    whole, rows = example(), ROWS[world]
    owned = split(whole["owned"], rows, rank)
    # Each rank pads to the largest number of captions of its own images: 2 or 4.
    owned = owned if (owned[:, 2:] >= 0).any() else owned[:, :2]
    sampled = split(whole["sampled"], rows, rank)
    return with_gradients(
        lambda image, text, scale: clip_loss(image.to(dtype), text.to(dtype), scale, sampled, owned, 0.1, tile_size=2),
        image=split(unit(whole["image"]), rows, rank),
        text=split(unit(whole["text"]), rows, rank),
        scale=torch.tensor(12.0),
    )


def sigmoid(rank: int, world: int) -> dict[str, Tensor]:
    whole, rows = example(), ROWS[world]
    sampled, owned = split(whole["sampled"], rows, rank), split(whole["owned"], rows, rank)
    return with_gradients(
        lambda image, text, scale, bias: sigmoid_loss(image, text, scale, bias, sampled, owned, tile_size=2),
        image=split(unit(whole["image"]), rows, rank),
        text=split(unit(whole["text"]), rows, rank),
        scale=torch.tensor(12.0),
        bias=torch.tensor(-3.0),
    )


def uneven_hard_negative(rank: int, world: int) -> dict[str, Tensor]:
    whole = example()
    negatives = split(whole["negative"], NEGATIVES[world], rank)
    inputs = {
        "queries": split(whole["image"], ROWS[world], rank),
        "positives": split(whole["text"], ROWS[world], rank),
    }
    if len(negatives):
        inputs["negatives"] = negatives
    return with_gradients(lambda **kwargs: hard_negative_info_nce(**kwargs, scale=5.0), **inputs)


def distillation(rank: int, world: int) -> dict[str, Tensor]:
    """The rows of a student and of its teacher, whose numbers differ between ranks."""
    teacher = split(unit(example()["text"]), ROWS[world], rank)
    student = split(example()["image"], ROWS[world], rank)
    return with_gradients(lambda image: cosine_distance(unit(image), teacher), image=student)


def messages_of_errors(rank: int) -> list[str]:
    """Caption ids on the first rank only, and a batch without rows on every rank."""
    x, ids, nothing = unit(torch.randn(2, WIDTH)), torch.arange(2), torch.empty(0, WIDTH)
    given = (ids, ids[:, None]) if rank == 0 else (None, None)
    messages = []
    for loss in (
        lambda: clip_loss(x, x, 1.0, *given),
        lambda: clip_loss(nothing, nothing, 1.0),
        lambda: hard_negative_info_nce(nothing, nothing),
    ):
        with pytest.raises(ValueError, match="rank") as error:
            loss()
        messages.append(str(error.value))
    return messages


def run_all(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "shared_captions": shared_captions(rank, world),
        "shared_captions_bf16": shared_captions(rank, world, torch.bfloat16),
        "uneven_hard_negative": uneven_hard_negative(rank, world),
        "sigmoid": sigmoid(rank, world),
        "distillation": distillation(rank, world),
    }
    for name in ("a", "b"):
        for smoothing in (0.0, 0.1):
            results[f"clip_{name}_{smoothing}"] = golden_clip(f"clip_loss_{name}", smoothing, rank, world)
        for negatives in (True, False):
            tag = f"hard_negative_{name}_{negatives}"
            results[tag] = golden_hard_negative(f"hard_negative_nll_{name}", negatives, rank, world)
    if world > 1:
        results["errors"] = messages_of_errors(rank)
    return results


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # A file instead of a port, which another process could take first.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(run_all(rank, world), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    run_ranks(["-m", "tests.llm2clip.losses.test_losses_distributed", str(folder)], request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_all(0, 1)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_of_each_rank_and_its_mean_equal_the_original(ranks: Results, name: str, smoothing: float) -> None:
    golden, world = load_golden(f"clip_loss_{name}"), len(ranks)
    found = [results[f"clip_{name}_{smoothing}"] for results in ranks]
    mean = torch.stack([ours["loss"] for ours in found]).mean()
    for rank, ours in enumerate(found):
        for kind, loss in (("local1", ours["loss"]), ("local0", mean)):
            tag = f"out/ws{world}/{kind}_grad1_smooth{smoothing}/rank{rank}"
            golden.close(loss, f"{tag}/loss")
            golden.close(ours["image"], f"{tag}/grad_image")
            golden.close(ours["text"], f"{tag}/grad_text")
    # The share of each rank in the gradient of the scale differs from the original; DDP averages over ranks.
    tags = [f"out/ws{world}/local1_grad1_smooth{smoothing}/rank{rank}/grad_log_scale" for rank in range(world)]
    expected = torch.stack([golden[tag] for tag in tags]).mean()
    scale = torch.stack([ours["log_scale"] for ours in found]).mean()
    torch.testing.assert_close(scale, expected, atol=1e-5, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("negatives", [True, False])
def test_hard_negative_loss_equals_the_original(ranks: Results, name: str, negatives: bool) -> None:
    golden, world = load_golden(f"hard_negative_nll_{name}"), len(ranks)
    scenario, tag = f"hard_negative_{name}_{negatives}", "neg" if negatives else "noneg"
    losses = torch.stack([results[scenario]["loss"] for results in ranks])
    golden.close(losses.mean(), f"out/ws1/scale50/{tag}/loss")
    for key in ("q", "d", "n") if negatives else ("q", "d"):
        whole = torch.cat([results[scenario][key] for results in ranks])
        golden.close(whole / world, f"out/ws1/scale50/{tag}/grad_{key}")
        if world == 2:
            for rank, results in enumerate(ranks):
                golden.close(losses.mean(), f"out/ws2/{tag}/rank{rank}/loss")
                golden.close(results[scenario][key], f"out/ws2/{tag}/rank{rank}/grad_{key}")


# Uneven ranks, and different numbers of captions; hard negatives are on some ranks only.
@pytest.mark.parametrize(
    ("scenario", "tolerance"),
    [
        ("shared_captions", {"atol": 2e-6, "rtol": 1e-5}),
        ("shared_captions_bf16", {"atol": 3e-3, "rtol": 3e-2}),
        ("uneven_hard_negative", {"atol": 2e-6, "rtol": 1e-5}),
        ("sigmoid", {"atol": 2e-6, "rtol": 1e-5}),
        ("distillation", {"atol": 1e-5, "rtol": 1e-5}),
    ],
)
def test_uneven_ranks_equal_one_process(
    scenario: str, tolerance: dict[str, float], ranks: Results, single: dict[str, Any]
) -> None:
    """The mean of scalars over ranks, and gradients of rows divided by the world size, are those of one process."""
    assert "loss" in single[scenario]
    for name, expected in single[scenario].items():
        parts = [rank[scenario].get(name) for rank in ranks]
        present = [part for part in parts if part is not None]
        actual = torch.stack(present).mean(0) if expected.ndim == 0 else torch.cat(present) / len(ranks)
        torch.testing.assert_close(actual, expected, msg=f"{scenario} {name}", **tolerance)


def test_ids_on_some_ranks_and_no_rows_on_any_raise_on_every_rank(ranks: Results) -> None:
    assert len(ranks) > 1
    for rank, results in enumerate(ranks):
        ids, *empty = results["errors"]
        assert ids.startswith("Other ranks gave caption ids" if rank else "This rank gave caption ids")
        assert "give them on all ranks" in ids
        assert ["at least one pair on some rank" in empty[0], "at least one query on some rank" in empty[1]] == [
            True
        ] * 2


if __name__ == "__main__":
    worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1])
