"""Stored features of images."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data import CaptionSource, load_source
from llm2clip.data.sources import source_columns
from llm2clip.encoders.image_features import ImageFeatures, open_features
from llm2clip.encoders.images import TableImages
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.builders.small_runs import concepts


@pytest.fixture(scope="module")
def model() -> LLM2CLIPModel:
    torch.manual_seed(0)
    return tiny.joint_model()


def images(rows: int = 12) -> TableImages:
    source = CaptionSource.from_dict(concepts(max_samples=rows))
    table: Any = load_source(source)
    return TableImages(table, source_columns(source, table))


def store(folder: Path, sets: list[TableImages], model: LLM2CLIPModel, **changes: Any) -> ImageFeatures:
    options = {"batch_size": 4, "shard_size": 5, "dtype": "float32", **changes}
    return open_features(model, tiny.processor().image_processor, sets, folder, **options)


def test_rows_are_the_features_of_the_images(model: LLM2CLIPModel, tmp_path: Path) -> None:
    table = images()
    features = store(tmp_path, [table, table], model)
    assert len(features) == len(np.unique(table.content_keys(), axis=0))
    rows = features.find(table.content_keys())
    pixels = tiny.processor()(
        images=[table.decode(row, lambda value, *_: value) for row in range(12)], return_tensors="pt"
    )
    expected = model.get_vision_features(pixels["pixel_values"])
    torch.testing.assert_close(features.read_views(rows, 0).float(), expected, atol=2e-3, rtol=2e-3)


def test_every_identity_has_its_own_folder(model: LLM2CLIPModel, tmp_path: Path) -> None:
    table, changes = images(4), [{}, {"views": 2}, {"views": 2, "seed": 1}, {"dtype": "bfloat16"}]
    folders = {store(tmp_path, [table], model, **fields).path for fields in changes}
    other: Any = tiny.joint_model()
    next(other.vision_model.parameters()).data += 1
    folders.add(store(tmp_path, [table], other).path)
    assert len(folders) == 5
    assert store(tmp_path, [table], model, seed=1, shard_size=9).path in folders


def test_a_build_is_continued_where_it_was_killed(
    model: LLM2CLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = LLM2CLIPModel.get_vision_features, []

    def killed(self: LLM2CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, pixel_values, **kwargs)

    monkeypatch.setattr(LLM2CLIPModel, "get_vision_features", killed)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "broken", [images()], model)
    features = store(tmp_path / "broken", [images()], model)
    assert sum(calls[:2]) + sum(calls[3:]) == len(features)
    unbroken = store(tmp_path / "unbroken", [images()], model)
    for shard in unbroken.path.glob("*.safetensors"):
        assert shard.read_bytes() == (features.path / shard.name).read_bytes()


def test_a_worker_reads_the_store_while_it_grows(model: LLM2CLIPModel, tmp_path: Path) -> None:
    features = store(tmp_path, [images(8)], model)
    sent, rows = pickle.dumps(features), np.arange(len(features))
    content = features.read(rows)
    store(tmp_path, [images(12)], model)
    copy: ImageFeatures = pickle.loads(sent)
    assert (len(copy), copy.find(images(8).content_keys()).tolist()) == (8, list(range(8)))
    (features.path / "index.manifest").unlink()  # while another run writes it
    assert copy.read(rows).equal(content)
    assert pickle.loads(sent).read(rows).equal(content)
