"""Readers of long captions, on samples in the exact file formats, against values written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmarks import sharegpt4v
from llm2clip.evaluation.benchmarks.base import BenchmarkError
from tests.llm2clip.evaluation.benchmarks.samples import BOM, pairs, read, write, write_lines


def sharegpt4v_row(number: int, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": f"sa_{number}", "image": f"sam/images/sa_{number}.jpg", "conversations": turns}


def test_sharegpt4v_takes_the_first_rows_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharegpt4v, "ROWS", 3)
    folder = tmp_path / "sharegpt4v"
    rows = [sharegpt4v_row(9, " In a café,\n\ntwo. "), sharegpt4v_row(3, "Same."), sharegpt4v_row(7, "Same.")]
    file = write(folder / sharegpt4v.WHOLE, [*rows, sharegpt4v_row(1, "Not in the test set.")])
    # Of a large file nothing is read after the last row that is needed.
    write(file, BOM + file.read_text("utf-8")[:-30])
    for place in ("sam/images/sa_9.jpg", "sam/sa_3.jpg", "sa_000000/sa_7.jpg"):
        write(folder / place)
    expected = [
        ("sam/images/sa_9.jpg", " In a café,\n\ntwo. "),
        ("sam/sa_3.jpg", "Same."),
        ("sa_000000/sa_7.jpg", "Same."),
    ]
    assert pairs(read("sharegpt4v-1k", tmp_path), folder) == expected
    (folder / "sam/sa_3.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"ShareGPT4V-1k lacks 1 of 3 images: .*sa_3\.jpg"):
        read("sharegpt4v-1k", tmp_path)
    write(file, [{"image": "sam/images/sa_9.jpg", "conversations": []}])
    with pytest.raises(BenchmarkError, match=r"row 1 of .* has no second turn"):
        read("sharegpt4v-1k", tmp_path)


def test_sharegpt4v_is_also_read_from_the_derived_file(tmp_path: Path) -> None:
    write(tmp_path / sharegpt4v.DERIVED, [{"caption": "é\n", "image": "sam/images/sa_2.jpg"}])
    write(tmp_path / "sa_2.jpg")
    data = read("sharegpt4v-1k", tmp_path)
    assert pairs(data, tmp_path) == [("sa_2.jpg", "é\n")]
    assert data.counts() == {"images": 1, "texts": 1}


def test_urban1k_takes_first_lines_and_keeps_the_empty_caption(tmp_path: Path) -> None:
    folder = tmp_path / "Urban1k"
    for number, caption in {1: f"{BOM}A café. \n", 592: "", 2: "Two\u2028lines.\r\nMore.", 10: "Ten."}.items():
        write(folder / f"caption/{number}.txt", caption)
        write(folder / f"image/{number}.jpg")
    data = read("urban1k", tmp_path)
    assert pairs(data, folder) == [
        ("image/1.jpg", "A café. "),
        ("image/2.jpg", "Two\u2028lines."),
        ("image/10.jpg", "Ten."),
        ("image/592.jpg", ""),
    ]
    (folder / "image/10.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"Urban1k lacks 1 of 4 images: .*10\.jpg"):
        read("urban1k", tmp_path)
    write(folder / "image/10.jpg")
    write(folder / "image/11.jpg")
    with pytest.raises(BenchmarkError, match=r"Urban1k lacks captions of images: 11\.txt"):
        read("urban1k", tmp_path)
    write(folder / "caption/eleven.txt", "Eleven.")
    with pytest.raises(BenchmarkError, match=r"there are eleven\.txt"):
        read("urban1k", tmp_path)


def test_docci_takes_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "docci"
    rows = [
        {"example_id": key, "split": key.rsplit("_", 1)[0], "image_file": f"{key}.jpg", "description": f" {key}.\n é"}
        for key in ("train_00000", "test_00001", "qual_dev_00000", "test_00000", "qual_test_00000")
    ]
    write_lines(folder / "docci_descriptions.jsonlines", rows)
    write(folder / "images/test_00000.jpg")
    with pytest.raises(BenchmarkError, match=r"DOCCI lacks 1 of 2 images: .*test_00001\.jpg"):
        read("docci", tmp_path)
    write(folder / "images/test_00001.jpg")
    assert pairs(read("docci", tmp_path), folder) == [
        ("images/test_00001.jpg", " test_00001.\n é"),
        ("images/test_00000.jpg", " test_00000.\n é"),
    ]
    write_lines(folder / "docci_descriptions.jsonlines", [{"example_id": "test_00000", "split": "test"}])
    with pytest.raises(BenchmarkError, match=r"row 1 of docci_descriptions\.jsonlines has no text 'image_file'"):
        read("docci", tmp_path)


def mask(quality: int, label: str, caption: str) -> dict[str, Any]:
    corner = {"x": 0, "y": 0}
    bounds = {"topLeft": corner, "bottomRight": corner}
    return {"mask_quality": quality, "label": label, "caption": caption, "bounds": bounds, "parent": -1}


DCI = {
    "113029-data.json": {
        "image": "sa_1545038.jpg",
        "short_caption": "A balcony. ",
        "extra_caption": "Ruined,\nin Beirut é.",
        "mask_data": {
            "0": mask(0, "the grate", "bent."),
            "7": mask(2, "", "unusable"),
            "3": mask(1, "a box", "blurred"),
        },
    },
    "2-data.json": {
        "image": "sa_2.jpg",
        "short_caption": "A mast.",
        "extra_caption": "",
        "mask_data": {"1": mask(2, "x", "y")},
    },
}
DCI_TEXTS = {
    "dci": ["A mast.\n", "A balcony. \nRuined,\nin Beirut é."],
    "dci-extra": ["", "Ruined,\nin Beirut é."],
    "dci-short": ["A mast.", "A balcony. "],
    "dci-complete": [
        "A mast.\n",
        "A balcony. \nRuined,\nin Beirut é.\nThe following can also be seen in the image:\nthe grate: bent.\na box",
    ],
}


@pytest.mark.parametrize("name", DCI_TEXTS)
def test_dci_has_a_name_for_each_form_of_the_caption(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "densely_captioned_images"
    write(folder / "splits.json", {"train": ["2-data.json"], "valid": [], "test": ["113029-data.json"]})
    for file, row in DCI.items():
        write(folder / "annotations" / file, row)
        write(folder / "photos" / str(row["image"]))
    data = read(name, tmp_path)
    images = ["photos/sa_2.jpg", "photos/sa_1545038.jpg"]
    assert pairs(data, folder) == list(zip(images, DCI_TEXTS[name], strict=True))
    (folder / "photos/sa_2.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"DCI lacks 1 of 2 images: .*sa_2\.jpg"):
        read(name, tmp_path)
    (folder / "annotations/2-data.json").unlink()
    with pytest.raises(BenchmarkError, match=r"DCI \(annotations\) lacks 1 of 2 images: .*2-data\.json"):
        read(name, tmp_path)


def test_iiw_adds_the_missing_ending_of_image_names(tmp_path: Path) -> None:
    folder = tmp_path / "imageinwords"
    write_lines(folder / "IIW-400/data.jsonl", [{"image/key": "aar_test_04600", "IIW": "A café.\u00a0\n\n\nBlue. "}])
    write_lines(folder / "DOCCI_Test/data.jsonl", [{"image": "test_00731", "IIW": "Towels."}])
    write_lines(folder / "DCI_Test/data.jsonl", [{"image": "sa_1.jpg", "ex_id": "1-data.json", "IIW": "A plaza."}])
    write(folder / "docci_aar/aar_test_04600.jpg")
    write(folder / "dci/sa_1.jpg")
    with pytest.raises(BenchmarkError, match=r"IIW lacks 1 of 3 images: .*docci/test_00731\.jpg"):
        read("iiw", tmp_path)
    write(folder / "docci/test_00731.jpg")
    assert pairs(read("iiw", tmp_path), folder) == [
        ("docci/test_00731.jpg", "Towels."),
        ("docci_aar/aar_test_04600.jpg", "A café.\u00a0\n\n\nBlue. "),
        ("dci/sa_1.jpg", "A plaza."),
    ]


@pytest.mark.parametrize(
    ("title", "file"),
    [
        ("LIT-CN", "image_caption_long_cn.txt"),
        ("DCI-CN", "image_caption_trans.txt"),
        ("DOCCI-CN", "image_caption_trans.txt"),
    ],
)
def test_chinese_long_captions_are_split_at_the_first_tab(title: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / title
    write(folder / file, f"{BOM}a/1.jpg\t 一只猫,\t两只狗。\n2.jpg\t\n")
    write(folder / "a/1.jpg")
    write(folder / "images/2.jpg")
    data = read(title.lower(), tmp_path)
    assert pairs(data, folder) == [("a/1.jpg", " 一只猫,\t两只狗。"), ("images/2.jpg", "")]
    write(folder / file, "a/1.jpg\t猫\n2.jpg 狗\n")
    with pytest.raises(BenchmarkError, match=f"line 2 of {file} of {title} has no tab"):
        read(title.lower(), tmp_path)
