"""Samples of sets of captions in their exact file formats: what is read from them, and broken ones; by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm2clip.evaluation.benchmarks.long_captions import SHAREGPT4V
from tests.llm2clip.evaluation.benchmarks.samples import BOM, karpathy_row, lines

# Captions of one image: blanks, newlines, repeats and empty ones stay as they are.
SEVEN = [" Zwei Hunde.", "two dogs\n", "Two dogs", "TWO DOGS", "two dogs", "", "dogs, again"]
PHOTOS, IMAGES = "flickr30k/flickr30k-images", "flickr30k/images"


def salesforce(captions: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    return [{"image": image, "caption": texts} for image, texts in captions.items()]


Captions = dict[str, list[str]]

FLICKR30K = salesforce({"flickr30k-images/1.jpg": SEVEN, "flickr30k-images/2.jpg": ["two dogs", "Käfer "]})
COCO = salesforce({"val2014/COCO_val2014_2.jpg": SEVEN, "val2014/COCO_val2014_1.jpg": SEVEN[:6]})
KARPATHY_FLICKR30K = [
    karpathy_row("1.jpg", "train", ["not this"], 0),
    karpathy_row("2.jpg", "test", SEVEN[:2], 5),
    karpathy_row("3.jpg", "val", ["nor this"], 10),
    karpathy_row("1.jpg", "test", ["Ein Käfer.", " Zwei Hunde."], 15),
]
KARPATHY = [
    karpathy_row("COCO_train2014_000000000009.jpg", "restval", ["no"], 1, filepath="train2014", cocoid=9),
    karpathy_row("COCO_val2014_000000000042.jpg", "test", SEVEN, 300, filepath="val2014", cocoid=42),
    karpathy_row("COCO_val2014_000000000041.jpg", "test", SEVEN[:6], 200, filepath="val2014", cocoid=41),
]
VAL2017: dict[str, list[dict[str, Any]]] = {
    "images": [{"id": 139, "file_name": "000000000139.jpg"}, {"id": 42, "file_name": "000000000042.jpg"}],
    "annotations": [
        {"image_id": 42, "id": 9, "caption": "  last id first\n"},
        *({"image_id": 139, "id": 10 + number, "caption": text} for number, text in enumerate(SEVEN)),
        {"image_id": 42, "id": 1, "caption": "two dogs"},
    ],
}
COMMA_LINES = [
    BOM + "image,caption", "2.jpg, Two dogs, one red.", "2.jpg,see 1.jpg,2.jpg", "1.jpg,,a comma first\u2028 ", "",
    "1.jpg,", "1.jpg, Two dogs, one red.", "2.jpg,\tÄ",
]  # fmt: skip
TOKENS = "1.jpg#0\t Two # dogs\tbark .\n1.jpg#1\t\n\n2.jpg#0\tKäfer\n2.jpg#1\tKäfer\n1.jpg#2\tlate\n"
CN_ONE, CN_TWO = "COCO_val2014_000000000042", "COCO_train2014_000000000009"
CN_VERSION = "COCO-CN/coco-cn-version1805v1.1"
CN_WRITTEN = f"{CN_TWO}#0\t两只狗\nCOCO_val2014_000000000001#0\ttrain\n{CN_ONE}#0\t 狗\n{CN_ONE}#1\t两只狗\n"
CN_TRANSLATED = [f"{CN_ONE}#zhm#{number} 狗 {number}" for number in range(6)]
CN_TRANSLATED += [f"{CN_TWO}#zhb#0 a machine's", f"{CN_TWO}#zhm#0  狗", f"{CN_TWO}#zhm#1\t狗 0"]


def sharegpt4v_row(number: int, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": f"sa_{number}", "image": f"sam/images/sa_{number}.jpg", "conversations": turns}


SHAREGPT4V_ROWS = [sharegpt4v_row(9, " In a café,\n\ntwo. "), sharegpt4v_row(3, "Same."), sharegpt4v_row(7, "Same.")]
URBAN1K = {1: f"{BOM}A café. \n", 592: "", 2: "Two\u2028lines.\r\nMore.", 10: "Ten."}


def docci_row(key: str) -> dict[str, str]:
    split = key.rsplit("_", 1)[0]
    return {"example_id": key, "split": split, "image_file": f"{key}.jpg", "description": f" {key}.\n é"}


DOCCI = ("train_00000", "test_00001", "qual_dev_00000", "test_00000", "qual_test_00000")


def mask(quality: int, label: str, caption: str) -> dict[str, Any]:
    corner = {"x": 0, "y": 0}
    bounds = {"topLeft": corner, "bottomRight": corner}
    return {"mask_quality": quality, "label": label, "caption": caption, "bounds": bounds, "parent": -1}


DCI_MASKS = {"0": mask(0, "the grate", "bent."), "7": mask(2, "", "unusable"), "3": mask(1, "a box", "blurred")}
DCI_FOLDER = "densely_captioned_images"
DCI = {
    f"{DCI_FOLDER}/splits.json": {"train": ["2-data.json"], "valid": [], "test": ["113029-data.json"]},
    f"{DCI_FOLDER}/annotations/113029-data.json": {
        "image": "sa_1545038.jpg", "short_caption": "A balcony. ", "extra_caption": "Ruined,\nin Beirut é.",
        "mask_data": DCI_MASKS,
    },
    f"{DCI_FOLDER}/annotations/2-data.json": {
        "image": "sa_2.jpg", "short_caption": "A mast.", "extra_caption": "", "mask_data": {"1": mask(2, "x", "y")},
    },
}  # fmt: skip
DCI_PARTS = "The following can also be seen in the image:\nthe grate: bent.\na box"
IIW = {
    "imageinwords/IIW-400/data.jsonl": lines({"image/key": "aar_test_04600", "IIW": "A café.\u00a0\n\n\nBlue. "}),
    "imageinwords/DOCCI_Test/data.jsonl": lines({"image": "test_00731", "IIW": "Towels."}),
    "imageinwords/DCI_Test/data.jsonl": lines({"image": "sa_1.jpg", "ex_id": "1-data.json", "IIW": "A plaza."}),
}
CHINESE = {
    "lit-cn": ("LIT-CN", "image_caption_long_cn.txt"),
    "dci-cn": ("DCI-CN", "image_caption_trans.txt"),
    "docci-cn": ("DOCCI-CN", "image_caption_trans.txt"),
}


def flickr30k(file: str, first: str, second: str) -> tuple[str, dict[str, Any], Captions]:
    """Salesforce's file under any name, with the two images anywhere."""
    expected = {f"flickr30k/{first}": SEVEN, f"flickr30k/{second}": ["two dogs", "Käfer "]}
    return "flickr30k", {f"flickr30k/{file}": FLICKR30K}, expected


