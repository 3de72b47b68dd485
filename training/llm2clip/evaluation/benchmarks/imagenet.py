"""ImageNet-1k and the sets with its classes: V2, A, R, O and Sketch."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, list_tar
from llm2clip.evaluation.benchmarks.image_folder import image_files, labelled, read_class_folders
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset, template_set
from llm2clip.evaluation.reading import read_lines

TAR, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# Which WordNet id has which number in TRUTH: `n02119789 1 kit_fox`.
NUMBERS = ("imagenet2012_mapclsloc.txt", "map_clsloc.txt")
WNID = re.compile(r"n\d{8}")


def read_imagenet(folder: Path, with_train: bool = False) -> ClassificationData:
    """Read the validation images of ImageNet-1k in any of three layouts; the label is the rank of the WordNet id.

    `val/nXXXXXXXX/*.JPEG`; or flat in `val/`, with the id at the end of the file's name (as on the Hub) or with TRUTH
    and one of NUMBERS; or TAR with DEVKIT.

    Raises:
        BenchmarkError: The labels of flat images cannot be found, or are not as many.
    """
    classes = imagenet_classes()
    wnids = list(classes)
    images = image_files(folder / "val") if (folder / "val").is_dir() else []
    if images:
        found: Iterable[str] = _wnids_of_names(images) or _wnids_of_numbers(folder, len(images))
        data = labelled(images, _ranks(found, wnids), list(classes.values()))
    elif (folder / "val").is_dir():
        data = labelled(*read_class_folders("ImageNet-1k", folder / "val", wnids), list(classes.values()))
    else:
        data = _read_tar(folder, wnids, list(classes.values()))
    if with_train:
        data.train = labelled(*read_class_folders("ImageNet-1k", folder / "train", wnids), list(classes.values()))
    return data


def _read_tar(folder: Path, wnids: Sequence[str], names: Sequence[str]) -> ClassificationData:
    """Read TAR, whose files are in no order: their names are, by which the rows of TRUTH go."""
    files = sorted(list_tar(folder / TAR))
    data = labelled(
        ArchivedImages([part for _, part in files]), _ranks(_wnids_of_devkit(folder, len(files)), wnids), names
    )
    data.images.names = [name for name, _ in files]
    return data


def _wnids_of_names(images: Sequence[Path]) -> list[str] | None:
    ids = [path.stem.rpartition("_")[2] for path in images]
    return ids if all(WNID.fullmatch(wnid) for wnid in ids) else None


def _wnids_of_numbers(folder: Path, images: int) -> list[str]:
    numbers = next((folder / name for name in NUMBERS if (folder / name).is_file()), None)
    if numbers is None or not (folder / TRUTH).is_file():
        if (folder / DEVKIT).is_file():
            return _wnids_of_devkit(folder, images)
        raise BenchmarkError(
            f"the images in {folder / 'val'} have no labels: give them in folders val/nXXXXXXXX, or put {TRUTH} and "
            f"{NUMBERS[0]}, or {DEVKIT}, into {folder}."
        )
    ids = {number: wnid for wnid, number, *_ in map(str.split, read_lines(numbers))}
    return _by_truth([line.strip() for line in read_lines(folder / TRUTH)], ids, images)


def _wnids_of_devkit(folder: Path, images: int) -> list[str]:
    """Read the labels from DEVKIT. Its table of classes is a MATLAB file, which holds no code."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{DEVKIT} needs scipy: pip install scipy.") from error
    if not (folder / DEVKIT).is_file():
        raise BenchmarkError(f"{folder} has {TAR}, but not {DEVKIT}, which has its labels.")
    with tarfile.open(folder / DEVKIT) as archive:
        content = {Path(member.name).name: member for member in archive if member.isfile()}
        parts = [archive.extractfile(content[name]) for name in ("meta.mat", TRUTH)]
        table, truth = (part.read() if part is not None else b"" for part in parts)
    synsets = loadmat(io.BytesIO(table), squeeze_me=True)["synsets"]
    ids = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    return _by_truth(truth.decode().split(), ids, images)


def _by_truth(numbers: Sequence[str], ids: dict[str, str], images: int) -> list[str]:
    if len(numbers) != images:
        raise BenchmarkError(f"{TRUTH} has {len(numbers):,} labels for {images:,} images.")
    return [ids.get(number, number) for number in numbers]


def _ranks(found: Iterable[str], wnids: Sequence[str]) -> list[int]:
    rank = {wnid: number for number, wnid in enumerate(wnids)}
    found = list(found)
    unknown = sorted(set(found).difference(rank))
    if unknown:
        raise BenchmarkError(f"labels that are no class of ImageNet-1k: {', '.join(unknown[:5])}.")
    return [rank[wnid] for wnid in found]


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
]
