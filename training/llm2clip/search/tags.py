"""The command `llm2clip tags`: write the labels that fit each image of an index best to a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llm2clip.command_line.logs import quiet_libraries
from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import setting
from llm2clip.files.atomic import atomic_file
from llm2clip.models.places import DTYPE, ModelDtype
from llm2clip.search.search import check_places

if TYPE_CHECKING:
    from llm2clip.search.search_index import SearchIndex


@dataclass
class TagsConfig:
    """Settings of `llm2clip tags`."""

    index: str = setting("", "Folder or URL of an index of images, from llm2clip index; with --postgres, its table.")
    labels: str = setting("", "Text file with a label on each line.")
    output: str = setting(
        "tags.jsonl", "File of the result, in JSON lines: for each image its key, labels and scores."
    )
    top: int = setting(5, "Number of labels per image, best first.")
    template: str = setting("{}", "Caption that is embedded for a label, with {} in place of it: 'a photo of a {}'.")
    model: str | None = setting(None, "Hub id or folder of the model; by default the model that made the index.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    dtype: ModelDtype = setting("auto", DTYPE)
    postgres: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "URL of the PostgreSQL database that the index is in, as for llm2clip index."},
    )

    def __post_init__(self) -> None:
        if not self.index or not self.labels:
            raise ValueError("the index or the labels are missing: llm2clip tags INDEX LABELS.txt")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}.")
        if "{}" not in self.template:
            raise ValueError(f"template is {self.template!r}, which needs {{}} in place of the label.")


def run(config: TagsConfig) -> dict[str, Any]:
    """Write the labels of all images; return how many images and labels there are.

    Raises:
        FileNotFoundError: The index, the model or the file of labels does not exist.
        ValueError: There are no labels, the index is of captions, or another model made it.
    """
    labels = read_labels(Path(config.labels))
    check_places(config.index, config.model, config.postgres)
    from llm2clip.search.search_index import SearchIndex

    quiet_libraries()
    index = SearchIndex.open(config.index, config.postgres, config.model, config.model_revision, dtype=config.dtype)
    if index.manifest.embed != "image":
        raise ValueError(f"the index {config.index} is of captions; labels are for images.")
    with atomic_file(config.output, "w", encoding="utf-8") as file:
        write_tags(index, labels, file, config.top, config.template)
    return {"images": len(index), "labels": len(labels), "output": config.output}


def read_labels(path: Path) -> list[str]:
    """Read the distinct labels of a text file, one on each line; empty lines are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no label.
    """
    labels = list(dict.fromkeys(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))))
    if not labels:
        raise ValueError(f"{path} has no label; write one on each line.")
    return labels


def write_tags(index: SearchIndex, labels: list[str], file: IO[str], top: int, template: str = "{}") -> None:
    """Write a line of JSON for each image, in the order of the index: its key, its best labels and their cosines."""
    import numpy as np
    import torch

    from llm2clip.search.store import KEY, VECTOR
    from llm2clip.search.top_k import top_k

    captions = torch.from_numpy(index.embed([template.replace("{}", label) for label in labels]))
    with ProgressBar("Comparing images with labels", len(index), "image") as bar:
        for batch in index.store.keys([KEY, VECTOR]):
            embeds = batch[VECTOR].flatten().to_numpy().astype(np.float32).reshape(len(batch), -1)
            units = torch.nn.functional.normalize(torch.from_numpy(embeds))  # of 16 bits, not quite
            scores, places = top_k(units, captions, top)
            for key, cosines, best in zip(batch[KEY].to_pylist(), scores.tolist(), places.tolist(), strict=True):
                line = {"key": key, "labels": [labels[place] for place in best], "scores": cosines}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            bar.update(len(batch))
