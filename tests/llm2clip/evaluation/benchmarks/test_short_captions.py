"""Readers of short captions, on samples in the exact file formats, against values written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.karpathy import KarpathyImage, read_karpathy
from tests.llm2clip.evaluation.benchmarks.samples import BOM, pairs, read, write

SEVEN = [" Zwei Hunde.", "two dogs\n", "Two dogs", "TWO DOGS", "two dogs", "", "dogs, again"]


def images(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name)


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ("flickr30k_test.json", ("flickr30k-images/1.jpg", "flickr30k-images/2.jpg")),
        ("test.json", ("images/1.jpg", "flickr30k_images/2.jpg")),
        ("annotations/test.json", ("flickr30k_images/flickr30k_images/1.jpg", "2.jpg")),
    ],
)
def test_flickr30k_of_salesforce_keeps_all_captions(file: str, places: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    rows = [
        {"image": "flickr30k-images/1.jpg", "caption": SEVEN},
        {"image": "flickr30k-images/2.jpg", "caption": ["two dogs", "Käfer "]},
    ]
    write(folder / file, rows)
    images(folder, *places)
    expected = [(places[0], text) for text in SEVEN] + [(places[1], "two dogs"), (places[1], "Käfer ")]
    data = read("flickr30k", tmp_path)
    assert pairs(data, folder) == expected
    assert data.matches is None
    (folder / places[1]).unlink()
    with pytest.raises(BenchmarkError, match=r"Flickr30k lacks 1 of 2 images: .*flickr30k-images/2\.jpg"):
        read("flickr30k", tmp_path)


def test_the_names_of_llm2clip_count_in_the_folder_of_the_set_only(tmp_path: Path) -> None:
    write(tmp_path / "test.json", [])
    found = [benchmark.name for benchmark in all_benchmarks().values() if benchmark.find(tmp_path)]
    assert not {name for name in found if name.startswith(("flickr30k", "coco"))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": "1.jpg"}, "is not a list of JSON objects"),
        ([{"caption": ["a"]}], "row 1 of .* has no text 'image'"),
        ([{"image": "1.jpg", "caption": "a dog"}], "row 1 of .* has no list of texts 'caption'"),
        ([{"image": "1.jpg", "caption": ["a", None]}], "row 1 of .* has no list of texts 'caption'"),
    ],
)
def test_broken_rows_of_salesforce_are_named(content: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "flickr30k_test.json", content)
    with pytest.raises(BenchmarkError, match=message):
        read("flickr30k", tmp_path)


def karpathy_row(name: str, split: str, captions: list[str], first_id: int, **more: object) -> dict[str, object]:
    ids = list(range(first_id, first_id + len(captions)))
    sentences = [
        {"tokens": text.split(), "raw": text, "imgid": 7, "sentid": number}
        for text, number in zip(captions, ids, strict=True)
    ]
    return {"sentids": ids, "imgid": 7, "sentences": sentences, "split": split, "filename": name, **more}


def test_flickr30k_of_karpathy_takes_raw_sentences_of_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    rows = [
        karpathy_row("1.jpg", "train", ["not this"], 0),
        karpathy_row("2.jpg", "test", SEVEN[:2], 5),
        karpathy_row("3.jpg", "val", ["nor this"], 10),
        karpathy_row("1.jpg", "test", ["Ein Käfer.", " Zwei Hunde."], 15),
    ]
    write(folder / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    images(folder, "flickr30k-images/1.jpg", "images/2.jpg")
    assert pairs(read("flickr30k-karpathy", tmp_path), folder) == [
        ("images/2.jpg", " Zwei Hunde."),
        ("images/2.jpg", "two dogs\n"),
        ("flickr30k-images/1.jpg", "Ein Käfer."),
        ("flickr30k-images/1.jpg", " Zwei Hunde."),
    ]


def test_coco_of_karpathy_takes_five_captions_and_keeps_their_ids(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    rows = [
        karpathy_row("COCO_train2014_000000000009.jpg", "restval", ["no"], 1, filepath="train2014", cocoid=9),
        karpathy_row("COCO_val2014_000000000042.jpg", "test", SEVEN, 300, filepath="val2014", cocoid=42),
        karpathy_row("COCO_val2014_000000000041.jpg", "test", SEVEN[:6], 200, filepath="val2014", cocoid=41),
    ]
    file = write(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    names = ("val2014/COCO_val2014_000000000042.jpg", "images/COCO_val2014_000000000041.jpg")
    images(folder, *names)
    data = read("coco-karpathy", tmp_path)
    assert pairs(data, folder) == [(name, text) for name in names for text in SEVEN[:5]]
    assert read_karpathy(file) == [
        KarpathyImage("val2014/COCO_val2014_000000000042.jpg", SEVEN, [*range(300, 307)], 42),
        KarpathyImage("val2014/COCO_val2014_000000000041.jpg", SEVEN[:6], [*range(200, 206)], 41),
    ]
    rows[1]["sentids"] = [300]
    write(file, {"images": rows})
    with pytest.raises(BenchmarkError, match=r"image 2 of .* has 7 sentences, but the sentids \[300\]"):
        read("coco-karpathy", tmp_path)
    write(file, {"images": rows[:1]})
    with pytest.raises(BenchmarkError, match="has no image of the split 'test'"):
        read("coco-karpathy", tmp_path)


def test_clip_benchmark_lines_end_the_name_at_the_first_comma_after_it(tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    lines = [
        BOM + "image,caption",
        "2.jpg, Two dogs, one red.",
        "2.jpg,see 1.jpg,2.jpg",
        "1.jpg,,a comma first\u2028 ",
        "",
        "1.jpg,",
        "1.jpg, Two dogs, one red.",
        "2.jpg,\tÄ",
    ]
    write(folder / "flickr30k_test_karpathy.txt", "\r\n".join(lines) + "\r\n")
    images(folder, "1.jpg", "flickr30k-images/2.jpg")
    assert pairs(read("flickr30k-clip-benchmark", tmp_path), folder) == [
        ("flickr30k-images/2.jpg", " Two dogs, one red."),
        ("flickr30k-images/2.jpg", "see 1.jpg,2.jpg"),
        ("flickr30k-images/2.jpg", "\tÄ"),
        ("1.jpg", ",a comma first\u2028 "),
        ("1.jpg", ""),
        ("1.jpg", " Two dogs, one red."),
    ]
    write(folder / "flickr30k_test_karpathy.txt", "image,caption\n1.jpg,a\n2.png,b\n")
    with pytest.raises(BenchmarkError, match=r"line 3 of .* is not NAME\.jpg,caption: '2\.png,b'"):
        read("flickr30k-clip-benchmark", tmp_path)


def test_the_whole_of_flickr30k_is_read_from_its_token_file(tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    file = folder / "results_20130124.token"
    write(file, "1.jpg#0\t Two # dogs\tbark .\n1.jpg#1\t\n\n2.jpg#0\tKäfer\n2.jpg#1\tKäfer\n1.jpg#2\tlate\n")
    images(folder, "flickr30k-images/1.jpg", "flickr30k-images/2.jpg")
    one, two = "flickr30k-images/1.jpg", "flickr30k-images/2.jpg"
    expected = [(one, " Two # dogs\tbark ."), (one, ""), (one, "late"), (two, "Käfer"), (two, "Käfer")]
    assert pairs(read("flickr30k-whole", tmp_path), folder) == expected
    write(file, "1.jpg#0\ta\n1.jpg b\n")
    with pytest.raises(BenchmarkError, match=r"line 2 of .* is not NAME#number"):
        read("flickr30k-whole", tmp_path)
    write(file, "")
    with pytest.raises(BenchmarkError, match="is empty"):
        read("flickr30k-whole", tmp_path)


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ("coco_karpathy_test.json", ("val2014/COCO_val2014_1.jpg", "val2014/COCO_val2014_2.jpg")),
        ("annotations/coco_karpathy_test.json", ("images/COCO_val2014_1.jpg", "images/val2014/COCO_val2014_2.jpg")),
        ("test.json", ("COCO_val2014_1.jpg", "images/COCO_val2014_2.jpg")),
    ],
)
def test_coco_of_salesforce_is_two_benchmarks(file: str, places: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    rows = [
        {"image": "val2014/COCO_val2014_2.jpg", "caption": SEVEN},
        {"image": "val2014/COCO_val2014_1.jpg", "caption": SEVEN[:6]},
    ]
    write(folder / file, rows)
    images(folder, *places)
    first, second = places[1], places[0]
    five = [(first, text) for text in SEVEN[:5]] + [(second, text) for text in SEVEN[:5]]
    every = [(first, text) for text in SEVEN] + [(second, text) for text in SEVEN[:6]]
    assert pairs(read("coco-salesforce", tmp_path), folder) == five
    assert pairs(read("coco-salesforce-all", tmp_path), folder) == every


def test_coco_val2017_takes_the_first_five_in_the_order_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    content: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}, {"id": 42, "file_name": "000000000042.jpg"}],
        "annotations": [
            {"image_id": 42, "id": 9, "caption": "  last id first\n"},
            *({"image_id": 139, "id": 10 + number, "caption": text} for number, text in enumerate(SEVEN)),
            {"image_id": 42, "id": 1, "caption": "two dogs"},
        ],
    }
    file = write(folder / "annotations/captions_val2017.json", content)
    images(folder, "val2017/000000000139.jpg", "images/val2017/000000000042.jpg")
    one, two = "val2017/000000000139.jpg", "images/val2017/000000000042.jpg"
    expected = [(one, text) for text in SEVEN[:5]] + [(two, "  last id first\n"), (two, "two dogs")]
    data = read("coco-val2017", tmp_path)
    assert pairs(data, folder) == expected
    content["annotations"].append({"image_id": 1, "id": 3, "caption": "whose?"})
    write(file, content)
    with pytest.raises(BenchmarkError, match=r"1 annotations of .* have an image_id that no image has: 10 \(1\)"):
        read("coco-val2017", tmp_path)
    content["images"].append({"id": 42, "file_name": "another.jpg"})
    write(file, content)
    with pytest.raises(BenchmarkError, match=r"image 3 of .* has the id 42 of an image before it"):
        read("coco-val2017", tmp_path)
