"""The command `llm2clip demo`: a local web page that shows what a model does with images and captions.

Its mistakes are found before the libraries of models and of the page are imported, which takes many seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from llm2clip.command_line.logs import printable, quiet_libraries
from llm2clip.command_line.settings import defaults_of, refuse, setting
from llm2clip.files.bundled import bundled_data
from llm2clip.models.places import DTYPE, ModelDtype, require_model_place
from llm2clip.search.search import check_places
from llm2clip.serving.addresses import listen

if TYPE_CHECKING:
    from llm2clip.demo.gallery import Gallery
    from llm2clip.search.folder_items import Items

QUICKSTART_MODEL = "runs/quickstart/llm2clip"
# Requests that wait for the model; further ones are told to come back later.
MAX_WAITING = 32
# The variable by which gradio is told where to keep what visitors upload and are shown.
VISITORS_FILES = "GRADIO_TEMP_DIR"


@dataclass
class DemoConfig:
    """Settings of `llm2clip demo`."""

    model: str | None = setting(
        None,
        "Hub id or folder of a model of images and texts, of any library that llm2clip evaluate measures; by default "
        f"the one that made --index, or {QUICKSTART_MODEL}.",
    )
    compare: str | None = setting(None, "Hub id or folder of a second model, shown beside the first.")
    text_encoder: Literal["llm", "query", "auto"] = setting(
        "auto",
        "What embeds texts: the LLM, or the query encoder of llm2clip distill-text; auto: that if there is one.",
    )
    dtype: ModelDtype = setting("auto", DTYPE)
    index: str | None = setting(
        None, "Folder or URL of an index of images, written by llm2clip index: nothing is embedded again."
    )
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
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"port must be from 1 to 65535, not {self.port}.")
        if self.index and self.data:
            raise ValueError(f"index is {self.index} and data is {self.data}: an index has its images, so give one.")
        if self.write_space:
            others = defaults_of(self).keys() - {"model", "write_space", "overwrite"}
            refuse(self, sorted(others), "a Space has one model, the bundled images and an address of its own")
        else:
            refuse(self, ["overwrite"], "only --write-space writes a folder")
        if not self.data:
            refuse(self, ["split", "caption_column"], "it is for --data")


def run(config: DemoConfig) -> dict[str, Any]:
    """Open or embed the images and serve the page until interrupted, or write a Space and return its folder.

    Raises:
        FileExistsError: The folder of the Space exists.
        FileNotFoundError: No model was given, and the quickstart has not produced one yet; or there is no such index.
        ImportError: gradio or LanceDB is not installed.
        OSError: The model does not exist, or the port is taken.
        ValueError: There are no images, or a model does not embed both images and texts.
    """
    if not config.index and config.model is None and not Path(QUICKSTART_MODEL).is_dir():
        raise FileNotFoundError(
            f"there is no model in {QUICKSTART_MODEL}: run `make quickstart`, or give --model a folder or Hub id"
        )
    model = config.model or ("" if config.index else QUICKSTART_MODEL)  # the index knows its own
    check_places(config.index, model)
    if config.compare:
        require_model_place(config.compare)
    if config.write_space:
        from llm2clip.demo.space import write_space

        write_space(Path(config.write_space), model, config.overwrite)
        return {"space": config.write_space}
    # Before a large model is loaded, which takes minutes.
    if config.port is not None:
        listen((config.host or "127.0.0.1").strip("[]"), config.port).close()
    import llm2clip.demo.interface  # noqa: F401
    from llm2clip.search.location import open_store

    open_store(config.cache_dir)
    quiet_libraries()
    # What visitors send can be quoted in a traceback.
    with _temporary_files() as examples, _printable_streams():
        _serve(_open_galleries(config, model), config, examples)
    return {}


def _open_galleries(config: DemoConfig, model: str) -> list[Gallery]:
    from llm2clip.demo.gallery import Gallery
    from llm2clip.search.folder_items import FolderImages

    cache_dir, how = Path(config.cache_dir), (config.text_encoder, config.dtype)
    if config.index:
        galleries = [Gallery.of_index(config.index, model or None, *how)]
        opened: Any = galleries[0].images.table
        images = opened or FolderImages(galleries[0].index.manifest.source["path"], exclude=[cache_dir])
    else:
        images = open_images(config)
        galleries = [Gallery.open(model, images, cache_dir, *how)]
    if config.compare:
        galleries.append(Gallery.open(config.compare, images, cache_dir, *how))
    return galleries


def _serve(galleries: list[Gallery], config: DemoConfig, examples: Path) -> None:
    from llm2clip.demo.interface import CSS, THEME, build_interface

    page = build_interface(galleries, not (config.index or config.data), examples)
    page.queue(max_size=MAX_WAITING, api_open=False)
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
def _temporary_files() -> Iterator[Path]:
    """Keep the pictures of visitors in a folder that only this user reads, and that ends with the demo.

    By default gradio keeps them for good, in a folder of all its programs and users on the machine.

    Yields:
        A folder for the example pictures, which ends with the demo too.
    """
    with tempfile.TemporaryDirectory(prefix="llm2clip-demo-", ignore_cleanup_errors=True) as folder:
        visitors, examples = Path(folder).resolve() / "visitors", Path(folder).resolve() / "examples"
        visitors.mkdir(mode=0o700)
        given = os.environ.get(VISITORS_FILES)
        os.environ[VISITORS_FILES] = given or str(visitors)
        try:
            yield examples
        finally:
            if not given:
                del os.environ[VISITORS_FILES]


def open_images(config: DemoConfig) -> Items:
    """Open the images that the settings select."""
    from llm2clip.search.table_items import FolderImages, open_items

    path = config.data or str(bundled_data("concepts/test.parquet", "give --data a folder of images, or --index"))
    root = Path(path).expanduser()
    # Metadata files contain the captions of a folder of images, which `datasets` reads.
    kind = "dataset" if any(root.glob("metadata.*")) or any(root.glob("*/metadata.*")) else "auto"
    captions = [] if config.caption_column is None else [config.caption_column]
    items = open_items(path, [Path(config.cache_dir)], kind, split=config.split, caption_columns=captions)
    if isinstance(items, FolderImages):
        refuse(config, ["split", "caption_column"], f"{path} is a folder of image files without metadata")
    return items


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
