"""The `demo` job: a page on this machine that shows what a model does with images and captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from llm2clip.data import CaptionSource
from llm2clip.demo.gallery import Gallery
from llm2clip.demo.space import write_space
from llm2clip.utils.repos import RepoKind, inspect_repo

QUICKSTART_MODEL = "runs/quickstart/llm2clip"


@dataclass
class DemoConfig:
    """Settings of the demo."""

    model: str = field(default=QUICKSTART_MODEL, metadata={"help": "The model: Hub id or folder."})
    compare: str | None = field(
        default=None, metadata={"help": "A second model, to see beside the first: Hub id or folder."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Captioned images to search: a path or Hub id; by default the bundled test split."},
    )
    split: str = field(default="test", metadata={"help": "Split of the data."})
    caption_columns: list[str] = field(
        default_factory=lambda: ["caption"], metadata={"help": "Columns that name the images."}
    )
    cache_dir: str = field(
        default="runs/demo", metadata={"help": "Keeps the images' embeddings between starts, by model and images."}
    )
    host: str | None = field(
        default=None, metadata={"help": "Address to listen on; by default this machine alone can connect."}
    )
    port: int | None = field(default=None, metadata={"help": "Port; by default the first free one from 7860."})
    write_space: str | None = field(
        default=None, metadata={"help": "Write a folder here that is a Space on the Hub, and serve nothing."}
    )
    overwrite: bool = field(default=False, metadata={"help": "write_space: replace a Space that exists."})


def run(config: DemoConfig) -> dict[str, Any]:
    """Embed the images and serve the page until interrupted, or write a Space.

    Args:
        config: The settings.

    Returns:
        Where the Space was written, or nothing.

    Raises:
        FileExistsError: The Space exists.
        FileNotFoundError: The model is the default one, and the quickstart has not made it yet.
        ImportError: gradio is not installed.
        OSError: There is no such model.
        ValueError: There is no image, or a model is no LLM2CLIP model with its LLM.
    """
    if config.model == QUICKSTART_MODEL and not Path(config.model).is_dir():
        raise FileNotFoundError(
            f"no model in {QUICKSTART_MODEL}: run `make quickstart`, or give --model a folder or Hub id"
        )
    if config.write_space:
        write_space(Path(config.write_space), config.model, config.overwrite)
        return {"space": config.write_space}
    import gradio  # noqa: F401, before the minutes that a large model takes to load

    cache_dir = Path(config.cache_dir)
    source = data_source(config)
    names = [config.model, *([config.compare] if config.compare else [])]
    for name in names:
        inspect_repo(name).require(RepoKind.JOINT)
    galleries = [(name, Gallery.open(name, source, cache_dir)) for name in names]
    serve(config, galleries, cache_dir)
    return {}


def data_source(config: DemoConfig) -> CaptionSource:
    """The images that the settings ask for."""
    path = config.data or str(resources.files("llm2clip.example_data") / "concepts" / "test.parquet")
    return CaptionSource(path, split=config.split, caption_columns=config.caption_columns)


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
