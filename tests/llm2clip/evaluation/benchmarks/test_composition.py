"""Readers of SugarCrepe and MMVP-VLM, on samples in the exact file formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.composition import SUGAR_CREPE as KINDS
from tests.llm2clip.evaluation.benchmarks.samples import BOM, read, write


def sugar_crepe(folder: Path) -> None:
    for kind in KINDS:
        # Keys are not contiguous, as in swap_obj.
        rows = {
            "0": {"filename": "000000000139.jpg", "caption": f"{kind}, a café. ", "negative_caption": f"not {kind}\n"},
            "7": {"filename": f"{kind}.jpg", "caption": "Same.", "negative_caption": "Other."},
        }
        write(folder / "sugar_crepe" / f"{kind}.json", rows)
        write(folder / "val2017" / f"{kind}.jpg")
    write(folder / "val2017/000000000139.jpg")


def test_sugar_crepe_reads_its_seven_files(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    sugar_crepe(folder)
    data = read("sugarcrepe", tmp_path)
    assert data.counts() == dict.fromkeys(KINDS, 2)
    assert data.kinds[:4] == ["add_att", "add_att", "add_obj", "add_obj"]
    assert data.right[:2] == ["add_att, a café. ", "Same."]
    assert data.wrong[:2] == ["not add_att\n", "Other."]
    # The image that all files use is there once.
    assert len(data.images) == 8
    assert data.owners.tolist() == [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7]
    assert data.images.images[2] == folder / "val2017/add_obj.jpg"
    (folder / "val2017/swap_att.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"coco lacks 1 of 8 images: .*swap_att\.jpg"):
        read("sugarcrepe", tmp_path)
    write(folder / "val2017/swap_att.jpg")
    write(folder / "sugar_crepe/swap_obj.json", {"12": {"filename": "add_obj.jpg", "caption": "x"}})
    with pytest.raises(BenchmarkError, match=r"SugarCrepe: a file in .*'negative_caption'"):
        read("sugarcrepe", tmp_path)


QUESTIONS = """Question ID,Type,Statement
1,Orientation and Direction,"a café, open "
2,Orientation and Direction,a café closed
4,Texts,no text
3,Texts,"the text ""é\"""
"""


def test_mmvp_takes_the_odd_number_as_the_first_image(tmp_path: Path) -> None:
    folder = tmp_path / "mmvp_vlm"
    images = folder / "MLLM_VLM Images"
    write(folder / "Questions.csv", BOM + QUESTIONS.replace("\n", "\r\n"))
    paths = [images / "Orientation and Direction" / name for name in ("1.jpg", "2.jpg")]
    paths += [images / "Texts" / name for name in ("3.jpg", "4.jpg")]
    for path in paths:
        write(path)
    data = read("mmvp-vlm", tmp_path)
    assert data.images.images == paths
    assert data.texts == ["a café, open ", "a café closed", 'the text "é"', "no text"]
    assert data.kinds == ["Orientation and Direction", "Texts"]
    paths[3].unlink()
    with pytest.raises(BenchmarkError, match=r"mmvp_vlm lacks 1 of 4 images: .*4\.jpg"):
        read("mmvp-vlm", tmp_path)


@pytest.mark.parametrize("rows", ["5,Texts,alone\n", "5,Texts\n6,Texts,a\n"])
def test_mmvp_refuses_rows_without_a_partner(rows: str, tmp_path: Path) -> None:
    write(tmp_path / "mmvp_vlm/Questions.csv", QUESTIONS + rows)
    (tmp_path / "mmvp_vlm/MLLM_VLM Images").mkdir()
    with pytest.raises(BenchmarkError, match="MMVP-VLM: a file in"):
        read("mmvp-vlm", tmp_path)
