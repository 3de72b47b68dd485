"""The web page of the demo: three tabs for one or two galleries."""

from __future__ import annotations

import functools
import html
import itertools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gradio as gr
from gradio_client.utils import is_http_url_like
from PIL import Image

from llm2clip.data import decode_image
from llm2clip.demo.gallery import Gallery, ShownImage
from llm2clip.encoders import Encoder, OurEncoder
from llm2clip.encoders.query_text import QueryTextEncoder

TITLE = "LLM2CLIP"
# The pictures of visitors are deleted after a day; seconds between two looks, and their age.
DELETE_EVERY_AFTER = (3600, 86400)
ONLY_UPLOADS = "Upload the picture itself: addresses are not fetched."
# The method by which a component of gradio gets a file that it was sent the path or address of.
FETCH = "async_move_resource_to_block_cache"
# Of the bundled images.
QUERIES = {
    "English": ["someone riding a bicycle up a hill", "a monkey covering its mouth", "a woman in a police uniform"],
    "Deutsch": ["ein Surfer auf einer Welle", "Ein Mountainbiker in den Bergen", "Eine Pizza"],
    "Français": ["personne faisant du surf", "policière", "crayon pastel"],
}
# Of images that nothing is known of.
ANYTHING = ["a person", "an animal", "a building", "food", "a vehicle", "a landscape"]
MAX_EXAMPLE_PICTURES, MAX_EXAMPLE_CHARACTERS = 4, 200
CREDITS = (
    "Pictures: Noto Emoji (Apache-2.0), Twemoji by Twitter, Inc. and other contributors (CC-BY-4.0), Fluent Emoji "
    "(MIT), Openclipart (public domain); names from Unicode CLDR."
)
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.75rem; font-weight: 700; margin: .4rem 0 .1rem; letter-spacing: -.02em; }
#head p { margin: .1rem 0; } #head .facts { opacity: .7; font-size: .85rem; }
.note, .note p { font-size: .85rem !important; opacity: .85; }
.found .grid-wrap { max-height: none !important; overflow: visible !important; }
.found .thumbnail-item { background: #fff; } .found .thumbnail-item img { padding: 8px 8px 38px; }
.found .caption-label { left: 0; right: 0; bottom: 0; max-width: none; border: 0; font-size: .75rem; }
.found .caption-label { text-align: center; white-space: normal; line-height: 1.2; min-height: 2.6rem; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
"""
# With the fonts of the visitor's system.
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", radius_size="md", font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)  # fmt: skip

# The path of an example, or what gradio passes for an uploaded file with `preprocess=False`.
Picture: TypeAlias = str | dict[str, Any] | None
# Path of an example picture, labels for it (one per line), and its caption.
ExamplePicture: TypeAlias = tuple[str, str, str]


class Examples(NamedTuple):
    """Queries by the heading that they are shown below, and pictures."""

    queries: dict[str, list[str]]
    pictures: list[ExamplePicture]


def build_interface(galleries: Sequence[Gallery], is_bundled: bool, example_dir: Path) -> gr.Blocks:
    """Build the page.

    Args:
        galleries: The images with one or two models; all tabs but "Search" use the first.
        is_bundled: The images are the bundled ones, with example queries of their own.
        example_dir: Folder for the files of the example pictures.
    """
    gallery = galleries[0]
    examples = find_examples(gallery, is_bundled, example_dir)
    with gr.Blocks(
        title=f"{TITLE} demo", analytics_enabled=False, fill_width=True, delete_cache=DELETE_EVERY_AFTER
    ) as page:
        gr.HTML(_head(gallery), elem_id="head")
        with gr.Tab("Search", id="search"):
            start = _search_tab(galleries, examples)
        with gr.Tab("Classify", id="classify"):
            _classify_tab(gallery, examples)
        if gallery.has_heat_maps:
            with gr.Tab("Heat map", id="heat_map"):
                _heat_map_tab(gallery, examples)
        if is_bundled:
            gr.Markdown(CREDITS, elem_classes="note")
        page.load(*start, api_visibility="private")
    _take_only_uploads(page)
    return page


def find_examples(gallery: Gallery, is_bundled: bool, folder: Path) -> Examples:
    """Choose example queries, and save the best picture of each, which is shown with the caption that it has."""
    texts = itertools.chain(*QUERIES.values()) if is_bundled else ANYTHING
    chosen: dict[bytes, tuple[Image.Image, str]] = {}
    for text in texts:
        for image, name, _ in gallery.search(text, 1):
            caption = " ".join(name.split()) if gallery.has_captions else ""
            caption = caption if 0 < len(caption) <= MAX_EXAMPLE_CHARACTERS else text
            chosen.setdefault(image.tobytes(), (image, caption))
    captions = list(dict.fromkeys(caption for _, caption in chosen.values()))
    labels = "\n".join(captions if len(captions) > 1 else ANYTHING)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, (image, caption) in enumerate(list(chosen.values())[:MAX_EXAMPLE_PICTURES]):
        image.save(folder / f"{number}.png")
        pictures.append((str(folder / f"{number}.png"), labels, caption))
    queries = {"Captions of these pictures": captions} if gallery.has_captions and captions else {"Examples": ANYTHING}
    return Examples(QUERIES if is_bundled else queries, pictures)


def _take_only_uploads(page: gr.Blocks) -> None:
    """Let no field take the address of a file, which gradio would fetch for any visitor, however large it is."""
    for block in page.blocks.values():
        if isinstance(block, gr.components.Component):
            setattr(block, FETCH, functools.partial(_only_upload, getattr(block, FETCH)))


async def _only_upload(move: Callable[[Any], Awaitable[str | None]], path: Any) -> str | None:
    if is_http_url_like(str(path)):
        raise gr.Error(ONLY_UPLOADS, title="", print_exception=False)
    return await move(path)


def _head(gallery: Gallery) -> str:
    encoder = gallery.encoder
    reader = "A large language model" if isinstance(encoder, OurEncoder) else "A text tower"
    if isinstance(encoder, QueryTextEncoder):
        reader = "A small text model, taught by a large language model,"
    facts = [encoder.name, *_facts(encoder), f"{len(gallery):,} images"]
    return (
        f"<h1>{TITLE}</h1><p>{reader} encodes the caption and a vision tower the picture, both into the same "
        f"embedding space.</p><p class='facts'>{html.escape(' · '.join(facts))}</p>"
    )


def _facts(encoder: Encoder) -> list[str]:
    model = encoder.model
    parts = {encoder.library: model}
    if isinstance(encoder, OurEncoder):
        name, text = f"LLM: {encoder.text_config.decoder_config.model_type}", model.text_model
        if isinstance(encoder, QueryTextEncoder):
            name, text = "query encoder", encoder.query
        parts = {name: text, f"vision: {model.config.vision_config.model_type}": model.vision_model}
    counts = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in parts.values()]
    return [f"{name}, {count:,.0f} M parameters" for name, count in zip(parts, counts, strict=True)]


def _search_tab(galleries: Sequence[Gallery], examples: Examples) -> tuple[Callable[..., Any], gr.Textbox, Any]:
    """Build the tab; returns the search function with its input and output components."""

    def search(query: str | Image.Image) -> Any:
        results = [_results(gallery.search(query)) for gallery in galleries]
        return results if len(results) > 1 else results[0]

    def by_image(picture: Picture) -> Any:
        return search(_decode(picture)) if picture else gr.skip()

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            query = gr.Textbox(
                next(iter(examples.queries.values()))[0], label="Caption",
                placeholder="What should the picture show?", elem_id="query", max_lines=6,
            )  # fmt: skip
            button = gr.Button("Search", variant="primary", elem_id="search_button")
            image = _picture_field("query_image", "or a similar picture", 190)
            examples_at = gr.Column()
        with gr.Column(scale=5, min_width=480):
            with gr.Row():
                outputs = [_results_field(gallery, number, len(galleries)) for number, gallery in enumerate(galleries)]
            gr.Markdown(
                "The number below a picture is its cosine similarity with the query; compare numbers only within one "
                "search of one model. Names are displayed but not searched. The language model determines which "
                "languages work.",
                elem_classes="note",
            )
    shown: Any = _shown(search)
    gr.on([button.click, query.submit], shown, query, outputs, api_name="search")
    image.input(_shown(by_image), image, outputs, api_name="search_by_image", preprocess=False)
    with examples_at:
        for heading, queries in examples.queries.items():
            gr.Examples(
                queries, query, outputs, shown, run_on_click=True, cache_examples=False, label=heading,
                api_visibility="private",
            )  # fmt: skip
    return shown, query, outputs


def _results_field(gallery: Gallery, number: int, count: int) -> gr.Gallery:
    """Build the field of what one of `count` models finds."""
    with gr.Column(min_width=240):
        if count > 1:
            gr.Markdown(f"**{gallery.encoder.name}**  \n{' · '.join(_facts(gallery.encoder))}")
        return gr.Gallery(
            label="Found", show_label=False, columns=5 - count, height="auto", object_fit="contain", interactive=False,
            elem_id=f"found_{number}", elem_classes="found", buttons=[],
        )  # fmt: skip


def _classify_tab(gallery: Gallery, examples: Examples) -> None:
    def classify(picture: Picture, labels: str, template: str) -> dict[str, float]:
        return gallery.classify(_decode(picture), labels.splitlines(), template)

    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = _picture_field("classify_image")
            chooser = _example_pictures(examples.pictures)
        with gr.Column(scale=4, min_width=360):
            labels = gr.Textbox(label="Labels, one per line", lines=5, elem_id="labels")
            template = gr.Textbox("{}", label="Caption for a label", info="{} stands for the label.")
            button = gr.Button("Classify", variant="primary", elem_id="classify_button")
            probabilities = gr.Label(label="Probabilities", elem_id="probabilities")
            gr.Markdown(
                "The probabilities sum to one over your labels, so that one label always comes first, even if none of "
                "them is correct.",
                elem_classes="note",
            )
    inputs = [image, labels, template]
    button.click(_shown(classify), inputs, probabilities, api_name="classify", preprocess=False)

    def classify_example(index: int) -> tuple[Any, ...]:
        path, labels, _ = examples.pictures[index]
        return path, labels, "{}", classify(path, labels, "{}")

    chooser.click(_shown(classify_example), chooser, [*inputs, probabilities], api_visibility="private")


def _heat_map_tab(gallery: Gallery, examples: Examples) -> None:
    def heat_map(picture: Picture, caption: str) -> tuple[Image.Image, Image.Image, str]:
        seen, drawn, similarity = gallery.heat_map(_decode(picture), caption)
        rows, columns = similarity.shape
        text = (
            f"{rows} × {columns} patches; cosine similarity from **{similarity.min():.2f}** (blue) to "
            f"**{similarity.max():.2f}** (red). The colours span the range of each map, so a caption that does not "
            "match has red parts too. The tower was trained on whole pictures only; the map is a rough indication."
        )
        return seen, drawn, text

    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            image = _picture_field("map_image")
            chooser = _example_pictures(examples.pictures)
            caption = gr.Textbox(label="Caption", elem_id="map_caption")
            button = gr.Button("Show heat map", variant="primary", elem_id="map_button")
        with gr.Column(scale=5, min_width=480):
            with gr.Row():
                seen = gr.Image(label="What the tower sees", format="png", interactive=False, buttons=[])
                drawn = gr.Image(
                    label="Where the caption matches", format="png", interactive=False, elem_id="heat_map",
                    buttons=["download"],
                )  # fmt: skip
            note = gr.Markdown(elem_classes="note")
    inputs, outputs = [image, caption], [seen, drawn, note]
    gr.on([button.click, caption.submit], _shown(heat_map), inputs, outputs, api_name="heat_map", preprocess=False)

    def map_example(index: int) -> tuple[Any, ...]:
        path, _, caption = examples.pictures[index]
        return path, caption, *heat_map(path, caption)

    chooser.click(_shown(map_example), chooser, [*inputs, *outputs], api_visibility="private")


def _picture_field(identity: str, label: str = "Picture", height: int = 300) -> gr.Image:
    """Build an upload field for a picture.

    Events with such an input pass `preprocess=False`: gradio's own preprocessing opens the file with Pillow, and
    reports a damaged one as "Error" only. `decode_image` reports the reason.
    """
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height,
        elem_id=identity, elem_classes="picture", buttons=[],
    )  # fmt: skip


def _example_pictures(pictures: list[ExamplePicture]) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(visible=False, type="filepath")], samples=[[path] for path, _, _ in pictures],
        type="index", label="Examples", elem_classes="examples",
    )  # fmt: skip


def _results(images: Sequence[ShownImage]) -> Any:
    pairs = [(image, f"{score:.2f} · {name}" if name else f"{score:.2f}") for image, name, score in images]
    return gr.update(value=pairs, selected_index=None)


def _decode(picture: Picture) -> Image.Image:
    if picture is None:
        raise ValueError("There is no picture yet: upload one, or choose an example.")
    path = picture if isinstance(picture, str) else picture.get("path")
    if path is None:
        raise ValueError(ONLY_UPLOADS)
    return decode_image(path, Path(path).name)


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the ValueErrors of a function, which a visitor can correct, as messages on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error

    return wrapped
