"""Stored outputs of frozen layers, which several runs share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform
from llm2clip.data.transforms import output_size
from llm2clip.store import StoreDamagedError, building
from llm2clip.trainers import freezing, run_stage2
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.stage2_config import Stage2Config, Stage2Recipe
from llm2clip.trainers.stored_rows import FrozenStatesDataset
from llm2clip.utils.settings import build_config
from tests.damage import flip
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs


def build(inputs: Inputs, folder: Path, fields: dict[str, Any] | None = None, **options: Any) -> FrozenStatesDataset:
    source = CaptionSource.from_dict(fields or tiny.concepts(max_samples=16))
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


def test_skipped_images_belong_to_their_limit_of_pixels(inputs: Inputs, tmp_path: Path) -> None:
    assert not build(inputs, tmp_path, on_error="skip").states.skipped
    with pytest.raises(ValueError, match="none of the 16 images can be read"):
        build(inputs, tmp_path, on_error="skip", max_pixels=1)
    assert not build(inputs, tmp_path, on_error="skip").states.skipped


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
    again = build(inputs, tmp_path)
    assert again.folder == first.folder
    assert states(first).equal(states(again))


def test_an_interrupted_computation_goes_on_where_it_stopped(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "SHARD_BYTES", 1)
    expected = states(build(inputs, tmp_path / "unbroken"))
    compute, calls = FrozenLayers.compute, []

    def interrupted(self: FrozenLayers, pixel_values: Tensor) -> Tensor:
        calls.append(pixel_values)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute(self, pixel_values)

    monkeypatch.setattr(FrozenLayers, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(inputs, tmp_path / "broken")
    assert states(build(inputs, tmp_path / "broken")).equal(expected)
    # In both runs the first call asks for the shape.
    assert len(calls) == (1 + 4 + 1) + (1 + 12)


@pytest.mark.parametrize("place", [70, -40])
@pytest.mark.parametrize("name", ["shard-00000.safetensors", "index.safetensors", "index.manifest"])
def test_damage_is_found_when_the_states_are_opened_and_mended(
    name: str, place: int, inputs: Inputs, tmp_path: Path
) -> None:
    first = build(inputs, tmp_path)
    expected = states(first)
    with flip(first.folder / name, place):
        with pytest.raises(StoreDamagedError, match=r"has changed|not valid"):
            type(first.states).open(first.folder)
        assert states(build(inputs, tmp_path)).equal(expected)


def test_a_zeroed_row_is_computed_again(inputs: Inputs, tmp_path: Path) -> None:
    first = build(inputs, tmp_path)
    expected, width = states(first).clone(), 2 * first.states.width
    with (first.folder / "shard-00000.safetensors").open("rb+") as file:
        content = file.read()
        file.seek(content.index(expected[5].numpy().tobytes()))
        file.write(bytes(width))
    assert not first.states.read(first.rows[[5]]).any()
    assert states(build(inputs, tmp_path)).equal(expected)


def test_states_of_other_pictures_behind_the_same_table_are_computed(inputs: Inputs, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.bmp")
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{number}.bmp,picture {number}\n" for number in range(4)))
    source = {"path": str(table), "caption_columns": ["caption"]}

    def build_again() -> Tensor:
        return states(build(inputs, tmp_path / "states", source))

    first = build_again()
    assert build_again().equal(first)
    picture = tmp_path / "2.bmp"
    status = picture.stat()
    Image.new("RGB", (28, 28), (0, 255, 0)).save(picture)
    second = build_again()
    assert (second != first).any(dim=1).tolist() == [False, False, True, False]
    # Size and time may be equal all the same.
    Image.new("RGB", (28, 28), (0, 0, 255)).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert picture.stat().st_size == status.st_size
    third = build_again()
    assert not third[2].equal(first[2])
    assert not third[2].equal(second[2])


def test_a_warm_up_without_training_is_refused_before_anything_is_computed(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    folder = tmp_path / "states"
    changes = {"freeze_vision_layers": 1, "frozen_states_dir": str(folder), "warmup_steps": 6}
    with pytest.raises(ValueError, match="has 6 of 6 optimizer steps"):
        run_stage2.run(build_config(Stage2Recipe, {**fields, **changes}))
    assert not folder.exists()
