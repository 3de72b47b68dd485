"""Losses in one process, compared to the original's numbers and to dense references."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip.losses import clip_loss, hard_negative_info_nce, info_nce, sigmoid_loss, tiles
from tests.golden import load_golden


def unit(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=dtype), dim=1)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def compare(
    actual: Tensor, inputs: list[Tensor], expected: Tensor, expected_inputs: list[Tensor], atol: float = 1e-5
) -> None:
    """Compare losses and gradients, with an upstream factor, which backward has to apply to the stored gradients."""
    (3 * actual).backward()
    (3 * expected).backward()
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = max(1.0, float(theirs.grad.abs().max()))
        torch.testing.assert_close(ours.grad.to(theirs.dtype), theirs.grad, atol=atol * scale, rtol=1e-4)


def dense_info_nce(q: Tensor, k: Tensor, s: Tensor | float, mask: Tensor, smoothing: float = 0.0) -> Tensor:
    target = (1 - smoothing) * mask / mask.sum(1, keepdim=True) + smoothing / mask.shape[1]
    return -(target * (s * q @ k.T).log_softmax(1)).sum(1).mean()


def shared_captions(images: int, captions: int, per_image: int) -> tuple[Tensor, Tensor]:
    """Make ids of a batch in which images share captions: (n,) sampled and (n, K) all, padded with -1."""
    owned = torch.stack([torch.randperm(captions)[:per_image] for _ in range(images)])
    sampled = owned[torch.arange(images), torch.randint(per_image, (images,))]
    padding = (torch.rand(images, per_image) < 0.3) & (owned != sampled[:, None])
    return sampled, owned.masked_fill(padding, -1)


def ownership(sampled: Tensor, owned: Tensor) -> Tensor:
    """Whether image i has the caption that was sampled for row j, (i, j), computed with sets."""
    return torch.tensor([[int(caption) in set(row.tolist()) for caption in sampled] for row in owned])


@pytest.mark.parametrize("name", ["clip_loss_a", "clip_loss_b"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_equals_the_original(name: str, smoothing: float) -> None:
    golden = load_golden(name)
    image, text, log_scale = leaves(golden["in/image_features"], golden["in/text_features"], golden["in/log_scale"])
    loss = clip_loss(image, text, log_scale.exp(), label_smoothing=smoothing)
    loss.backward()
    tag = f"out/ws1/smooth{smoothing}/rank0"
    golden.close(loss, f"{tag}/loss")
    golden.close(image.grad, f"{tag}/grad_image")
    golden.close(text.grad, f"{tag}/grad_text")
    golden.close(log_scale.grad, f"{tag}/grad_log_scale")


@pytest.mark.parametrize("name", ["hard_negative_nll_a", "hard_negative_nll_b"])
@pytest.mark.parametrize("scale", [50, 20])
@pytest.mark.parametrize("with_negatives", [True, False])
def test_hard_negative_loss_equals_the_original(name: str, scale: int, with_negatives: bool) -> None:
    golden = load_golden(name)
    query, positive, negative = leaves(golden["in/q"], golden["in/d"], golden["in/n"])
    loss = hard_negative_info_nce(query, positive, negative if with_negatives else None, scale=scale)
    loss.backward()
    tag = f"out/ws1/scale{scale}/{'neg' if with_negatives else 'noneg'}"
    golden.close(loss, f"{tag}/loss")
    golden.close(query.grad, f"{tag}/grad_q")
    golden.close(positive.grad, f"{tag}/grad_d")
    if with_negatives:
        golden.close(negative.grad, f"{tag}/grad_n")


@pytest.mark.parametrize("tile_size", [3, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_positives_equal_a_dense_reference_for_any_tile_size(tile_size: int, smoothing: float) -> None:
    inputs = unit(10, 6), unit(13, 6), torch.tensor(14.0)
    mask = torch.rand(10, 13) < 0.3
    mask[torch.arange(10), torch.randint(13, (10,))] = True
    expected_inputs, actual_inputs = leaves(*inputs), leaves(*inputs)
    expected = dense_info_nce(*expected_inputs, mask, smoothing)
    actual = info_nce(*actual_inputs, lambda start, stop: mask[start:stop], smoothing, tile_size)
    compare(actual, actual_inputs, expected, expected_inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2)])
def test_gradients_do_not_depend_on_which_inputs_require_grad(wanted: tuple[int, ...]) -> None:
    inputs = unit(5, 4), unit(5, 4), torch.tensor(9.0)
    everything = leaves(*inputs)
    info_nce(*everything, torch.arange(5), tile_size=2).backward()
    some = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
    info_nce(*some, torch.arange(5), tile_size=2).backward()
    for i, (one, reference) in enumerate(zip(some, everything, strict=True)):
        assert (one.grad is not None) == (i in wanted)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, reference.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    image, text = unit(12, 16).to(dtype), unit(12, 16).to(dtype)
    half_image, half_text = leaves(image, text)
    float_image, float_text = leaves(image.float(), text.float())
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(half_image, half_text, scale)
    expected = clip_loss(float_image, float_text, scale)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for half, full in ((half_image, float_image), (half_text, float_text)):
        assert half.grad is not None
        assert full.grad is not None
        assert half.grad.dtype == dtype
        # Both roles of an embedding (query, key) round once, and so does their sum.
        torch.testing.assert_close(
            half.grad.float(), full.grad, rtol=3 * torch.finfo(dtype).eps, atol=float(full.grad.abs().max()) * 1e-2
        )


def test_loss_near_zero_is_accurate() -> None:
    basis = torch.eye(8)
    loss = clip_loss(basis, basis, torch.tensor(12.0))
    expected = torch.log1p(7 * torch.exp(torch.tensor(-12.0, dtype=torch.float64)))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)


def test_shared_captions_are_positives_in_both_directions() -> None:
    sampled, owned = shared_captions(images=14, captions=9, per_image=4)
    mask = ownership(sampled, owned)
    assert mask.sum() > 14, "the example must have matches outside the diagonal"
    inputs = unit(14, 6), unit(14, 6), torch.tensor(10.0)
    actual_inputs, expected_inputs = leaves(*inputs), leaves(*inputs)
    actual = clip_loss(*actual_inputs, sampled, owned, tile_size=4)
    image, text, scale = expected_inputs
    expected = (dense_info_nce(image, text, scale, mask) + dense_info_nce(text, image, scale, mask.T)) / 2
    compare(actual, actual_inputs, expected, expected_inputs)


@pytest.mark.parametrize("kept_logits", [0, 60, 2**20])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_both_directions_equal_float64_for_any_scale_and_number_of_kept_logits(
    scale: float, kept_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "KEPT_LOGITS", kept_logits)
    inputs = unit(11, 3), unit(11, 3), torch.tensor(scale)
    image, text, factor = expected_inputs = leaves(*(x.double() for x in inputs))
    eye = torch.eye(11)
    expected = (dense_info_nce(image, text, factor, eye) + dense_info_nce(text, image, factor, eye)) / 2
    actual_inputs = leaves(*inputs)
    actual = clip_loss(*actual_inputs, tile_size=3)
    # Twice: backward must not change the kept logits.
    torch.autograd.grad(actual, actual_inputs, retain_graph=True)
    compare(actual, actual_inputs, expected, expected_inputs, atol=1e-4)


class Operators(TorchDispatchMode):
    """Records the operators that run and the number of elements of the largest tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        # Repetitions whose number of rows has to be read from the device.
        self.num_unsized = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(name := func.overloadpacket.__name__)
        self.num_unsized += name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


