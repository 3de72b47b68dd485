"""Good files of images, captions and recipes, and what reads them."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import yaml

from llm2clip.checks.check_data import check_data
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, EvalTransform, decode_image, distinct_captions
from llm2clip.data.parquet import parquet_rows
from llm2clip.data.tars import count_tar_rows, tar_rows
from llm2clip.data.transforms import decode_tensor
from llm2clip.encoders.embed import EmbedConfig
from llm2clip.evaluation.benchmarks.encoded_images import list_tar
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from tests.builders import tiny
from tests.modeling_llm2clip import awkward_images
from tests.tars import write_tar

RECIPES: dict[str, type] = {
    "mntp": MNTPRecipe, "stage1_paper": Stage1Recipe, "embed_paper": EmbedConfig, "stage2_small_gpu": Stage2Recipe,
}  # fmt: skip
SETTINGS = tuple({field.name for settings in RECIPES.values() for field in dataclasses.fields(settings)})
Readers = tuple[Callable[[], Any], ...]
CAPTIONS = [f"a picture of thing {number}" for number in range(12)]
PROCESSOR = tiny.processor(awkward_images.SIDE)


def _only_file(folder: Path) -> Path:
    (path,) = (path for path in folder.iterdir() if path.is_file())
    return path


def make_images(folder: Path) -> None:
    for name, content in awkward_images.awkward_images().items():
        (folder / name).mkdir()
        (folder / name / "image").write_bytes(content)


def read_image(folder: Path) -> Readers:
    path = folder / "image"
    content = path.read_bytes()

    def exact() -> None:
        """Every door to the exact decoder has the same answer."""
        refusals = [
            _refusal(lambda: decode_image(content, path.name)),
            _refusal(lambda: decode_image(str(path), path.name)),
            _refusal(lambda: decode_image({"bytes": content, "path": None}, path.name)),
            _refusal(lambda: EvalTransform(PROCESSOR.image_processor).decode(content, path.name)),
            # A processor knows no names.
            _refusal(lambda: PROCESSOR(images=content, return_tensors="pt")),
        ]
        assert len({error is None for error in refusals}) == 1, refusals
        if (error := refusals[0]) is not None:
            raise error

    def fast() -> None:
        """This one takes JPEGs apart by other code, which may accept other damages."""
        assert decode_tensor(content, path.name).shape[0] == 3

    return exact, fast


def _refusal(door: Callable[[], Any]) -> DamagedImageError | None:
    try:
        door()
    except DamagedImageError as error:
        return error
    return None


def _rows() -> list[tuple[str, bytes]]:
    images = list(awkward_images.awkward_images().values())
    files = []
    for number, caption in enumerate(CAPTIONS):
        fields = json.dumps({"caption": caption, "more": {"captions": [caption, "x"]}}).encode()
        files += [(f"{number}.png", images[number]), (f"{number}.txt", caption.encode()), (f"{number}.json", fields)]
    return files


def make_tars(folder: Path) -> None:
    write_tar(folder / "plain/a.tar", _rows())
    write_tar(folder / "gz/a.tar", _rows(), "w:gz")
    (folder / "pax").mkdir()
    with tarfile.open(folder / "pax/a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (name, content) in enumerate(_rows()):
            member = tarfile.TarInfo(f"{'long' * 40}/{name}" if number % 5 == 0 else name)
            member.size, member.mtime, member.pax_headers = len(content), 1.5, {"comment": "é" * 9}
            archive.addfile(member, io.BytesIO(content))


def read_tar(folder: Path) -> Readers:
    path = _only_file(folder)
    columns = ("png", "txt", "json")

    def second_half() -> list[Any]:
        count = count_tar_rows(str(path))
        return list(tar_rows(str(path), columns, range(count // 2, count)))

    return (
        lambda: list(tar_rows(str(path), columns)),
        second_half,
        lambda: [part.read() for _, part in list_tar(path)],
    )


def make_tables(folder: Path) -> None:
    images = [{"bytes": content, "path": None} for content in list(awkward_images.awkward_images().values())[:12]]
    table = datasets.Dataset.from_dict({"caption": CAPTIONS, "number": list(range(12)), "image": images})
    table.remove_columns("image").save_to_disk(folder / "saved")
    lines = "".join(json.dumps({"caption": text, "more": [text]}) + "\n" for text in CAPTIONS).encode()
    rows = ("caption,number\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(CAPTIONS))).encode()
    for name, content in {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.json": json.dumps([{"caption": text} for text in CAPTIONS]).encode(),
        "a.csv": rows,
        "a.csv.gz": gzip.compress(rows, mtime=0),
        "a.arrow": (folder / "saved/data-00000-of-00001.arrow").read_bytes(),
    }.items():
        (folder / name).mkdir()
        (folder / name / name).write_bytes(content)
    (folder / "a.parquet").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(folder / "a.parquet/a.parquet")
    write_tar(folder / "a.tar/a.tar", _rows())


def nothing_cached(folder: Path) -> None:
    """Forget what `datasets` has read, and checksums that were computed before; new ones go beside a folder."""
    cache = folder.with_name("cache")
    shutil.rmtree(cache, ignore_errors=True)
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.config.DOWNLOADED_DATASETS_PATH = datasets.config.EXTRACTED_DATASETS_PATH = cache / "downloads"


def read_table(folder: Path) -> Readers:
    nothing_cached(folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    path = folder if len(files) > 1 else files[0]
    column = "json.caption" if path.suffix == ".tar" else "caption"

    def captions(streaming: bool) -> None:
        distinct_captions(CaptionSource(str(path), caption_columns=[column], streaming=streaming), False)

    def images() -> None:
        check_data(CaptionSource(str(path), caption_columns=[column]), num_workers=0)

    def by_number() -> None:
        list(parquet_rows(str(path), ["caption", "image"]))

    if path == folder:  # what `save_to_disk` wrote is not streamed
        return (lambda: captions(False),)
    more = {".parquet": (images, by_number), ".tar": (images,)}
    return (lambda: captions(False), lambda: captions(True), *more.get(path.suffix, ()))


def make_recipes(folder: Path) -> None:
    for name in RECIPES:
        (folder / name).mkdir()
        fields = load_recipe(find_recipe(name)) | {"output_dir": "run"}
        if name != "embed_paper":
            fields["use_cpu"] = True
        (folder / name / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        # It is YAML too, and of JSON files the values are changed.
        (folder / f"{name}.json").mkdir()
        (folder / f"{name}.json" / f"{name}.json").write_text(json.dumps(fields))


def read_recipe(folder: Path) -> Readers:
    path = _only_file(folder)
    return (lambda: build_config(RECIPES[path.stem], load_recipe(path), str(path)),)
