"""Long captions, one of each image: ShareGPT4V-1k, Urban1k, DOCCI, IIW, and the Chinese sets of FG-CLIP 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.caption_files import captions_benchmark, tab_lines
from llm2clip.evaluation.benchmarks.files import captions_data
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.reading import read_json_lines, read_json_rows, read_text, stream_json_objects, text_field
from llm2clip.utils.logs import shortened

SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
# What LLM2CLIP derives from it.
SHAREGPT4V_DERIVED = "validation_1k.json"
SHAREGPT4V_ROWS = 1000
# `sam/images/sa_1.jpg` in the file; the archives of SA-1B have no folder of their own.
SHAREGPT4V_PLACES = ("sam", "sam/images", "images", ".")
DOCCI = "docci_descriptions.jsonlines"
# Set of descriptions of IIW and folder of its images, in the order of LoTLIP's reader.
IIW_SETS = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def read_sharegpt4v(folder: Path) -> RetrievalData:
    """Read the rows in the order of the file, which is that of the test set; of the whole file only the first 1,000.

    Images may lie at their paths, without the folders `images` or `sam`, or anywhere below the folder.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    is_whole = (folder / SHAREGPT4V).is_file()
    if is_whole:
        rows = list(islice(stream_json_objects(folder / SHAREGPT4V), SHAREGPT4V_ROWS))
    else:
        rows = read_json_rows(folder / SHAREGPT4V_DERIVED)
    captions = []
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {SHAREGPT4V if is_whole else SHAREGPT4V_DERIVED}"
        caption = _answer(row, place) if is_whole else text_field(row, "caption", place)
        captions.append((text_field(row, "image", place), [caption]))
    return captions_data("ShareGPT4V-1k", folder, captions, SHAREGPT4V_PLACES)


def _answer(row: dict, place: str) -> str:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise BenchmarkError(f"{place} has no second turn in 'conversations'.")
    return text_field(turns[1], "value", f"the second turn of {place}")


def read_urban1k(folder: Path) -> RetrievalData:
    """Pair `caption/i.txt` with `image/i.jpg`; a caption is the first line of its file, also if it is empty.

    Raises:
        BenchmarkError: A caption has no image, an image no caption, or a file has another name.
    """
    captions, pictures = _by_number(folder / "caption", ".txt"), _by_number(folder / "image", ".jpg")
    without = [f"{number}.txt" for number in sorted(pictures.keys() - captions.keys())]
    if without:
        raise BenchmarkError(f"Urban1k lacks captions of images: {shortened(without)}.")
    rows = [
        (folder / "image" / f"{number}.jpg", read_text(captions[number]).split("\n")[0]) for number in sorted(captions)
    ]
    return _one_caption("Urban1k", rows)


def _by_number(folder: Path, suffix: str) -> dict[int, Path]:
    files = [path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith(".")]
    odd = sorted(path.name for path in files if not path.stem.isdecimal())
    if odd:
        raise BenchmarkError(f"the files in {folder} are numbered, but there are {shortened(odd)}.")
    return {int(path.stem): path for path in files}


def read_docci(folder: Path) -> RetrievalData:
    """Read the rows of the split `test`, in the order of the file.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = []
    for number, row in enumerate(read_json_lines(folder / DOCCI), 1):
        place = f"row {number} of {DOCCI}"
        if text_field(row, "split", place) == "test":
            image, caption = (text_field(row, name, place) for name in ("image_file", "description"))
            rows.append((folder / "images" / image, caption))
    return _one_caption("DOCCI", rows)


def read_iiw(folder: Path) -> RetrievalData:
    """Read the three sets that people described, one after another, in the order of their files.

    An image has the name of the field `image` or `image/key`, with or without `.jpg`.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = []
    for name, place in IIW_SETS.items():
        for number, row in enumerate(read_json_lines(folder / name / "data.jsonl"), 1):
            where = f"row {number} of {name}"
            image = text_field(row, "image" if "image" in row else "image/key", where)
            path = folder / place / (image if image.endswith(".jpg") else f"{image}.jpg")
            rows.append((path, text_field(row, "IIW", where)))
    return _one_caption("IIW", rows)


def _one_caption(title: str, rows: Sequence[tuple[Path, str]]) -> RetrievalData:
    images = BenchmarkImages([image for image, _ in rows]).require_files(title)
    return RetrievalData.from_captions(images, [[caption] for _, caption in rows])


_long = partial(Benchmark, protocol="retrieval")


def _of_fg_clip2(title: str, file: str, images: str) -> Benchmark:
    return captions_benchmark(
        name=title.lower(), title=title, groups=("long", "languages"), folder=title, names=(file,), read=tab_lines,
        places=("images",), files=f"{file}; {images}", counts={},
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
    _of_fg_clip2("LIT-CN", "image_caption_long_cn.txt", "its images, at the paths in the file"),
    _of_fg_clip2("DCI-CN", "image_caption_trans.txt", "the images of DCI, in images or at the paths in the file"),
    _of_fg_clip2("DOCCI-CN", "image_caption_trans.txt", "the images of DOCCI, in images or at the paths in the file"),
]  # fmt: skip
