"""Readers of images, captions and recipes."""

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
from llm2clip.data import CaptionSource, decode_image, distinct_captions
from llm2clip.data.shard_rows import count_rows, parquet_rows
from llm2clip.data.tars import count_tar_rows, list_tar, tar_rows
from llm2clip.data.transforms import decode_tensor
from llm2clip.encoders.embed import EmbedConfig
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from tests.modeling_llm2clip.awkward_images import awkward_images
from tests.tars import write_tar

RECIPES: dict[str, type] = {
    "mntp": MNTPRecipe, "stage1_paper": Stage1Recipe, "embed_paper": EmbedConfig, "stage2_small_gpu": Stage2Recipe,
}  # fmt: skip
SETTINGS = tuple({field.name for settings in RECIPES.values() for field in dataclasses.fields(settings)})
# Calls of readers.
Doors = tuple[Callable[[], Any], ...]
CAPTIONS = [f"a picture of thing {number}" for number in range(12)]


def only_file(folder: Path) -> Path:
    """Return the file of an input that has one."""
    (path,) = (path for path in folder.iterdir() if path.is_file())
    return path


def make_images(folder: Path) -> None:
    for name, content in awkward_images().items():
        (folder / name).mkdir()
        (folder / name / name).write_bytes(content)


def read_image(folder: Path) -> Doors:
    path = only_file(folder)
    return (
        lambda: decode_image(path.read_bytes(), path.name),
        lambda: decode_tensor(path.read_bytes(), path.name),
        lambda: decode_image(str(path), path.name),
    )


def _rows() -> list[tuple[str, bytes]]:
    images = list(awkward_images().values())
    files = []
    for number, caption in enumerate(CAPTIONS):
        fields = json.dumps({"caption": caption, "more": {"captions": [caption, "x"]}}).encode()
        files += [(f"{number}.png", images[number]), (f"{number}.txt", caption.encode()), (f"{number}.json", fields)]
    return files


def make_tars(folder: Path) -> None:
    write_tar(folder / "plain/a.tar", _rows())
    for mode in ("gz", "bz2", "xz"):
        write_tar(folder / mode / "a.tar", _rows(), f"w:{mode}")
    with tarfile.open(_new(folder / "pax/a.tar"), "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (name, content) in enumerate(_rows()):
            member = tarfile.TarInfo(f"{'long' * 40}/{name}" if number % 5 == 0 else name)
            member.size, member.mtime, member.pax_headers = len(content), 1.5, {"comment": "é" * 9}
            archive.addfile(member, io.BytesIO(content))


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path


def read_tar(folder: Path) -> Doors:
    path = only_file(folder)
    columns = ("png", "txt", "json")

    return (
        lambda: list(tar_rows(str(path), columns)),
        lambda: list(tar_rows(str(path), columns, count_tar_rows(str(path)) // 2)),
        lambda: [part.read() for _, part in list_tar(path)],
    )


def make_tables(folder: Path) -> None:
    images = [{"bytes": content, "path": None} for content in list(awkward_images().values())[: len(CAPTIONS)]]
    plain = {"caption": CAPTIONS, "number": list(range(len(CAPTIONS)))}
    table = datasets.Dataset.from_dict({**plain, "image": images})
    for name in ("parquet", "jsonl", "jsonl.gz", "json", "csv", "csv.gz", "tar", "arrow"):
        (folder / name).mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(folder / "parquet/a.parquet")
    lines = "".join(json.dumps({"caption": text, "more": [text]}) + "\n" for text in CAPTIONS).encode()
    rows = ("caption,number\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(CAPTIONS))).encode()
    (folder / "jsonl/a.jsonl").write_bytes(lines)
    (folder / "jsonl.gz/a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "json/a.json").write_text(json.dumps([{"caption": text} for text in CAPTIONS]))
    (folder / "csv/a.csv").write_bytes(rows)
    (folder / "csv.gz/a.csv.gz").write_bytes(gzip.compress(rows, mtime=0))
    write_tar(folder / "tar/a.tar", _rows())
    datasets.Dataset.from_dict(plain).save_to_disk(folder / "saved")
    (folder / "arrow/a.arrow").write_bytes((folder / "saved/data-00000-of-00001.arrow").read_bytes())


def read_table(folder: Path) -> Doors:
    cache = folder.with_name("cache")
    shutil.rmtree(cache, ignore_errors=True)
    datasets.config.HF_DATASETS_CACHE = cache
    files = [path for path in folder.iterdir() if path.is_file()]
    path = folder if len(files) > 1 else files[0]
    column = "json.caption" if path.suffix == ".tar" else "caption"

    def captions(streaming: bool) -> None:
        distinct_captions(CaptionSource(str(path), caption_columns=[column], streaming=streaming), False)

    def images() -> None:
        check_data(CaptionSource(str(path), caption_columns=[column]), num_workers=0)

    def by_number() -> None:
        list(parquet_rows(str(path), ["caption", "image"], 0, count_rows(str(path))))

    doors = (lambda: captions(False), lambda: captions(True))
    has_images = path.suffix in (".parquet", ".tar")
    return (*doors, *([images] if has_images else []), *([by_number] if path.suffix == ".parquet" else []))


def make_recipes(folder: Path) -> None:
    for name in RECIPES:
        (folder / name).mkdir()
        fields = load_recipe(find_recipe(name)) | {"output_dir": "run"}
        if name != "embed_paper":
            fields["use_cpu"] = True
        (folder / name / f"{name}.yaml").write_text(yaml.safe_dump(fields))


def read_recipe(folder: Path) -> Doors:
    path = only_file(folder)
    return (lambda: build_config(RECIPES[path.stem], load_recipe(path), str(path)),)