def coco(name: str, file: str, first: str, second: str) -> tuple[str, dict[str, Any], Captions]:
    """Salesforce's file of COCO, of which one benchmark takes five captions and the other all."""
    count = 5 if name == "coco-salesforce" else 7
    return name, {f"coco/{file}": COCO}, {f"coco/{first}": SEVEN[:count], f"coco/{second}": SEVEN[:6][:count]}


def dci(name: str, first: str, second: str) -> tuple[str, dict[str, Any], Captions]:
    """The captions of the two images of DCI in one of its forms."""
    return name, DCI, {f"{DCI_FOLDER}/photos/sa_2.jpg": [first], f"{DCI_FOLDER}/photos/sa_1545038.jpg": [second]}


# Name, files by their path below the folder of all sets, and the captions of each image, which lies at the path.
SAMPLES: list[tuple[str, dict[str, Any], Captions]] = [
    flickr30k("flickr30k_test.json", "flickr30k-images/1.jpg", "images/2.jpg"),
    flickr30k("annotations/test.json", "flickr30k_images/flickr30k_images/1.jpg", "2.jpg"),
    (
        "flickr30k-karpathy", {"flickr30k/dataset_flickr30k.json": {"images": KARPATHY_FLICKR30K}},
        {f"{IMAGES}/2.jpg": SEVEN[:2], f"{PHOTOS}/1.jpg": ["Ein Käfer.", " Zwei Hunde."]},
    ),
    (
        "flickr30k-clip-benchmark", {"flickr30k/flickr30k_test_karpathy.txt": "\r\n".join(COMMA_LINES) + "\r\n"},
        {
            f"{PHOTOS}/2.jpg": [" Two dogs, one red.", "see 1.jpg,2.jpg", "\tÄ"],
            "flickr30k/1.jpg": [",a comma first\u2028 ", "", " Two dogs, one red."],
        },
    ),
    (
        "flickr30k-whole", {"flickr30k/results_20130124.token": TOKENS},
        {f"{PHOTOS}/1.jpg": [" Two # dogs\tbark .", "", "late"], f"{PHOTOS}/2.jpg": ["Käfer", "Käfer"]},
    ),
    coco("coco-salesforce", "coco_karpathy_test.json", "val2014/COCO_val2014_2.jpg", "COCO_val2014_1.jpg"),
    coco(
        "coco-salesforce-all", "annotations/coco_karpathy_test.json",
        "images/val2014/COCO_val2014_2.jpg", "images/COCO_val2014_1.jpg",
    ),
    (
        "coco-karpathy", {"coco/dataset_coco.json": {"images": KARPATHY, "dataset": "coco"}},
        {
            "coco/val2014/COCO_val2014_000000000042.jpg": SEVEN[:5],
            "coco/images/COCO_val2014_000000000041.jpg": SEVEN[:5],
        },
    ),
    (
        "coco-val2017", {"coco/annotations/captions_val2017.json": VAL2017},
        {
            "coco/val2017/000000000139.jpg": SEVEN[:5],
            "coco/images/val2017/000000000042.jpg": ["  last id first\n", "two dogs"],
        },
    ),
    (
        "flickr30k-cn-clip-benchmark",
        {"flickr30k/flickr30k_test_zh.txt": "image,caption\n1.jpg,一个人,两只狗。三只猫\n2.jpg, 狗\n1.jpg, 狗\n"},
        {f"{PHOTOS}/1.jpg": ["一个人,两只狗。三只猫", " 狗"], f"{PHOTOS}/2.jpg": [" 狗"]},
    ),
    *(
        (
            "flickr30k-cna", {file: "1001#0\t狗 #1\n1001#1\t 狗\n7#0\t狗 #1\n"},
            {f"{PHOTOS}/1001.jpg": ["狗 #1", " 狗"], f"{PHOTOS}/7.jpg": ["狗 #1"]},
        )
        for file in ("Flickr30k-CNA/test/flickr30k_cn_test.txt", "flickr30k_cna/flickr30k_cna_test.txt")
    ),
    (
        "coco-cn",
        {
            f"{CN_VERSION}/imageid.human-written-caption.txt": CN_WRITTEN,
            f"{CN_VERSION}/coco-cn_test.txt": f"{CN_ONE}\n{CN_TWO}\n",
        },
        {f"COCO-CN/val2014/{CN_ONE}.jpg": [" 狗", "两只狗"], f"COCO-CN/train2014/{CN_TWO}.jpg": ["两只狗"]},
    ),
    (
        "coco-cn-translated", {"COCO-CN/imageid.manually-translated-caption.txt": "\n".join(CN_TRANSLATED)},
        {
            f"coco/val2014/{CN_ONE}.jpg": [f"狗 {number}" for number in range(5)],
            f"coco/train2014/{CN_TWO}.jpg": [" 狗", "狗 0"],
        },
    ),
    (
        "sharegpt4v-1k",
        # Nothing of a large file is read after the last row that is needed.
        {f"sharegpt4v/{SHAREGPT4V}": BOM + json.dumps([*SHAREGPT4V_ROWS, sharegpt4v_row(1, "No.")])[:-30]},
        {
            "sharegpt4v/sam/images/sa_9.jpg": [" In a café,\n\ntwo. "], "sharegpt4v/sam/sa_3.jpg": ["Same."],
            "sharegpt4v/sa_000000/sa_7.jpg": ["Same."],
        },
    ),
    (
        "sharegpt4v-1k", {"sharegpt4v/validation_1k.json": [{"caption": "é\n", "image": "sam/images/sa_2.jpg"}]},
        {"sharegpt4v/sa_2.jpg": ["é\n"]},
    ),
    (
        "urban1k", {f"Urban1k/caption/{number}.txt": text for number, text in URBAN1K.items()},
        {
            "Urban1k/image/1.jpg": ["A café. "], "Urban1k/image/2.jpg": ["Two\u2028lines."],
            "Urban1k/image/10.jpg": ["Ten."], "Urban1k/image/592.jpg": [""],
        },
    ),
    (
        "docci", {"docci/docci_descriptions.jsonlines": lines(*map(docci_row, DOCCI))},
        {f"docci/images/{key}.jpg": [f" {key}.\n é"] for key in ("test_00001", "test_00000")},
    ),
    dci("dci", "A mast.\n", "A balcony. \nRuined,\nin Beirut é."),
    dci("dci-extra", "", "Ruined,\nin Beirut é."),
    dci("dci-short", "A mast.", "A balcony. "),
    dci("dci-complete", "A mast.\n", f"A balcony. \nRuined,\nin Beirut é.\n{DCI_PARTS}"),
    (
        "iiw", IIW,
        {
            "imageinwords/docci/test_00731.jpg": ["Towels."],
            "imageinwords/docci_aar/aar_test_04600.jpg": ["A café.\u00a0\n\n\nBlue. "],
            "imageinwords/dci/sa_1.jpg": ["A plaza."],
        },
    ),
    *(
        (
            name, {f"{folder}/{file}": f"{BOM}a/1.jpg\t 一只猫,\t两只狗。\n2.jpg\t\n"},
            {f"{folder}/a/1.jpg": [" 一只猫,\t两只狗。"], f"{folder}/images/2.jpg": [""]},
        )
        for name, (folder, file) in CHINESE.items()
    ),
]  # fmt: skip

