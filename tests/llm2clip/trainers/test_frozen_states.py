"""Stored outputs of frozen layers, which several runs share."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from llm2clip.data import CaptionImageDataset, CaptionSource, EvalTransform, SampleIndex, SkippedSample
from llm2clip.data.transforms import output_size
from llm2clip.trainers import frozen_states, run_stage2
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.frozen_states import STATES, FrozenStatesDataset, changed_parts, open_states
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.utils.settings import build_config
from tests.damage import flip
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs


def build(inputs: Inputs, folder: Path, fields: dict[str, Any] | None = None, **options: Any) -> FrozenStatesDataset:
    source = CaptionSource.from_dict(fields or tiny.concepts(max_samples=16))
    processor = AutoImageProcessor.from_pretrained(inputs.vision)
    tower = AutoModel.from_pretrained(inputs.vision)
    return FrozenStatesDataset(
        captions=CaptionImageDataset(source, None, **options),
        images=CaptionImageDataset(source, EvalTransform(processor), **options),
        frozen=FrozenLayers(tower, 1, output_size(processor)),
        image_processor=processor,
        folder=folder,
        batch_size=8,
    )


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def test_skipped_images_belong_to_their_limit_of_pixels(inputs: Inputs, tmp_path: Path) -> None:
    first = build(inputs, tmp_path, on_error="skip")
    assert not first.skipped
    with pytest.raises(ValueError, match="none of the 16 images can be read"):
        build(inputs, tmp_path, on_error="skip", max_pixels=1)
    assert stored(tmp_path) == [first.folder.name]


def test_two_runs_do_not_write_the_same_states(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_states, "PATIENCE", 0.0)
    compute, refused = FrozenLayers.compute, []

    def meanwhile(self: FrozenLayers, pixel_values: Tensor) -> Tensor:
        if len(pixel_values) > 1 and not refused:
            refused.append(True)
            # Another thread, since the lock lets the one that holds it in.
            with ThreadPoolExecutor() as other, pytest.raises(ValueError, match="another run is using"):
                other.submit(build, inputs, tmp_path).result()
            assert stored(tmp_path) == []
        return compute(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenLayers, "compute", meanwhile)
        first = build(inputs, tmp_path)
    assert refused
    again = build(inputs, tmp_path)
    assert again.folder == first.folder
    assert np.array_equal(first.states, again.states)
    assert np.abs(first.states).sum(axis=(1, 2)).all()


def test_an_interrupted_computation_leaves_no_states_and_is_repeated(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = FrozenLayers.compute, []

    def interrupted(self: FrozenLayers, pixel_values: Tensor) -> Tensor:
        calls.append(len(pixel_values))
        if calls.count(8) == 2:
            raise KeyboardInterrupt
        return compute(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenLayers, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(inputs, tmp_path)
    assert stored(tmp_path) == []
    dataset = build(inputs, tmp_path)
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["manifest.json", STATES]
    assert np.abs(dataset.states).sum(axis=(1, 2)).all()


def test_damage_is_found_when_the_states_are_opened_or_read(inputs: Inputs, tmp_path: Path) -> None:
    first = build(inputs, tmp_path)
    manifest, states = open_states(first.folder)
    assert (manifest["shape"], manifest["parts"][0][:2]) == (list(states.shape), [0, 16])
    assert changed_parts(manifest, states) == []
    for name, place in (("manifest.json", 80), (STATES, 70)):
        with flip(first.folder / name, place), pytest.raises(ValueError, match="the next run computes"):
            build(inputs, tmp_path)
    with flip(first.folder / STATES, 4000):
        assert changed_parts(*open_states(first.folder)) == [(0, 16)]
    (first.folder / "manifest.json").write_text('{"skipped": []}')
    with pytest.raises(ValueError, match=r"manifest\.json has changed.*the next run computes"):
        build(inputs, tmp_path)


def test_all_processes_follow_the_first_one(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose view of the folder is older, or whose hash of the data differs, neither builds nor waits."""
    first = build(inputs, tmp_path)
    monkeypatch.setattr(frozen_states, "broadcast_object_list", lambda found: [first.folder.name, True])
    monkeypatch.setattr(frozen_states, "digest_json", lambda identity: "another")
    monkeypatch.setattr(FrozenStatesDataset, "_build", None)
    other = build(inputs, tmp_path)
    assert other.folder == first.folder
    sample = other[SampleIndex(0, 3)]
    assert not isinstance(sample, SkippedSample)
    assert sample["vision_states"].equal(torch.from_numpy(np.array(first.states[3])))


def test_a_full_disk_is_an_error_before_anything_is_computed(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{STATES}'"):
            build(inputs, tmp_path)
    assert not stored(tmp_path)
    states = build(inputs, tmp_path)
    assert np.isfinite(states.states).all()
    assert states.states.any()


def test_states_of_other_pictures_behind_the_same_table_are_computed(inputs: Inputs, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.bmp")
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{number}.bmp,picture {number}\n" for number in range(4)))
    source = {"path": str(table), "caption_columns": ["caption"]}

    def build_again() -> FrozenStatesDataset:
        return build(inputs, tmp_path / "states", source)

    first = build_again()
    assert build_again().folder == first.folder
    picture = tmp_path / "2.bmp"
    status = picture.stat()
    Image.new("RGB", (28, 28), (0, 255, 0)).save(picture)
    second = build_again()
    assert second.folder != first.folder
    assert [bool((second.states[row] != first.states[row]).any()) for row in range(4)] == [False, False, True, False]
    # Size and time may be equal all the same.
    Image.new("RGB", (28, 28), (0, 0, 255)).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert picture.stat().st_size == status.st_size
    assert build_again().folder not in (first.folder, second.folder)


def test_states_that_are_cut_short_while_open_are_an_error(inputs: Inputs, tmp_path: Path) -> None:
    dataset = build(inputs, tmp_path)
    os.truncate(dataset.folder / STATES, 200)
    with pytest.raises(ValueError, match=r"states\.npy was cut short while it was open"):
        dataset[SampleIndex(0, 15)]


def test_a_warm_up_without_training_is_refused_before_anything_is_computed(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    states = tmp_path / "states"
    changes = {"freeze_vision_layers": 1, "frozen_states_dir": str(states), "warmup_steps": 6}
    with pytest.raises(ValueError, match="has 6 of 6 optimizer steps"):
        run_stage2.run(build_config(Stage2Config, {**fields, **changes}))
    assert not states.exists()
