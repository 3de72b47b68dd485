"""Samples of sets of captions in their exact file formats: what is read from them, and broken ones; by hand."""

from __future__ import annotations

import json
from typing import Any

from llm2clip.evaluation.benchmarks.captions import SHAREGPT4V
from tests.llm2clip.evaluation.benchmarks.samples import BOM, lines, xm3600_row

# Captions of one image: blanks, newlines, repeats and empty ones stay as they are.
SEVEN = [" Zwei Hunde.", "two dogs\n", "Two dogs", "TWO DOGS", "two dogs", "", "dogs, again"]
PHOTOS = "flickr30k/flickr30k-images"

Captions = dict[str, list[str]]

TOKENS = "1.jpg#0\t Two # dogs\tbark .\n1.jpg#1\t\n\n2.jpg#0\tKäfer\n2.jpg#1\tKäfer\n1.jpg#2\tlate\n"
CN_ONE, CN_TWO = "COCO_val2014_000000000042", "COCO_train2014_000000000009"
CN_VERSION = "coco-cn-version1805v1.1"
CN_TRANSLATED = [f"{CN_ONE}#zhm#{number} 狗 {number}" for number in range(6)]
CN_TRANSLATED += [f"{CN_TWO}#zhb#0 a machine's", f"{CN_TWO}#zhm#0  狗", f"{CN_TWO}#zhm#1\t狗 0"]


def sharegpt4v_row(number: int, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": f"sa_{number}", "image": f"sam/images/sa_{number}.jpg", "conversations": turns}


SHAREGPT4V_ROWS = [sharegpt4v_row(9, " In a café,\n\ntwo. "), sharegpt4v_row(3, "Same."), sharegpt4v_row(7, "Same.")]
URBAN1K = {1: f"{BOM}A café. \n", 592: "", 2: "Two\u2028lines.\r\nMore.", 10: "Ten."}


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


def dci(name: str, first: str, second: str) -> tuple[str, dict[str, Any], Captions]:
    """The captions of the two images of DCI in one of its forms."""
    return name, DCI, {f"{DCI_FOLDER}/photos/sa_2.jpg": [first], f"{DCI_FOLDER}/photos/sa_1545038.jpg": [second]}


# Name, files by their path below the folder of all sets, and the captions of each image, which lies at the path.
SAMPLES: list[tuple[str, dict[str, Any], Captions]] = [
    (
        "flickr30k-whole", {"flickr30k/results_20130124.token": TOKENS},
        {f"{PHOTOS}/1.jpg": [" Two # dogs\tbark .", "", "late"], f"{PHOTOS}/2.jpg": ["Käfer", "Käfer"]},
    ),
    (
        "flickr30k-cna",
        {"flickr30k/Flickr30k-CNA/test/flickr30k_cn_test.txt": "1001#0\t狗 #1\n1001#1\t 狗\n7#0\t狗 #1\n"},
        {f"{PHOTOS}/1001.jpg": ["狗 #1", " 狗"], f"{PHOTOS}/7.jpg": ["狗 #1"]},
    ),
    (
        "coco-cn-translated",
        {f"coco/{CN_VERSION}/imageid.manually-translated-caption.txt": "\n".join(CN_TRANSLATED)},
        {
            f"coco/val2014/{CN_ONE}.jpg": [f"狗 {number}" for number in range(5)],
            f"coco/train2014/{CN_TWO}.jpg": [" 狗", "狗 0"],
        },
    ),
    (
        "sharegpt4v-1k",
        {f"sharegpt4v/{SHAREGPT4V}": BOM + json.dumps(SHAREGPT4V_ROWS)},
        {
            "sharegpt4v/sam/images/sa_9.jpg": [" In a café,\n\ntwo. "], "sharegpt4v/sam/images/sa_3.jpg": ["Same."],
            "sharegpt4v/sam/images/sa_7.jpg": ["Same."],
        },
    ),
    (
        "urban1k", {f"Urban1k/caption/{number}.txt": text for number, text in URBAN1K.items()},
        {
            "Urban1k/image/1.jpg": ["A café. "], "Urban1k/image/2.jpg": ["Two\u2028lines."],
            "Urban1k/image/10.jpg": ["Ten."], "Urban1k/image/592.jpg": [""],
        },
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
            {f"{folder}/a/1.jpg": [" 一只猫,\t两只狗。"], f"{folder}/2.jpg": [""]},
        )
        for name, (folder, file) in CHINESE.items()
    ),
]  # fmt: skip


def chinese_clip(image: str, **text: Any) -> dict[str, str]:
    return {"test_imgs.tsv": image, "test_texts.jsonl": lines(text)}


# Name, files below the folder of the set itself, and the message.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("sharegpt4v-1k", {SHAREGPT4V: b'[{"image": "1.jpg", "conv'}, "item 0 of .* is cut short"),
    ("sharegpt4v-1k", {SHAREGPT4V: [{"image": "1.jpg"}]}, r"ShareGPT4V-1k: .* \(KeyError: 'conversations'\)"),
    ("xm3600", {"captions.jsonl": lines(xm3600_row("a", de=["ein", None]))[:-1], "images/a.jpg": ""},
     r"images/a\.jpg has None in place of a text"),
    ("flickr30k-whole", {"results_20130124.token": "1.jpg#0\ta\n1.jpg b\n"}, r"has the line '1\.jpg b'"),
    ("flickr30k-whole", {"results_20130124.token": ""}, "is empty"),
    ("flickr30k-cn", chinese_clip("7\taaaa*", text="b", image_ids=[7]), "Flickr30k-CN: a file in .*base64"),
    ("flickr30k-cn", chinese_clip("7\taaaa", text="b", image_ids=[12]), "KeyError: '12'"),
    ("dci", {"splits.json": {"train": ["1.json"]}, "annotations/1.json": {"image": "sa_1.jpg"}}, "'short_caption'"),
    ("lit-cn", {"image_caption_long_cn.txt": "a/1.jpg\t猫\n2.jpg 狗\n"}, "LIT-CN: a file in .* is damaged"),
    ("xtd10", {"XTD10/test_image_names.txt": "a.jpg\nb.jpg\n", "MIC/test_1kcaptions_de.txt": "Hund\n"}, "XTD10: "),
]  # fmt: skip