# Operators for which the host waits for a GPU, and functions that read from it.
WAITING = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_consecutive", "_unique2"}


@pytest.mark.parametrize("loss", [clip_loss, partial(sigmoid_loss, logit_bias=torch.tensor(-10.0))])
@pytest.mark.parametrize("with_ids", [True, False])
def test_the_host_waits_for_the_device_only_for_the_ids_and_once(
    loss: Any, with_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of tiles, here 16: in forward and backward together."""
    inputs = leaves(unit(64, 8), unit(64, 8))
    sampled, owned = shared_captions(64, captions=50, per_image=3)
    ids = {"caption_ids": sampled, "image_caption_ids": owned} if with_ids else {}
    lists: list[Any] = []
    monkeypatch.setattr(Tensor, "tolist", lambda x, read=Tensor.tolist: lists.append(x) or read(x))
    with Operators() as operators:
        loss(*inputs, torch.tensor(50.0, requires_grad=True), **ids, tile_size=4).backward()
    assert not WAITING & set(operators.names)
    assert operators.num_unsized == 0
    assert operators.names.count("mm") >= 32
    assert len(lists) == with_ids


@pytest.mark.parametrize("with_ids", [True, False])
def test_no_tensor_is_larger_than_a_tile_or_an_input(with_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tile = 128, 4
    monkeypatch.setattr(tiles, "KEPT_LOGITS", 2 * tile * rows)
    image, text = leaves(unit(rows, 8), unit(rows, 8))
    sampled, owned = shared_captions(rows, captions=100, per_image=3)
    ids = (sampled, owned) if with_ids else (None, None)
    with Operators() as operators:
        clip_loss(image, text, 10.0, *ids, tile_size=tile).backward()
    # Forward: logits. Backward: logits, except for two kept tiles, and the gradient of the images.
    assert operators.names.count("mm") == 3 * rows / tile - 2
    assert operators.largest <= max(rows * 8, rows * tile), "only inputs and tiles of 4 rows are allowed"


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return -F.logsigmoid((2 * mask - 1) * (scale * image @ text.T + bias)).sum() / len(image)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (110.0, -12.0), (1000.0, 5.0)])
@pytest.mark.parametrize("with_ids", [True, False])
def test_sigmoid_loss_equals_a_dense_reference(scale: float, bias: float, with_ids: bool) -> None:
    sampled, owned = shared_captions(images=14, captions=9, per_image=4)
    mask, ids = (ownership(sampled, owned), (sampled, owned)) if with_ids else (torch.eye(14), ())
    inputs = unit(14, 6), unit(14, 6), torch.tensor(scale), torch.tensor(bias)
    actual_inputs, expected_inputs = leaves(*inputs), leaves(*(x.double() for x in inputs))
    actual = sigmoid_loss(*actual_inputs, *ids, tile_size=4)
    compare(actual, actual_inputs, dense_sigmoid(*expected_inputs, mask), expected_inputs)


def test_sigmoid_loss_equals_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip.loss")
    inputs = unit(9, 6), unit(9, 6), torch.tensor(10.0), torch.tensor(-10.0)
    actual_inputs, expected_inputs = leaves(*inputs), leaves(*inputs)
    actual = sigmoid_loss(*actual_inputs, tile_size=4)
    compare(actual, actual_inputs, open_clip.SigLipLoss()(*expected_inputs), expected_inputs, atol=1e-6)


def test_sigmoid_loss_is_float32_under_autocast_and_allocates_only_tiles() -> None:
    image, text = leaves(unit(64, 8).bfloat16(), unit(64, 8).bfloat16())
    with Operators() as operators, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(image, text, 10.0, -10.0, tile_size=4)
        loss.backward()
    torch.testing.assert_close(loss, sigmoid_loss(image.float(), text.float(), 10.0, -10.0))
    assert image.grad.dtype == torch.bfloat16
    assert operators.largest <= 64 * 8


def test_a_repeated_caption_counts_once_and_distinct_ones_give_the_loss_without_ids() -> None:
    image, text = unit(3, 4), unit(3, 4)
    ids = torch.arange(3)
    twice = torch.tensor([[0, 0, 1], [1, -1, 1], [2, 2, 2]])
    once = torch.tensor([[0, 1], [1, -1], [2, -1]])
    torch.testing.assert_close(clip_loss(image, text, 9.0, ids, twice), clip_loss(image, text, 9.0, ids, once))
    distinct = torch.stack([ids, ids + 100], dim=1)
    torch.testing.assert_close(clip_loss(image, text, 9.0, ids, distinct), clip_loss(image, text, 9.0))


IMAGE, TEXT, IDS = torch.eye(4)[:, :3], torch.eye(4)[:, :3], torch.arange(4)
WRONG_IDS = torch.tensor([[0, 1], [1, -1], [9, -1], [3, -1]])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: info_nce(IMAGE, TEXT, 1.0, torch.tensor([0, 1, 4, 2])), r"Query row 2 .* its column is 4"),
        (lambda: info_nce(IMAGE, TEXT, 1.0, lambda a, b: torch.eye(4)[a:b] > 1), "Query row 0 has no correct key"),
        (lambda: info_nce(IMAGE, TEXT, 1.0, lambda a, b: torch.eye(4)), "must return a bool tensor"),
        (lambda: clip_loss(IMAGE, TEXT[:3], 1.0), r"\(4, 3\) and \(3, 3\)"),
        (lambda: clip_loss(IMAGE, TEXT, 1.0, caption_ids=IDS), "or neither"),
        (lambda: clip_loss(IMAGE, TEXT, 1.0, IDS, IDS[:, None].int()), "K >= 1"),
        (lambda: clip_loss(IMAGE, TEXT, 1.0, IDS, WRONG_IDS), r"Row 2: caption id 2 .* \[9, -1\]"),
        (lambda: clip_loss(IMAGE, TEXT, 1.0, IDS - 1, (IDS - 1)[:, None]), "Row 0: caption id -1 must be >= 0"),
        (lambda: clip_loss(IMAGE, TEXT, 1.0, label_smoothing=1.0), "label_smoothing"),
        (lambda: clip_loss(IMAGE[:0], TEXT[:0], 1.0), "at least one pair"),
        (lambda: hard_negative_info_nce(IMAGE[:0], TEXT[:0]), "at least one query"),
        (lambda: hard_negative_info_nce(IMAGE, TEXT, torch.eye(4, 5)), r"negatives of shape \(any, 3\)"),
        (lambda: sigmoid_loss(IMAGE[:0], TEXT[:0], 1.0, 0.0), "sigmoid_loss needs at least one pair"),
    ],
)
def test_invalid_inputs_are_named(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss()
