"""The command `llm2clip demo`: a local web page that shows what a model does with images and captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from llm2clip.demo.gallery import Gallery
from llm2clip.demo.space import WHOLE_MODEL, write_space
from llm2clip.search.image_sets import FolderImages, IndexedImages, TableImages, is_dataset
from llm2clip.search.vector_index import require_faiss
from llm2clip.utils.repos import RepoKind, inspect_repo

QUICKSTART_MODEL = "runs/quickstart/llm2clip"


@dataclass
class DemoConfig:
    """Settings of `llm2clip demo`."""

    model: str = field(default=QUICKSTART_MODEL, metadata={"help": "Hub id or folder of the model."})
    compare: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a second model, shown beside the first."}
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Images to search: a folder of images, or the path or Hub id of a data set; by default the "
            "bundled test split."
        },
    )
    split: str = field(default="test", metadata={"help": "Data set: split."})
    caption_column: str | None = field(
        default=None,
        metadata={"help": "Data set: column of the images' names; by default caption, txt or text, if any."},
    )
    cache_dir: str = field(
        default="runs/demo", metadata={"help": "Folder of the search indexes, which the next start uses again."}
    )
    host: str | None = field(
        default=None,
        metadata={"help": "Address to listen on, such as 0.0.0.0; by default only this machine can connect."},
    )
    port: int | None = field(default=None, metadata={"help": "Port; by default the first free port from 7860 on."})
    write_space: str | None = field(
        default=None, metadata={"help": "Write the demo as a Space for the Hub into this folder, and do not serve it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing folder of --write-space."})


def run(config: DemoConfig) -> dict[str, Any]:
    """Embed the images and serve the page until interrupted, or write a Space.

    Args:
        config: The settings.

    Returns:
        The folder of the Space, or an empty dict.

    Raises:
        FileExistsError: The folder of the Space exists.
        FileNotFoundError: No model was given, and the quickstart has not produced one yet.
        ImportError: gradio or faiss is not installed.
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
    # Missing libraries are reported before a large model is loaded, which takes minutes.
    import gradio  # noqa: F401

    require_faiss()

    cache_dir = Path(config.cache_dir)
    names = [config.model, *([config.compare] if config.compare else [])]
    for name in names:
        inspect_repo(name).require(RepoKind.JOINT, hint=WHOLE_MODEL)
    images = open_images(config)
    galleries = [(name, Gallery.open(name, images, cache_dir)) for name in names]
    serve(config, galleries, cache_dir)
    return {}


def open_images(config: DemoConfig) -> IndexedImages:
    """Open the images that the settings select."""
    path = config.data or str(resources.files("llm2clip.example_data") / "concepts" / "test.parquet")
    place = Path(path).expanduser()
    # Metadata files contain the captions of a folder of images, which `datasets` reads.
    captioned = any(place.glob("metadata.*")) or any(place.glob("*/metadata.*"))
    if is_dataset(path) or captioned:
        return TableImages(path, split=config.split, caption_column=config.caption_column)
    return FolderImages(path, exclude=[Path(config.cache_dir)])


def serve(config: DemoConfig, galleries: list[tuple[str, Gallery]], cache_dir: Path) -> None:
    """Serve the page until interrupted."""
    from llm2clip.demo.interface import CSS, build_interface, theme

    page = build_interface(galleries, config.data is None, cache_dir / "examples")
    _, address, _ = page.launch(
        server_name=config.host, server_port=config.port, share=False, theme=theme(), css=CSS, footer_links=[],
        ssr_mode=False, pwa=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"The demo is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