ANNOTATIONS = [*VAL2017["annotations"], {"image_id": 1, "caption": "whose?"}]


def chinese_clip(image: str, **text: Any) -> dict[str, str]:
    return {"Flickr30k-CN/test_imgs.tsv": image, "Flickr30k-CN/test_texts.jsonl": lines(text)}


# Name, files below the folder of the set itself, and the message.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("flickr30k", {"flickr30k_test.json": b'[{"image": "1.jpg", "cap'}, r"test\.json is not valid JSON, or is cut"),
    ("flickr30k", {"flickr30k_test.json": [{"caption": ["a"]}]}, r"Flickr30k: a file in .* \(KeyError: 'image'\)"),
    ("flickr30k", {"flickr30k_test.json": [{"image": "1.jpg", "caption": "a dog"}]}, "is 'a dog', and no list"),
    ("flickr30k", {"flickr30k_test.json": [{"image": "1.jpg", "caption": ["a", None]}], "flickr30k-images/1.jpg": ""},
     r"1\.jpg has None in place of a text"),
    ("coco-karpathy", {"dataset_coco.json": {"images": KARPATHY[:1]}}, "the file of captions below .* is empty"),
    ("coco-val2017", {"captions_val2017.json": {**VAL2017, "annotations": ANNOTATIONS}}, r"\(KeyError: 1\)"),
    ("coco-val2017", {"captions_val2017.json": {**VAL2017, "images": 2 * VAL2017["images"]}}, "the same id"),
    ("flickr30k-whole", {"results_20130124.token": "1.jpg#0\ta\n1.jpg b\n"}, r"has the line '1\.jpg b'"),
    ("flickr30k-clip-benchmark", {"flickr30k_test_karpathy.txt": "image,caption\n2.png,b\n"}, "not enough values"),
    ("flickr30k-whole", {"results_20130124.token": ""}, "is empty"),
    ("coco-cn", {"imageid.human-written-caption.txt": CN_WRITTEN, "coco-cn_test.txt": f"{CN_ONE}\nCOCO_val2014_7\n"},
     r"COCO_val2014_7\.jpg"),
    ("flickr30k-cn", chinese_clip("7\taaaa*", text="b", image_ids=[7]), "Flickr30k-CN: a file in .*base64"),
    ("flickr30k-cn", chinese_clip("7\taaaa", text="b", image_ids=[12]), "KeyError: '12'"),
    ("dci", {"splits.json": {"train": ["1.json"]}, "annotations/1.json": {"image": "sa_1.jpg"}}, "'short_caption'"),
    ("lit-cn", {"image_caption_long_cn.txt": "a/1.jpg\t猫\n2.jpg 狗\n"}, "LIT-CN: a file in .* is damaged"),
    ("xtd10", {"test_image_names.txt": "a.jpg\nb.jpg\n", "MIC/test_1kcaptions_de.txt": "Hund\n"}, "XTD10: a file in"),
    ("cra", {"coco_karpathy_test.json": salesforce({"val2014/7.jpg": ["alone"]})}, "CRA, COCO 5k: a file in"),
]  # fmt: skip
