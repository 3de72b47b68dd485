"""Your own images and captions, or pairs of captions, as a benchmark."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.data import CaptionSource, PairSource
from llm2clip.data.table_identity import data_revision
from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.data import CaptionPairData, Positives, RetrievalData


@dataclass(frozen=True, kw_only=True)
class OwnData(Benchmark):
    """A benchmark of your own data.

    Attributes:
        fields: Those of its source.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)

    def find(self, data: Path) -> Path:
        """Return the place of the data, which is not below the folder of the published sets."""
        return Path(self.fields["path"])

    def load(self, folder: Path) -> Any:
        """Read the data, whose errors name the column, row or file."""
        return self.read(folder)

    def describe(self, folder: Path) -> dict[str, Any]:
        """Return what a result says of the data: the fields of its source, and its revision."""
        return {**self.fields, "revision": data_revision(self.fields)}


def is_own_data(name: str) -> bool:
    """Tell whether a name is that of no benchmark, but the path, URL or Hub id of data, or a source in JSON."""
    path = Path(name)
    if path.suffix in (".py", ".yaml") and not name.startswith("{"):  # a file of benchmarks
        return False
    return name.startswith("{") or "/" in name or path.suffix != "" or path.exists() or glob.has_magic(name)


def plain_path(name: str) -> str:
    """Write a path without `./` and a slash at its end, so that results have one name for it; others stay."""
    return str(Path(name)) if Path(name).exists() else name


def own_benchmark(
    path: str | Mapping[str, Any], task: str, positives: Positives, require_files: bool = False, **fields: Any
) -> OwnData:
    """Make a benchmark of your own data.

    Args:
        path: A path, URL or Hub id; or a mapping with the fields of [`CaptionSource`] or [`PairSource`].
        task: `retrieval` between images and captions, or `caption_retrieval` between two captions of one image.
        positives, require_files: See [`RetrievalData.from_source`].
        fields: Fields of the source, those that are not None.

    Raises:
        ValueError: A split other than `train` is given of a single file, or a field does not exist.
    """
    given: dict[str, Any] = {"path": path} if isinstance(path, str) else dict(path)
    given = {name: value for name, value in {**given, **fields}.items() if value is not None}
    given["path"] = plain_path(given["path"])
    split, is_file = given.get("split"), Path(given["path"]).is_file() or glob.has_magic(given["path"])
    # `datasets` calls the rows of a file `train`, and so does check-data.
    if split not in (None, "train") and is_file and "[" not in split and isinstance(path, str):
        raise ValueError(
            f"split is {split}, but {given['path']} is a file, whose only split is train: leave it out, or give a "
            "slice of its rows, such as train[:100]."
        )
    given.setdefault("split", "train" if is_file else "test")
    is_retrieval = task == "retrieval" and "anchor_column" not in given
    options: dict[str, str]
    if is_retrieval:
        source = CaptionSource.from_dict(given)
        options = {"positives": positives}
    else:
        pairs = PairSource.from_dict(given)
        options = {"pair": "query to target" if pairs.anchor_column else "caption 1 to caption 2"}
    is_whole = split is None or (is_file and "[" not in split)  # the default of a source is `train`
    name = given["path"] if is_whole else f"{given['path']} [{split}]"
    return OwnData(
        name=name,
        title=name,
        read=lambda _: (
            RetrievalData.from_source(source, positives, require_files=require_files)
            if is_retrieval
            else CaptionPairData.from_source(pairs)
        ),
        protocol="retrieval" if is_retrieval else "caption-retrieval",
        options=options,
        fields=given,
    )
