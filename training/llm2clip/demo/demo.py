"""The command `llm2clip demo`: a local web page that shows what a model does with images and captions."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from llm2clip.demo.gallery import Gallery
from llm2clip.demo.space import WHOLE_MODEL, write_space
from llm2clip.search.folder_images import FolderImages
from llm2clip.search.image_sets import IndexedImages
from llm2clip.search.lance_store import require_lancedb
from llm2clip.search.table_images import TableImages, is_dataset
from llm2clip.utils.logs import printable
from llm2clip.utils.repos import RepoKind, inspect_repo
from llm2clip.utils.settings import setting

QUICKSTART_MODEL = "runs/quickstart/llm2clip"


# Requests that wait for the model; further ones are told to come back later.
MAX_WAITING = 32
# The variable by which gradio is told where to keep what visitors upload and are shown.
VISITORS_FILES = "GRADIO_TEMP_DIR"


@dataclass
class DemoConfig:
    """Settings of `llm2clip demo`."""

    model: str = setting(QUICKSTART_MODEL, "Hub id or folder of the model.")
    compare: str | None = setting(None, "Hub id or folder of a second model, shown beside the first.")
    data: str | None = setting(
        None,
        "Images to search: a folder of images, or path or Hub id of a data set; by default the bundled test split.",
    )
    split: str = setting("test", "Data set: split.")
    caption_column: str | None = setting(
        None, "Data set: column of image names; by default caption, txt, text or none."
    )
    cache_dir: str = setting("runs/demo", "Folder of the search indexes, which the next start uses again.")
    host: str | None = setting(None, "Address to listen on, e.g. 0.0.0.0; by default only this machine can connect.")
    port: int | None = setting(None, "Port; by default the first free port from 7860 on.")
    max_upload_mb: int = setting(20, "Largest picture that can be uploaded, in megabytes.")
    write_space: str | None = setting(None, "Write the demo into this folder as a Space for the Hub; do not serve it.")
    overwrite: bool = setting(False, "Replace a folder that --write-space wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        if self.max_upload_mb < 1:
            raise ValueError(f"max_upload_mb must be at least 1, not {self.max_upload_mb}.")


def run(config: DemoConfig) -> dict[str, Any]:
    """Embed the images and serve the page until interrupted, or write a Space and return its folder.

    Raises:
        FileExistsError: The folder of the Space exists.
        FileNotFoundError: No model was given, and the quickstart has not produced one yet.
        ImportError: gradio or LanceDB is not installed.
        OSError: The model does not exist.
        ValueError: There are no images, or a model is not an LLM2CLIP model with its LLM.
    """
    if config.model == QUICKSTART_MODEL and not Path(config.model).is_dir():
        raise FileNotFoundError(
            f"there is no model in {QUICKSTART_MODEL}: run `make quickstart`, or give --model a folder or Hub id"
        )
    if config.write_space:
        write_space(Path(config.write_space), config.model, config.overwrite)
        return {"space": config.write_space}
    # Here, so that missing libraries are reported before a large model is loaded, which takes minutes.
    import llm2clip.demo.interface  # noqa: F401

    require_lancedb()
    names = [name for name in (config.model, config.compare) if name]
    for name in names:
        inspect_repo(name).require(RepoKind.JOINT, hint=WHOLE_MODEL)
    images = open_images(config)
    galleries = [(name, Gallery.open(name, images, Path(config.cache_dir))) for name in names]
    # What visitors send can be quoted in a traceback.
    with _visitors_files(), _printable_streams():
        _serve(galleries, config)
    return {}


class _PrintableStream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _printable_streams() -> Iterator[None]:
    """Let nothing that libraries print, tracebacks that quote strangers too, steer the terminal."""
    streams: list[Any] = [_PrintableStream(sys.stdout), _PrintableStream(sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield


def _serve(galleries: list[tuple[str, Gallery]], config: DemoConfig) -> None:
    from llm2clip.demo.interface import CSS, THEME, build_interface

    page = build_interface(galleries, config.data is None, Path(config.cache_dir) / "examples")
    page.queue(max_size=MAX_WAITING)
    _, address, _ = page.launch(
        max_file_size=config.max_upload_mb * 10**6,
        server_name=config.host, server_port=config.port, share=False, theme=THEME, css=CSS, footer_links=[],
        ssr_mode=False, pwa=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"The demo is at {address} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


@contextlib.contextmanager
def _visitors_files() -> Iterator[None]:
    """Keep the pictures of visitors in a folder that only this user reads, and that ends with the demo.

    By default gradio keeps them for good, in a folder of all its programs and users on the machine.
    """
    if os.environ.get(VISITORS_FILES):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="llm2clip-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[VISITORS_FILES] = str(Path(folder).resolve())
        try:
            yield
        finally:
            del os.environ[VISITORS_FILES]


def open_images(config: DemoConfig) -> IndexedImages:
    """Open the images that the settings select."""
    path = config.data or str(resources.files("llm2clip.example_data") / "concepts" / "test.parquet")
    place = Path(path).expanduser()
    # Metadata files contain the captions of a folder of images, which `datasets` reads.
    captioned = any(place.glob("metadata.*")) or any(place.glob("*/metadata.*"))
    if is_dataset(path) or captioned:
        return TableImages(path, split=config.split, caption_column=config.caption_column)
    return FolderImages(path, exclude=[Path(config.cache_dir)])
