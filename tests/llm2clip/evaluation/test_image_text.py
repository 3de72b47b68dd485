"""Image-text retrieval of a model: broken embeddings end it, images that cannot be read are left out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from llm2clip.data import CaptionSource
from llm2clip.encoders import OurEncoder
from llm2clip.evaluation import CaptionRetrieval, ImageTextRetrieval
from llm2clip.evaluation.clip_benchmark import CLIPBenchmarkModel
from llm2clip.utils.embeddings import NonFiniteError
from modeling_llm2clip import LLM2CLIPModel
from tests.modeling_llm2clip import tiny


def table(folder: Path) -> CaptionSource:
    """Six images with a caption each; the third cannot be read."""
    rows: dict[str, list[Any]] = {"key": [], "image": [], "caption": []}
    for number in range(6):
        stream = io.BytesIO()
        tiny.IMAGES[number % 2].rotate(10 * number).save(stream, "PNG")
        rows["key"].append(f"k{number}")
        rows["image"].append(b"no image" if number == 2 else stream.getvalue())
        rows["caption"].append(f"caption {number}")
    datasets.Dataset.from_dict(rows).to_parquet(folder / "test.parquet")
    return CaptionSource(str(folder / "test.parquet"), split="test")


def retrieval(folder: Path) -> ImageTextRetrieval:
    return ImageTextRetrieval(table(folder), tiny.processor().image_processor, on_error="skip")


def embed_with(model: LLM2CLIPModel) -> Callable[[list[str]], Tensor]:
    return OurEncoder(model.text_model, tiny.processor()).embed


def break_row(row: int, value: float) -> Callable[..., Any]:
    """Make a hook that gives the row of a module's output the value."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row] = value
        return output

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_with_broken_features_end_the_evaluation(value: float, tmp_path: Path) -> None:
    model = tiny.joint_model().eval()
    # The second readable image of a batch without the third image.
    model.visual_projection.register_forward_hook(break_row(1, value))
    with pytest.raises(NonFiniteError, match=r"1 of 5 images of .*test\.parquet are NaN or infinite: k1\. A model"):
        retrieval(tmp_path)(model, embed_with(model))


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.joint_model().eval()
    found = retrieval(tmp_path)(model, embed_with(model))
    assert (found["num_images"], found["num_texts"]) == (5, 5)
    assert "that cannot be read are left out: k2" in caplog.text


def test_captions_with_broken_features_end_the_evaluation(tmp_path: Path) -> None:
    model = tiny.joint_model().eval()

    def embed(captions: list[str]) -> Tensor:
        embeds = embed_with(model)(captions)
        embeds[captions.index("caption 3")] = float("nan")
        return embeds

    with pytest.raises(NonFiniteError, match=r"1 of 6 captions of .*\(by the LLM\) are NaN or infinite: caption 3\."):
        retrieval(tmp_path)(model, embed)
    torch.nn.init.constant_(model.text_adapter.proj.weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"6 of 6 captions of .*\(by the adapter\) are NaN or infinite: c"):
        retrieval(tmp_path)(model, embed_with(model))


def test_caption_retrieval_and_clip_benchmark_end_too() -> None:
    model = tiny.joint_model().eval()
    torch.nn.init.constant_(model.visual_projection.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="2 of 2 images of a batch are NaN or infinite: 0, 1"):
        CLIPBenchmarkModel(OurEncoder(model, tiny.processor())).encode_image(torch.zeros(2, 3, 28, 28))
    text_model = tiny.text_model().eval()
    torch.nn.init.constant_(text_model.decoder.norm.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="2 of 2 captions are NaN or infinite: a dog, a cat"):
        CaptionRetrieval(["a dog", "a cat"], ["one dog", "one cat"])(text_model, tiny.processor().tokenizer)
