"""The index on disk: what it may replace, how a damaged one is repaired, what readers and killed runs see."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch

from llm2clip.search.search_index import SearchIndex
from llm2clip.utils.manifests import write_manifest
from modeling_llm2clip import LLM2CLIPModel
from tests.damage import flip
from tests.modeling_llm2clip import tiny

from .conftest import content, encoded, index, picture

Model = tuple[Path, LLM2CLIPModel]
QUERY = np.ones((1, 24), np.float32) / 24**0.5


@pytest.mark.parametrize(
    ("damage", "index_type"),
    [
        ("images.lance/data/*", "flat"),
        ("images.lance/_versions/*", "flat"),
        ("manifest.json", "flat"),
        ("vectors-*.faiss", "faiss"),
        ("failures.json", "flat"),
    ],
)
@pytest.mark.parametrize("deleted", [False, True])
def test_a_damaged_index_is_repaired_as_its_error_message_says(
    damage: str, index_type: str, deleted: bool, pictures: Path, model: Model, tmp_path: Path
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type=index_type)
    before = content(output)
    for path in list(output.glob(damage)):
        path.unlink() if deleted else path.write_bytes(path.read_bytes()[:40])
    overwrite = damage != "failures.json"  # searching does not need it
    if overwrite:
        with pytest.raises((ValueError, FileNotFoundError), match=r"--overwrite|run the same llm2clip index again"):
            SearchIndex.open(output).search(QUERY, 1)
    assert index(pictures, model[0], output, index_type=index_type, overwrite=overwrite)[-1] == 12
    assert content(output) == before


def test_an_index_of_an_earlier_format_is_refused_and_replaced(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    output.mkdir()
    (output / "index.faiss").write_bytes(b"earlier")
    (output / "manifest.json").write_text('{"format_version": 1}')
    write_manifest(output, "index")
    for use in (lambda: SearchIndex.open(output), lambda: index(pictures, model[0], output)):
        with pytest.raises(ValueError, match=r"its format is 1, and this version reads 2\); build it again"):
            use()
    assert index(pictures, model[0], output, overwrite=True)[0] == 12
    assert not (output / "index.faiss").exists()


def test_an_index_with_a_flipped_bit_is_not_searched(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    (rows,) = (output / "images.lance" / "data").iterdir()
    with flip(rows), pytest.raises(ValueError, match=rf"is damaged: images\.lance/data/{rows.name} has changed"):
        SearchIndex.open(output)
    assert len(SearchIndex.open(output).search(QUERY, 20)[0]) == 12


def test_readers_keep_the_version_that_they_opened(pictures: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    before = SearchIndex.open(output)
    expected = before.search(QUERY, 20)
    (pictures / "00.png").unlink()
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index(pictures, model[0], output)
    assert before.search(QUERY, 20) == expected
    assert {row.key for row in SearchIndex.open(output).search(QUERY, 20)[0]} ^ {row.key for row in expected[0]} == {
        "00.png",
        "new.png",
    }
    tiny.save(tmp_path / "wide", projection_dim=40)
    index(pictures, tmp_path / "wide", output, overwrite=True)
    assert before.search(QUERY, 20) == expected
    assert SearchIndex.open(output).manifest.width == 40


def test_versions_are_deleted_when_no_reader_can_have_them_open(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    for number in range(3):
        (pictures / "new.png").write_bytes(encoded(picture(50 + number)))
        index(pictures, model[0], output)
    table = lancedb.connect(str(output)).open_table("images")
    many = len(table.list_versions())
    assert many > 3
    monkeypatch.setattr("llm2clip.search.lance_store.KEPT", timedelta(0))
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index(pictures, model[0], output)
    assert len(table.list_versions()) == 1
    assert len(SearchIndex.open(output).search(QUERY, 20)[0]) == 13


def test_what_a_killed_run_of_another_model_stored_is_dropped(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output)
    before = content(output)
    tiny.save(tmp_path / "wide", projection_dim=40)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llm2clip.search.lance_store.LanceStore.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, tmp_path / "wide", output, overwrite=True)
    assert content(output) == before
    with caplog.at_level("INFO"):
        assert index(pictures, model[0], output) == (0, 12, 0, 0, 12)
    assert "what an unfinished run of other settings has stored is dropped" in caplog.text
    assert content(output) == before


@pytest.mark.parametrize("index_type", ["flat", "ivf_rq"])
def test_an_interrupted_update_goes_on_and_counts_against_the_index(
    index_type: str, pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type=index_type)
    (pictures / "00.png").unlink()
    for number in range(3):
        (pictures / f"new {number}.png").write_bytes(encoded(picture(50 + number)))

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for step in ("_index_columns", "_clean"):
        with monkeypatch.context() as patch:
            patch.setattr(f"llm2clip.search.lance_store.LanceStore.{step}", killed)
            with pytest.raises(KeyboardInterrupt):
                index(pictures, model[0], output, index_type=index_type)
        # The manifest is the last file that is written before `_clean`.
        assert len(SearchIndex.open(output)) == (12 if step == "_index_columns" else 14)
        if step == "_index_columns":
            assert index(pictures, model[0], output, index_type=index_type) == (3, 11, 1, 0, 14)
            (pictures / "01.png").write_bytes(encoded(picture(70)))
            (pictures / "01.png").rename(pictures / "00.png")
            (pictures / "new 0.png").unlink()
    assert index(pictures, model[0], output, index_type=index_type) == (0, 14, 0, 0, 14)


def test_an_index_refuses_a_change_of_one_weight_and_of_the_preprocessing(
    pictures: Path, model: Model, tmp_path: Path
) -> None:
    index(pictures, model[0], tmp_path / "index")
    changed = LLM2CLIPModel.from_pretrained(model[0])
    with torch.no_grad():
        weight = changed.vision_model.blocks[0].mlp.w1.weight
        weight.view(-1)[1] += 1
        assert weight.numel() > 1024
    changed.save_pretrained(tmp_path / "weight")
    tiny.processor().save_pretrained(tmp_path / "weight")
    shutil.copytree(model[0], tmp_path / "processor")
    processor = tiny.processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "processor")
    for name in ("weight", "processor"):
        with pytest.raises(ValueError, match=r"other weights, other settings of the vision tower or another preproc"):
            index(pictures, tmp_path / name, tmp_path / "index")
