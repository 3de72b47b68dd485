"""Samples of sets of classification in their exact file formats: what is read from them, and broken ones; by hand."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset
from tests.llm2clip.evaluation.benchmarks.samples import picture, write
from tests.pictures import encode

Files = dict[str, Any]
WNIDS = list(imagenet_classes())


class Sample(NamedTuple):
    """Files below the folder of all sets; labels and shades of the images in their order; names of some classes."""

    name: str
    files: Files
    labels: list[int]
    shades: list[int]
    names: dict[int, str]


def idx(array: np.ndarray) -> bytes:
    """An array as Fashion-MNIST has it."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def fashion_mnist(part: str, labels: list[int], shades: list[int]) -> Files:
    images = np.array(shades, dtype=np.uint8)[:, None, None].repeat(2, axis=1).repeat(3, axis=2)
    arrays = {"images-idx3": images, "labels-idx1": np.array(labels, dtype=np.uint8)}
    return {f"fashion-mnist/{part}-{name}-ubyte.gz": gzip.compress(idx(array)) for name, array in arrays.items()}


def pictures(folder: str, **shades: int) -> Files:
    return {f"{folder}/{name}": picture(shade) for name, shade in shades.items()}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar that begins with a folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def bordered(shade: int) -> bytes:
    """A picture of ObjectNet: a red border of two pixels."""
    image = Image.new("RGB", (9, 7), (255, 0, 0))
    image.paste((shade, shade, shade), (2, 2, 7, 5))
    return encode(image)


def webdataset(*tars: dict[str, bytes], split: str = "test") -> Files:
    """A part of a set as CLIP_benchmark's converter writes it."""
    files: Files = {f"{split}/{number}.tar": tar_of(members) for number, members in enumerate(tars)}
    return files | {f"{split}/nshards.txt": f"{len(tars)}\n", "classnames.txt": "a\nb\nlast one \n"}


def webdataset_tar(number: int) -> dict[str, bytes]:
    """One image with its label, which one of the tars has before it."""
    suffix = ("webp", "png", "jpg", "jpeg")[number % 4]
    image = (f"s{number:07d}.{suffix}", picture(10 * number, "webp" if suffix == "webp" else "png"))
    label = (f"s{number:07d}.cls", str(number % 3).encode())
    return dict([label, image] if number == 4 else [image, label])


# ImageNet knows two of the three; their order is another by label, and in the file, than by folder.
OBJECTNET_LABELS = {"cd_case": "CD case", "bath_towel": "Bath towel", "alarm_clock": "Zz Clock"}
OBJECTNET = {
    "objectnet-1.0/mappings/folder_to_objectnet_label.json": OBJECTNET_LABELS,
    "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json": {
        "Bath towel": "bath towel", "Zz Clock": "analog clock; digital clock",
    },
    **{f"objectnet-1.0/images/{name}/one.png": bordered(shade) for shade, name in enumerate(OBJECTNET_LABELS)},
}  # fmt: skip
V2 = "imagenetv2-matched-frequency-format-val"
FASHION_NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


def subset(letter: str) -> Sample:
    ids = imagenet_subset(letter)
    files = {f"imagenet-{letter}/{ids[label]}/image.jpg": picture(label) for label in (199, 1, 0)}
    return Sample(f"imagenet-{letter}", files | {f"imagenet-{letter}/README.txt": "about"}, [0, 1, 199], [0, 1, 199],
                  {1: imagenet_classes()[ids[1]]})  # fmt: skip


