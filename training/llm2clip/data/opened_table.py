"""Opening tables with `datasets`: files, glob patterns, URLs, folders, data sets of the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from llm2clip.data.formats import FORMATS, SourceError, file_format
from llm2clip.data.tars import refuse_damaged_tars, skip_empty_tars
from llm2clip.files.library_errors import wrap_read_errors

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
# By default, pandas reads "nan", "None" and "NA" as missing cells, but these can be captions ("nan" is a bread).
CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}
IMAGE_FOLDER_HINT = " In an image folder, metadata.jsonl, .csv or .parquet must contain the captions, by file_name."


@dataclass
class OpenedTable:
    """A table with all its columns, and information about its files.

    Attributes:
        files: The data files of the split, in the order of the rows; none of a table that `save_to_disk` wrote.
        hint: Advice for the error message if a column does not exist.
    """

    table: Table
    files: list[str] = field(default_factory=list)
    hint: str = ""

    @property
    def folders(self) -> list[str]:
        """The folders of the data files."""
        return sorted(set(map(os.path.dirname, self.files)))


def open_table(path: str, name: str | None, split: str, revision: str | None, streaming: bool = False) -> OpenedTable:
    """Open a table by path, glob pattern, URL or Hub id; see [`CaptionSource`].

    Raises:
        FileNotFoundError: If the path does not exist.
        SourceError: If the split does not exist or the data cannot be read.
    """
    local = Path(path).expanduser()
    is_saved = (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file()
    # The README of a folder may name configurations.
    for field_name, given in (("revision", revision), ("name", None if local.is_dir() and not is_saved else name)):
        if given is not None and (local.exists() or "://" in path or glob.has_magic(path)):
            raise SourceError(f"{field_name} is {given}, but {path} is no data set of the Hub; leave it out.")
    if is_saved:
        if streaming:
            raise SourceError(f"{path}, which save_to_disk wrote, is read in place; leave streaming unset.")
        return _from_disk(local, split)
    arguments = _builder_arguments(path, local, split)
    arguments |= {key: value for key, value in (("name", name), ("revision", revision)) if value is not None}
    try:
        builder = datasets.load_dataset_builder(**arguments)
        if isinstance(builder, Csv):
            arguments |= CSV_OPTIONS
            builder = datasets.load_dataset_builder(**arguments)
        files = builder.config.data_files or {}
        known = list(files) or list(builder.info.splits or {})
        missing = [part for part in split_names(split) if part not in known and part != "all"]
        if known and missing:
            raise SourceError(f"{path} has no split {missing[0]!r}; it has {', '.join(map(str, known))}.")
        if isinstance(builder, WebDataset):
            for part in files:
                files[part] = skip_empty_tars(files[part])
        read = [file for part in split_names(split) for file in files.get(part, [])]
        if isinstance(builder, Json):
            _refuse_null(read)
        if isinstance(builder, Csv):
            _refuse_separators(read)
        if streaming:
            table: Table = builder.as_streaming_dataset(split)
        else:
            if isinstance(builder, WebDataset):
                refuse_damaged_tars(read)
            builder.download_and_prepare()
            table = builder.as_dataset(split)
    except SourceError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"No data at {path!r}: {error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"{path!r} is not a local file or folder, and the Hub cannot be reached to look for it ({error})."
        ) from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # `datasets` and pandas raise whatever broken bytes lead to, TypeError too
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise SourceError(
                f"{path} is not in UTF-8 ({cause}): save it in UTF-8, in Excel as 'CSV UTF-8 (Comma delimited)'."
            ) from error
        raise SourceError(f"Reading {path} failed: {type(cause).__name__}: {cause}") from error
    return OpenedTable(
        table=table,
        files=read,
        hint=IMAGE_FOLDER_HINT if isinstance(builder, ImageFolder) else "",
    )


def _refuse_null(files: Iterable[str]) -> None:
    """Refuse JSON lines that begin with a row that is null, over which pyarrow ends the process (SIGSEGV)."""
    for path in files:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if file.readline(16).strip() == b"null":
                    raise SourceError(f"{path} begins with a row that is null, and not an object.")


def _refuse_separators(files: Iterable[str]) -> None:
    """Refuse a .csv whose names of columns stand between semicolons or tabs, as Excel writes it in many countries."""
    for path in files:
        if os.path.isfile(path) and path.lower().endswith(".csv"):
            with open(path, "rb") as file:
                names = file.readline(65_536)
            for separator, shown in ((b";", "';'"), (b"\t", "a tab")):
                if separator in names and b"," not in names:
                    raise SourceError(
                        f"the separator of {path} seems to be {shown}: save it with commas, or as .tsv with tabs."
                    )


def split_names(split: str) -> list[str]:
    """Return the split names in an expression such as `train[:10%]+test`."""
    return [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]


def _builder_arguments(path: str, local: Path, split: str) -> dict[str, Any]:
    if local.is_dir():
        if glob.has_magic(str(local)):
            # `datasets` would read other folders that the name fits as a pattern, such as "2 a" for "[2] a".
            raise SourceError(
                f"the folder {path} has one of *?[ in its name, which `datasets` takes for a pattern; rename it, or "
                "give its files: 'FOLDER/*.parquet', with each such character in brackets of its own, as [[]."
            )
        return {"path": str(local)}
    if "://" in path or local.is_file():
        files = [path if "://" in path else str(local)]
    elif glob.has_magic(path):
        files = sorted(file for file in glob.glob(str(local), recursive=True) if os.path.isfile(file))
        if not files:
            raise FileNotFoundError(f"No file matches {path!r} (in {os.getcwd()}).")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and file_format(path) not in FORMATS:
        return {"path": path}
    else:
        raise FileNotFoundError(
            f"There is no file or folder {path!r} (in {os.getcwd()}), and it is not the id of a data set on the Hub, "
            "which has the form owner/name."
        )
    suffixes = {file_format(file) for file in files}
    if len(suffixes) != 1 or not suffixes <= set(FORMATS):
        endings = ", ".join(sorted(map(repr, suffixes)))
        raise SourceError(f"The files of {path} must have one format out of {', '.join(FORMATS)}, not {endings}.")
    builder, options = FORMATS[suffixes.pop()]
    if "://" not in path:  # these are names, which `datasets` takes for patterns
        files = list(map(glob.escape, files))
    return {"path": builder, "data_files": dict.fromkeys(split_names(split), files), **options}


def _from_disk(folder: Path, split: str) -> OpenedTable:
    with wrap_read_errors(folder, SourceError):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise SourceError(f"{folder} has no split {split!r}; it has {', '.join(map(str, loaded))}.")
        loaded = loaded[split]
    elif "[" in split:
        raise SourceError(f"split is {split}, but of {folder}, which save_to_disk wrote, no slice is read.")
    return OpenedTable(loaded)
