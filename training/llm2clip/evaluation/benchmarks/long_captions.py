"""Long captions, one of each image: ShareGPT4V-1k, Urban1k, DOCCI, DCI, IIW, and the Chinese sets of FG-CLIP 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.caption_files import captions_benchmark, tab_lines
from llm2clip.evaluation.benchmarks.files import captions_data
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.reading import first_json_objects, read_json, read_json_lines, read_text

SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
# What LLM2CLIP derives from it.
SHAREGPT4V_DERIVED = "validation_1k.json"
SHAREGPT4V_ROWS = 1000
# `sam/images/sa_1.jpg` in the file; the archives of SA-1B have no folder of their own.
SHAREGPT4V_PLACES = ("sam", "sam/images", "images", ".")
DOCCI = "docci_descriptions.jsonlines"
UNUSABLE, LOW_QUALITY = 2, 1
PARTS = "The following can also be seen in the image:"
Row = Mapping[str, Any]
# Set of descriptions of IIW and folder of its images, in the order of LoTLIP's reader.
IIW_SETS = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def read_sharegpt4v(folder: Path) -> RetrievalData:
    """Read the rows in the order of the file, which is that of the test set; of the whole file only the first 1,000.

    Images may lie at their paths, without the folders `images` or `sam`, or anywhere below the folder.
    """
    if (folder / SHAREGPT4V).is_file():
        rows = first_json_objects(folder / SHAREGPT4V, SHAREGPT4V_ROWS)
        captions = [(row["image"], [row["conversations"][1]["value"]]) for row in rows]
    else:
        captions = [(row["image"], [row["caption"]]) for row in read_json(folder / SHAREGPT4V_DERIVED)]
    return captions_data("ShareGPT4V-1k", folder, captions, SHAREGPT4V_PLACES)


def read_urban1k(folder: Path) -> RetrievalData:
    """Pair `caption/i.txt` with `image/i.jpg`; a caption is the first line of its file, also if it is empty."""
    captions = {int(path.stem): read_text(path).split("\n")[0] for path in (folder / "caption").glob("[!.]*.txt")}
    rows = [(folder / "image" / f"{number}.jpg", caption) for number, caption in sorted(captions.items())]
    return _one_caption("Urban1k", rows)


def read_docci(folder: Path) -> RetrievalData:
    """Read the rows of the split `test`, in the order of the file."""
    rows = [row for row in read_json_lines(folder / DOCCI) if row["split"] == "test"]
    return _one_caption("DOCCI", [(folder / "images" / row["image_file"], row["description"]) for row in rows])


def read_iiw(folder: Path) -> RetrievalData:
    """Read the three sets that people described, one after another, in the order of their files.

    An image has the name of the field `image` or `image/key`, with or without `.jpg`.
    """
    rows = []
    for name, images in IIW_SETS.items():
        for row in read_json_lines(folder / name / "data.jsonl"):
            image = row["image"] if "image" in row else row["image/key"]
            rows.append((folder / images / f"{image.removesuffix('.jpg')}.jpg", row["IIW"]))
    return _one_caption("IIW", rows)


# There is no agreement on what the caption of an image of DCI is, so each form has a name.
dci_short, dci_extra = itemgetter("short_caption"), itemgetter("extra_caption")


def dci_extended(row: Row) -> str:
    """Both, one per line, as in FLAIR, FLAME and LoTLIP, and `get_extended_caption` of DCI."""
    return f"{row['short_caption']}\n{row['extra_caption']}"


def dci_complete(row: Row) -> str:
    """Both and all parts, one per line, as in `get_formatted_complete_description` of DCI.

    Of a part of low quality the label alone is taken, of an unusable one nothing.
    """
    lines = [
        mask["label"] if mask["mask_quality"] == LOW_QUALITY else f"{mask['label']}: {mask['caption']}"
        for mask in row["mask_data"].values()
        if mask["mask_quality"] != UNUSABLE
    ]
    return "\n".join([dci_extended(row), *([PARTS, *lines] if lines else [])])


def read_dci(caption: Callable[[Row], str], folder: Path) -> RetrievalData:
    """Read the images of all splits, in the order of `splits.json`; `caption` makes the caption of a row."""
    names = [name for split in read_json(folder / "splits.json").values() for name in split]
    rows = [read_json(folder / "annotations" / name) for name in names]
    return _one_caption("DCI", [(folder / "photos" / row["image"], caption(row)) for row in rows])


def _one_caption(title: str, rows: Sequence[tuple[Path, str]]) -> RetrievalData:
    images = BenchmarkImages([image for image, _ in rows]).require_files(title)
    return RetrievalData.from_captions(images, [[caption] for _, caption in rows])


_long = partial(Benchmark, protocol="retrieval")


def _dci(name: str, title: str, caption: Callable[[Row], str], note: str) -> Benchmark:
    return Benchmark(
        name=name, title=title, groups=("long",), folder="densely_captioned_images",
        needs=("splits.json", "annotations"), files="splits.json, annotations/NAME.json, photos/sa_N.jpg",
        counts={"images": 7805, "texts": 7805}, license="CC BY-NC 4.0 (captions), SA-1B research license (images)",
        source="The archive dci.tar.gz of DCI; the images are in sa_000138.tar of SA-1B.",
        read=partial(read_dci, caption), protocol="retrieval", note=note,
    )  # fmt: skip


def _of_fg_clip2(title: str, file: str, images: str) -> Benchmark:
    return captions_benchmark(
        name=title.lower(), title=title, groups=("long", "languages"), folder=title, names=(file,), read=tab_lines,
        folders=("images",), files=f"{file}; {images}", counts={},
        license="Apache 2.0 as stated by FG-CLIP 2 (captions); of the images see their source",
        source=f"The data set {title} of FG-CLIP 2 on the Hub.",
        note="No published counts are checked: its paper gives none for the files.",
    )  # fmt: skip


BENCHMARKS = [
    _long(
        name="sharegpt4v-1k", title="ShareGPT4V-1k", groups=("long", "paper"), folder="sharegpt4v",
        needs=((SHAREGPT4V, SHAREGPT4V_DERIVED),),
        files=f"{SHAREGPT4V} or LLM2CLIP's {SHAREGPT4V_DERIVED}; "
              "images sam/images/sa_N.jpg, also without these folders",
        counts={"images": SHAREGPT4V_ROWS, "texts": SHAREGPT4V_ROWS},
        license="CC BY-NC 4.0 (captions), SA-1B research license (images)",
        source="The captions are in the Hub data set ShareGPT4V, the images in the first archives of SA-1B.",
        read=read_sharegpt4v,
        note="Baselines differ between papers by up to 15 points, with truncation of long captions; nearly saturated.",
    ),
    _long(
        name="urban1k", title="Urban1k", groups=("long", "paper"), folder="Urban1k", needs=("caption/1.txt", "image"),
        files="image/1.jpg to 1000.jpg, caption/1.txt to 1000.txt", counts={"images": 1000, "texts": 1000},
        license="not stated (captions), Visual Genome CC BY 4.0 (images)",
        source="The archive Urban1k.zip of Long-CLIP, in its data set on the Hub.", read=read_urban1k,
        note="Caption 592 is empty in one distribution; it stays a query.",
    ),
    _long(
        name="docci", title="DOCCI", groups=("long", "paper"), folder="docci", needs=(DOCCI,),
        files=f"{DOCCI}; images/test_00000.jpg and so on", counts={"images": 5000, "texts": 5000}, license="CC BY 4.0",
        source="The descriptions and docci_images.tar.gz from the DOCCI page of Google.", read=read_docci,
        note="The test split has 5,000 images; the text of LLM2CLIP says 1.5K.",
    ),
    _long(
        name="iiw", title="IIW", groups=("long",), folder="imageinwords",
        needs=tuple(f"{name}/data.jsonl" for name in IIW_SETS),
        files="DOCCI_Test, IIW-400 and DCI_Test with data.jsonl; images in docci, docci_aar and dci",
        counts={"images": 612, "texts": 612}, license="CC BY 4.0 (descriptions), of DOCCI and SA-1B (images)",
        source="The descriptions are in the repository imageinwords of Google, the images in DOCCI and DCI.",
        read=read_iiw,
    ),
    _dci("dci", "DCI", dci_extended, "Short caption, newline, description: the form of FLAIR, FLAME and LoTLIP."),
    _dci("dci-extra", "DCI (description)", dci_extra, "The description alone: the form of FG-CLIP 2."),
    _dci("dci-short", "DCI (short)", dci_short, "The short caption alone."),
    _dci("dci-complete", "DCI (all parts)", dci_complete, "Both captions and those of all parts of the image."),
    _of_fg_clip2("LIT-CN", "image_caption_long_cn.txt", "its images, at the paths in the file"),
    _of_fg_clip2("DCI-CN", "image_caption_trans.txt", "the images of DCI, in images or at the paths in the file"),
    _of_fg_clip2("DOCCI-CN", "image_caption_trans.txt", "the images of DOCCI, in images or at the paths in the file"),
]  # fmt: skip
