"""Stored outputs of frozen layers, which several runs share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModel, Dinov2Model

from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform
from llm2clip.data.transforms import output_size
from llm2clip.store import StoreDamagedError, building
from llm2clip.trainers import freezing
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_rows import FrozenStatesDataset
from tests.builders import small_runs
from tests.damage import flip
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import interrupt, losses, run

QUICK: dict[str, Any] = {"max_steps": 1, "save_strategy": "no"}


def build(inputs: Inputs, folder: Path, fields: dict[str, Any] | None = None, **options: Any) -> FrozenStatesDataset:
    source = CaptionSource.from_dict(fields or small_runs.concepts(max_samples=16))
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    tower = AutoModel.from_pretrained(inputs.vision)
    args = Stage2Config(
        output_dir=str(folder / "run"),
        freeze_vision_layers=1,
        frozen_states_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=8,
        **options,
    )
    images = CaptionImageDataset(source, EvalTransform(processor), **options)
    return freezing.store_states(args, FrozenLayers(tower, 1, output_size(processor)), processor, images)


def states(dataset: FrozenStatesDataset) -> Tensor:
    found = dataset.states.read(dataset.rows)
    assert found.abs().sum(dim=1).all()
    return found


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
    expected = tower(pixels).pooler_output
    with frozen.replaced_by(frozen.compute(pixels)) as placeholder:
        torch.testing.assert_close(tower(placeholder).pooler_output, expected)
    torch.testing.assert_close(tower(pixels).pooler_output, expected)
    for number in (9, -9):
        with pytest.raises(ValueError, match=f"freeze_vision_layers is {number}, but the tower has"):
            FrozenLayers(tower, number, (28, 28))
    assert FrozenLayers(tower, -1, (28, 28)).num_layers == len(frozen.layers) - 1


def test_runs_share_states_of_equal_preprocessing(inputs: Inputs, tmp_path: Path) -> None:
    shared = {"freeze_vision_layers": 1, "frozen_states_dir": str(tmp_path / "states"), **QUICK}
    with pytest.raises(ValueError, match="has 1 of 1 optimizer steps"):
        run("stage2", tmp_path / "no", inputs, **shared, warmup_steps=1)
    assert not (tmp_path / "states").exists(), "nothing is computed for a run that is refused"
    for name in ("first", "again"):
        run("stage2", tmp_path / name, inputs, **shared)
    assert losses(tmp_path / "again") == losses(tmp_path / "first")
    assert len(list((tmp_path / "states").glob("[!.]*"))) == 1
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "processor")
    run("stage2", tmp_path / "b", inputs, **shared, image_processor_name_or_path=str(tmp_path / "processor"))
    assert len(list((tmp_path / "states").glob("[!.]*"))) == 2
    vision = small_runs.save_vision_tower(tmp_path / "vision", patch_dropout=0.5)
    with pytest.raises(ValueError, match="patch_dropout does not work with frozen_states_dir"):
        run("stage2", tmp_path / "c", inputs, **shared, vision_model_name_or_path=vision)


def test_two_runs_do_not_write_the_same_states(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "WAIT", 0.0)
    compute, refused = FrozenLayers.compute, []

    def meanwhile(self: FrozenLayers, pixel_values: Tensor) -> Tensor:
        if len(pixel_values) > 1 and not refused:
            refused.append(True)
            # Another thread, since the lock lets the one that holds it in.
            with ThreadPoolExecutor() as other, pytest.raises(ValueError, match="another run is using"):
                other.submit(build, inputs, tmp_path).result()
        return compute(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenLayers, "compute", meanwhile)
        first = build(inputs, tmp_path)
    assert refused
    assert states(first).equal(states(build(inputs, tmp_path)))


def test_an_interrupted_computation_goes_on_where_it_stopped(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "SHARD_BYTES", 1)
    expected = states(build(inputs, tmp_path / "unbroken"))
    compute, calls = FrozenLayers.compute, []

    def interrupted(self: FrozenLayers, pixel_values: Tensor) -> Tensor:
        calls.append(pixel_values)
        return interrupt() if len(calls) == 6 else compute(self, pixel_values)

    monkeypatch.setattr(FrozenLayers, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(inputs, tmp_path / "broken")
    assert states(build(inputs, tmp_path / "broken")).equal(expected)
    # In both runs the first call asks for the shape.
    assert len(calls) == (1 + 4 + 1) + (1 + 12)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "index.safetensors", "index.manifest"])
def test_damage_is_found_when_the_states_are_opened_and_mended(name: str, inputs: Inputs, tmp_path: Path) -> None:
    first = build(inputs, tmp_path)
    expected = states(first).clone()
    with flip(first.folder / name):
        with pytest.raises(StoreDamagedError, match=r"has changed|not valid"):
            type(first.states).open(first.folder)
        assert states(build(inputs, tmp_path)).equal(expected)


def test_states_of_other_pictures_behind_the_same_table_are_computed(inputs: Inputs, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.bmp")
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{number}.bmp,picture {number}\n" for number in range(4)))
    source = {"path": str(table), "caption_columns": ["caption"]}
    first = states(build(inputs, tmp_path / "states", source))
    assert states(build(inputs, tmp_path / "states", source)).equal(first)
    picture = tmp_path / "2.bmp"
    status = picture.stat()
    # Size and time may be equal all the same.
    Image.new("RGB", (28, 28), (0, 0, 255)).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = states(build(inputs, tmp_path / "states", source))
    assert (second != first).any(dim=1).tolist() == [False, False, True, False]