SAMPLES = {
    "idx.gz": Sample("fashion-mnist", fashion_mnist("t10k", [9, 0], [5, 10]), [9, 0], [5, 10],
                     dict(enumerate(FASHION_NAMES.split(",")))),
    # The label is the rank of the id among all 1,000, whichever folders are there.
    "imagenet": Sample(
        "imagenet-1k",
        {f"imagenet/val/{WNIDS[label]}/{number}.JPEG": picture(number)
         for label, number in ((999, 0), (2, 1), (0, 7))},
        [0, 2, 999], [7, 1, 0], {0: "tench", 1: "goldfish", 2: "great white shark"},
    ),
    # Sorted as text, 10 would come before 2.
    "imagenet-v2": Sample(
        "imagenet-v2", {f"{V2}/{label}/image.jpeg": picture(label % 256) for label in (0, 2, 10, 999)},
        [0, 2, 10, 999], [0, 2, 10, 999 % 256], {10: "brambling"},
    ),
    **{f"imagenet-{letter}": subset(letter) for letter in "aro"},
    "imagenet-sketch": Sample(
        "imagenet-sketch", pictures("sketch", **{f"{WNIDS[0]}/s.JPEG": 4, f"{WNIDS[998]}/s.JPEG": 5}),
        [0, 998], [4, 5], {998: imagenet_classes()[WNIDS[998]]},
    ),
    # Shared classes only, under their names in lower case.
    "objectnet": Sample("objectnet", OBJECTNET, [0, 1], [255, 255], {0: "zz clock", 1: "bath towel"}),
    "objectnet-cropped": Sample("objectnet-cropped", OBJECTNET, [0, 1], [2, 1], {}),
    # Eleven tars, so that 10 sorted as text comes before 2.
    "webdataset": Sample(
        "webdataset", webdataset(*map(webdataset_tar, range(11))), [number % 3 for number in range(11)],
        [10 * number for number in range(11)], {0: "a", 2: "last one"},
    ),
    # A folder and a name up to the first dot are a sample; of several images the one that CLIP_benchmark would take.
    "webdataset-names": Sample(
        "webdataset",
        webdataset({
            "a/s.PNG": picture(1), "a/s.meta.json": b"{}", "a/s.cls": b"0", "b/s.jpg": picture(2),
            "b/s.webp": picture(3, "webp"), "b/s.png": picture(4), "b/s.CLS": b"2",
        }),
        [0, 2], [1, 3], {},
    ),
    "folders": Sample(
        "imagefolder",
        pictures("test", **{"sea_lion/b.png": 2, "sea_lion/a.JPG": 1, "Zebra/x.webp": 3, ".cache/x.png": 9,
                            "Zebra/.hidden.png": 9}) | {"test/Zebra/notes.txt": "no image"},
        [0, 1, 1], [3, 1, 2], {0: "Zebra", 1: "sea lion"},
    ),
    "folders-by-number": Sample(
        "imagefolder", pictures("test", **{f"{number}/image.png": number for number in (10, 2, 1)}),
        [0, 1, 2], [1, 2, 10], {0: "1", 1: "2", 2: "10"},
    ),
    "folders-not-all-numbers": Sample(
        "imagefolder", pictures("test", **{"10/image.png": 10, "2/image.png": 2, "cat/image.png": 3}),
        [0, 1, 2], [10, 2, 3], {0: "10", 1: "2", 2: "cat"},
    ),
    "folders-own-names": Sample(
        "imagefolder", pictures("test", **{"a/1.png": 1, "b/1.png": 2}) | {"classnames.txt": "Äpfel\nBirnen\n"},
        [0, 1], [1, 2], {0: "Äpfel", 1: "Birnen"},
    ),
}  # fmt: skip

# What a probe trains on: further files beside a sample, labels of the train images.
TRAIN = {
    "idx.gz": (fashion_mnist("train", [1, 2, 3], [1, 2, 3]), [1, 2, 3]),
    "imagenet": (
        pictures("imagenet/train", **{f"{WNIDS[0]}/n.JPEG": 5, f"{WNIDS[5]}/n.JPEG": 5}), [0, 5],
    ),
    "webdataset": (webdataset({"s0.png": picture(1), "s0.cls": b"2"}, split="train"), [2]),
    "folders-own-names": (pictures("train", **{"a/1.png": 7, "b/1.png": 8}), [0, 1]),
}  # fmt: skip

GZ = "fashion-mnist/t10k-labels-idx1-ubyte.gz"
# Other content of some files of a sample, and the message.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("idx.gz", {GZ: SAMPLES["idx.gz"].files[GZ][:-6]}, r"Fashion-MNIST: a file in .* is damaged"),
    ("idx.gz", {GZ: gzip.compress(idx(np.zeros(3, dtype=np.uint8))[:-1])}, r"Fashion-MNIST: a file in .* is damaged"),
    ("imagenet-v2", {f"{V2}/1000/image.jpeg": picture(1)}, "folders of no class: 1000"),
    ("imagenet-a", {f"imagenet-a/{WNIDS[0]}/image.jpg": picture(1)}, "has 1 folders of no class"),
    ("webdataset", {"test/nshards.txt": "many\n"}, "webdataset: a file in"),
    ("webdataset", webdataset({"s1.cls": b"1"}), r"sample s1 of .*0.tar needs an image \(webp, png, jpg, jpeg\)"),
    ("webdataset", {"test/0.tar": b"no tar" * 200}, "is not an uncompressed tar, or is damaged"),
    ("webdataset", {"dataset_type.txt": "multilabel\n"}, "several labels an image"),
    ("webdataset", {"dataset_type.txt": "retrieval\n"}, "is a set of retrieval, not of classification"),
    ("folders-own-names", {"classnames.txt": "Äpfel\n"}, "has 1 names for 2 classes"),
]  # fmt: skip


def write_files(data: Path, files: Files) -> None:
    """Write files below a folder."""
    for place, content in files.items():
        write(data / place, content)
