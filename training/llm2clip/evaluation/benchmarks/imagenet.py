"""ImageNet-1k and the sets with its classes: V2, A, R, O, Sketch; ObjectNet, which has 113 of them."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, CroppedFiles, list_tar
from llm2clip.evaluation.benchmarks.image_folder import image_files, labelled, read_class_folders
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset, template_set
from llm2clip.evaluation.reading import read_json, read_lines

TAR, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# Which WordNet id has which number in TRUTH: `n02119789 1 kit_fox`.
NUMBERS = ("imagenet2012_mapclsloc.txt", "map_clsloc.txt")
WNID = re.compile(r"n\d{8}")
# The images of ObjectNet have a red border, in pixels.
BORDER = 2


def read_imagenet(folder: Path, with_train: bool = False) -> ClassificationData:
    """Read the validation images of ImageNet-1k in any of three layouts; the label is the rank of the WordNet id.

    `val/nXXXXXXXX/*.JPEG`; or flat in `val/`, with the id at the end of a file's name (as on the Hub), with TRUTH and
    one of NUMBERS, or with DEVKIT; or TAR with DEVKIT.
    """
    classes = imagenet_classes()
    wnids, names = list(classes), list(classes.values())
    is_unpacked = (folder / "val").is_dir()
    images = image_files(folder / "val") if is_unpacked else []
    if images:
        data = labelled(images, _ranks(_wnids_of(folder, images), len(images)), names)
    elif is_unpacked:
        data = labelled(*read_class_folders("ImageNet-1k", folder / "val", wnids), names)
    else:
        # The files of the tar are in no order: their names are, by which the rows of TRUTH go.
        files = sorted(list_tar(folder / TAR))
        labels = _ranks(_wnids_of_devkit(folder), len(files))
        data = labelled(ArchivedImages([part for _, part in files]), labels, names)
        data.images.names = [name for name, _ in files]
    if with_train:
        data.train = labelled(*read_class_folders("ImageNet-1k", folder / "train", wnids), names)
    return data


def _wnids_of(folder: Path, images: Sequence[Path]) -> list[str]:
    """Find the WordNet ids of flat images: in their names, in TRUTH and one of NUMBERS, or in DEVKIT."""
    ids = [path.stem.rpartition("_")[2] for path in images]
    if all(map(WNID.fullmatch, ids)):
        return ids
    numbers = next((folder / name for name in NUMBERS if (folder / name).is_file()), None)
    if numbers is None or not (folder / TRUTH).is_file():
        return _wnids_of_devkit(folder)
    known = {number: wnid for wnid, number, *_ in map(str.split, read_lines(numbers))}
    return [known.get(line.strip(), line.strip()) for line in read_lines(folder / TRUTH)]


def _wnids_of_devkit(folder: Path) -> list[str]:
    """Read the labels from DEVKIT. Its table of classes is a MATLAB file, which holds no code."""
    if not (folder / DEVKIT).is_file():
        raise BenchmarkError(
            f"the images of ImageNet-1k have no labels: give them in folders val/nXXXXXXXX, or put {TRUTH} and "
            f"{NUMBERS[0]}, or {DEVKIT}, into {folder}."
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{DEVKIT} needs scipy: pip install scipy.") from error
    with tarfile.open(folder / DEVKIT) as archive:
        content = {Path(member.name).name: member for member in archive if member.isfile()}
        parts = [archive.extractfile(content[name]) for name in ("meta.mat", TRUTH)]
        table, truth = (part.read() if part is not None else b"" for part in parts)
    synsets = loadmat(io.BytesIO(table), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [wnids[int(number)] for number in truth.split()]


def _ranks(wnids: Sequence[str], images: int) -> list[int]:
    if len(wnids) != images:
        raise BenchmarkError(f"{TRUTH} has {len(wnids):,} labels for {images:,} images.")
    ranks = {wnid: rank for rank, wnid in enumerate(imagenet_classes())}
    unknown = sorted(set(wnids).difference(ranks))
    if unknown:
        raise BenchmarkError(f"labels that are no class of ImageNet-1k: {', '.join(unknown[:5])}.")
    return [ranks[wnid] for wnid in wnids]


def read_v2(folder: Path) -> ClassificationData:
    """Read ImageNet-V2, whose folders are named after labels, `0` to `999`: sorted as text, 10 comes before 2."""
    names = list(imagenet_classes().values())
    return labelled(*read_class_folders("ImageNet-V2", folder, [str(label) for label in range(len(names))]), names)


def read_wnid_folders(folder: Path, title: str, subset: str | None = None) -> ClassificationData:
    """Read a set with a folder for each WordNet id; a subset has its own 200 classes in their order."""
    classes = imagenet_classes()
    wnids = list(classes) if subset is None else imagenet_subset(subset)
    # Archives have other folders and files beside: a README, or `sketch/` around all.
    return labelled(*read_class_folders(title, folder, wnids), [classes[wnid] for wnid in wnids])


def read_objectnet(folder: Path, border: int = 0) -> ClassificationData:
    """Read the images of the classes that ImageNet has too, under ObjectNet's names in lower case.

    Args:
        border: Pixels that are cut off on each side. A red border of 2 pixels marks the images as test images.
    """
    mappings = folder / "mappings"
    labels, shared = (
        read_json(mappings / name) for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
    )
    classes = sorted(name for name, label in labels.items() if label in shared)
    paths, numbers = read_class_folders("ObjectNet", folder / "images", classes, ignored=labels)
    data = labelled(paths, numbers, [labels[name].lower() for name in classes])
    if border:
        data.images = BenchmarkImages(
            CroppedFiles(paths, border), [f"{path.parent.name}/{path.name}" for path in paths]
        )
    return data


LICENSE = "non-commercial research (ImageNet's terms)"
PROTOCOL = "zero-shot-classification"


def _v2(variant: str, name: str, note: str) -> Benchmark:
    folder = f"imagenetv2-{variant}-format-val"
    return Benchmark(
        name=name, title=f"ImageNet-V2 ({variant})", groups=("classification",), folder=folder, needs=("./0/*.jpeg",),
        files=f"{folder}/0 to {folder}/999/*.jpeg", counts={"images": 10000, "classes": 1000}, license="MIT",
        source="huggingface.co/datasets/vaishaal/ImageNetV2", read=read_v2, protocol=PROTOCOL, note=note,
    )  # fmt: skip


def _folders(name: str, title: str, folder: str, images: int, subset: str | None, note: str, source: str) -> Benchmark:
    wnid = (imagenet_subset(subset) if subset else list(imagenet_classes()))[0]
    return Benchmark(
        name=name, title=title, groups=("classification",), folder=folder, needs=(f"./{wnid}/*",),
        files=f"{folder}/nXXXXXXXX/*", counts={"images": images, "classes": 200 if subset else 1000}, license=LICENSE,
        source=source, read=partial(read_wnid_folders, title=title, subset=subset), protocol=PROTOCOL, note=note,
    )  # fmt: skip


def _objectnet(name: str, title: str, border: int, note: str) -> Benchmark:
    return Benchmark(
        name=name, title=title, groups=("classification",), folder="objectnet-1.0",
        needs=("mappings/objectnet_to_imagenet_1k.json",),
        files="objectnet-1.0/images/FOLDER/*.png and objectnet-1.0/mappings/*.json.",
        counts={"images": 18574, "classes": 113}, license="CC BY 4.0; not to be trained on", source="objectnet.dev",
        read=partial(read_objectnet, border=border), protocol="zero-shot-classification", note=note,
    )  # fmt: skip


IMAGENET = Benchmark(
    name="imagenet-1k", title="ImageNet-1k", groups=("classification", "paper"), folder="imagenet",
    needs=(("val/n01440764", "val/ILSVRC2012_val_00000001*", TAR),),
    files=f"val/nXXXXXXXX/*.JPEG; or val/*.JPEG with {TRUTH} and {NUMBERS[0]}; or {TAR} with {DEVKIT}; "
    "train/nXXXXXXXX/*.JPEG for probes.",
    counts={"images": 50000, "classes": 1000}, license=LICENSE,
    source="image-net.org, or huggingface.co/datasets/ILSVRC/imagenet-1k", read=read_imagenet, protocol=PROTOCOL,
    note="OpenAI's 80 templates. Two names stand for two classes each, so that images of missile and sunglasses tie.",
    read_train=partial(read_imagenet, with_train=True), train_needs=("train",),
)  # fmt: skip
SINGLE = replace(
    IMAGENET,
    name="imagenet-1k-single",
    title="ImageNet-1k, one template",
    options={"templates": tuple(template_set("paper"))},
    note='"a photo of the {c}", which the paper prints beside the 80 templates.',
    read_train=None,
)
BENCHMARKS = [
    IMAGENET,
    SINGLE,
    _v2("matched-frequency", "imagenet-v2", "The variant that is meant by ImageNet-V2."),
    _v2("threshold0.7", "imagenet-v2-threshold", "Easier than the usual variant."),
    _v2("top-images", "imagenet-v2-top", "Easier still."),
    _folders(
        "imagenet-a", "ImageNet-A", "imagenet-a", 7500, "a", "200-way.", "github.com/hendrycks/natural-adv-examples"
    ),
    _folders("imagenet-r", "ImageNet-R", "imagenet-r", 30000, "r", "200-way.", "github.com/hendrycks/imagenet-r"),
    _folders(
        "imagenet-o",
        "ImageNet-O",
        "imagenet-o",
        2000,
        "o",
        "200-way accuracy, as CLIP_benchmark and CLIP papers print; the set was made for AUPR of outliers.",
        "github.com/hendrycks/natural-adv-examples",
    ),
    _folders("imagenet-sketch", "ImageNet-Sketch", "sketch", 50889, None, "", "github.com/HaohanWang/ImageNet-Sketch"),
    _objectnet("objectnet", "ObjectNet", 0, "With the red border of 2 pixels, as CLIP_benchmark."),
    _objectnet(
        "objectnet-cropped", "ObjectNet, cropped", BORDER, "Without the red border, as its authors: other numbers."
    ),
]
