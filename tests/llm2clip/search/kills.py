"""Runs of an index that are killed at random moments: `python -m tests.llm2clip.search.kills FOLDER TRIALS`.

Each run is a fork of this process, which has loaded all but LanceDB: that does not survive a fork.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import TokenizedTexts
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.index_update import update_index
from llm2clip.search.location import open_store
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.table_items import FolderImages

from .helpers import encoded, picture
from .places import content

COUNT, WIDTH = 150, 48
SETTINGS = IndexSettings(batch_size=8, shard_size=16, num_workers=0, index_type="flat")


class Pixels(Encoder):
    """A model whose embedding of an image is the image itself, in few pixels."""

    library, commit = "none", None

    def __init__(self) -> None:
        super().__init__("pixels", torch.nn.Identity(), WIDTH, torch.device("cpu"), "float32")

    def fingerprint(self) -> str:
        return "pixels"

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        pixels = np.asarray(image.resize((4, 4)), dtype=np.float32)
        return {"pixel_values": torch.from_numpy(pixels.reshape(-1) - 100)}

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        time.sleep(0.01)
        return inputs["pixel_values"]

    def settings(self) -> dict[str, Any]:
        return {}

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        raise NotImplementedError

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def run(pictures: Path, output: Path) -> dict[str, Any]:
    """Bring an index up to date."""
    return update_index(open_store(output), FolderImages(pictures), Pixels, SETTINGS)


def search(output: Path) -> list[str]:
    """Return the keys of all images of an index."""
    return sorted(found.key for found in SearchIndex.open(output).search(np.ones((1, WIDTH)), 10_000)[0])


def forked(call: Callable[[], Any], delay: float | None = None) -> bool:
    """Call in a fork, which is killed after so many seconds; return whether it came to its end."""
    child = os.fork()
    if not child:
        try:
            call()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert delay is not None or status == 0, f"{call} has ended with {status}"
    return status == 0


def expect(found: Any, *expected: Any) -> None:
    assert found in expected, found


def main(folder: Path, trials: int) -> None:
    """Kill a first run and then updates; after each kill searches find one whole index."""
    pictures, dice = folder / "pictures", random.Random(0)
    pictures.mkdir()
    files = [pictures / f"{number:04d}.png" for number in range(COUNT)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(picture(number)))
    start = time.monotonic()
    forked(lambda: run(pictures, folder / "first"))
    seconds = time.monotonic() - start
    for trial in range(trials):
        index, before = folder / f"{trial}", [file.name for file in files]
        is_update = trial % 2
        if is_update:
            forked(lambda: run(pictures, index))  # noqa: B023
            files.pop(0).unlink()
            files.append(pictures / f"{1000 + trial}.png")
            files[-1].write_bytes(encoded(picture(1000 + trial)))
        for _ in range(2):
            # An update embeds one image alone.
            forked(lambda: run(pictures, index), dice.uniform(0, seconds))  # noqa: B023
            if is_update:
                after = [file.name for file in files]
                forked(lambda: expect(search(index), before, after))  # noqa: B023
        forked(lambda: run(pictures, index))  # noqa: B023
        whole = folder / f"whole-{trial}"
        forked(lambda: run(pictures, whole))  # noqa: B023
        forked(lambda: expect(content(index), content(whole)))  # noqa: B023
        left = {path.name for path in index.iterdir()} - {path.name for path in index.glob("images-*.lance")}
        assert left == {".lock", "manifest.json", "rows", *(path.name for path in index.glob("listing-*"))}
        assert len(list(index.glob("images-*.lance"))) <= 2
        assert len(list(index.glob("listing-*"))) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
