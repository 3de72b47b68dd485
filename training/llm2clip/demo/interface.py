"""The web page of the demo: four tabs for one or two galleries."""

from __future__ import annotations

import functools
import html
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from gradio_client.utils import is_http_url_like
from PIL import Image

from llm2clip.data import decode_image
from llm2clip.demo.gallery import Gallery, ShownImage
from modeling_llm2clip import LLM2CLIPModel

TITLE = "LLM2CLIP"
# The pictures of visitors are deleted after a day; seconds between two looks, and their age.
DELETE_EVERY_AFTER = (3600, 86400)
ONLY_UPLOADS = "Upload the picture itself: addresses are not fetched."
# The method by which a component of gradio gets a file that it was sent the path or address of.
FETCH = "async_move_resource_to_block_cache"
QUERIES = {
    "English": ["someone riding a bicycle up a hill", "a monkey covering its mouth", "a woman in a police uniform"],
    "Deutsch": ["ein Surfer auf einer Welle", "Ein Mountainbiker in den Bergen", "Eine Pizza"],
    "Français": ["personne faisant du surf", "policière", "crayon pastel"],
}
# Captions of bundled images, each with labels for classification and a caption for the heat map.
EXAMPLE_IMAGES = {
    "closed mailbox with raised flag": ("a letter box\na camera\na light bulb", "a letter box with a raised flag"),
    "person mountain biking": ("person riding a bicycle\nperson in a wheelchair\nperson running", "mountain biking"),
    "crayon": ("a crayon\na paintbrush\na pill", "crayon"),
    "person surfing": ("surfing\ncycling\nswimming", "person surfing"),
}
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


def build_interface(galleries: Sequence[tuple[str, Gallery]], examples: bool, example_dir: Path) -> gr.Blocks:
    """Build the page.

    Args:
        galleries: Names of one or two models with their galleries; all tabs but "Compare" use the first.
        examples: Show example queries and pictures, which belong to the bundled images.
        example_dir: Folder for the files of the example pictures.
    """
    name, gallery = galleries[0]
    pictures = _save_examples(gallery, example_dir) if examples else []
    with gr.Blocks(
        title=f"{TITLE} demo", analytics_enabled=False, fill_width=True, delete_cache=DELETE_EVERY_AFTER
    ) as page:
        gr.HTML(_head(name, gallery), elem_id="head")
        with gr.Tab("Search", id="search"):
            start = _search_tab(gallery, examples)
        with gr.Tab("Classify", id="classify"):
            _classify_tab(gallery, pictures)
        with gr.Tab("Heat map", id="heat_map"):
            _heat_map_tab(gallery, pictures)
        with gr.Tab("Compare", id="compare"):
            _compare_tab(galleries, examples)
        if examples:
            gr.Markdown(CREDITS, elem_classes="note")
            page.load(*start, api_visibility="private")
    _take_only_uploads(page)
    return page


def _take_only_uploads(page: gr.Blocks) -> None:
    """Let no field take the address of a file, which gradio would fetch for any visitor, however large it is."""
    for block in page.blocks.values():
        if isinstance(block, gr.components.Component):
            setattr(block, FETCH, functools.partial(_only_upload, getattr(block, FETCH)))


async def _only_upload(move: Callable[[Any], Awaitable[str | None]], place: Any) -> str | None:
    if is_http_url_like(str(place)):
        raise gr.Error(ONLY_UPLOADS, title="", print_exception=False)
    return await move(place)


def _head(name: str, gallery: Gallery) -> str:
    facts = [name, *_facts(gallery.model), f"{len(gallery):,} images"]
    return (
        f"<h1>{TITLE}</h1><p>A large language model encodes the caption and a vision tower the picture, both into the "
        f"same embedding space.</p><p class='facts'>{html.escape(' · '.join(facts))}</p>"
    )


def _facts(model: LLM2CLIPModel) -> list[str]:
    text, vision = model.config.text_config.decoder_config.model_type, model.config.vision_config.model_type
    millions = [part.num_parameters() / 1e6 for part in (model.text_model, model.vision_model)]
    return [f"LLM: {text}, {millions[0]:,.0f} M parameters", f"vision: {vision}, {millions[1]:,.0f} M"]


def _search_tab(gallery: Gallery, examples: bool) -> tuple[Callable[..., Any], gr.Textbox, gr.Gallery]:
    """Build the tab; returns the search function with its input and output components."""

    def by_image(picture: Picture) -> Any:
        return _results(gallery.search(_decode(picture))) if picture else gr.skip()

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            query = gr.Textbox(
                QUERIES["English"][0] if examples else "", label="Caption",
                placeholder="What should the picture show?", elem_id="query", max_lines=6,
            )  # fmt: skip
            button = gr.Button("Search", variant="primary", elem_id="search_button")
            image = _picture_field("query_image", "or a similar picture", 190)
            examples_at = gr.Column()
        with gr.Column(scale=5, min_width=480):
            found = _found_gallery("found", 4)
            gr.Markdown(
                "The number below a picture is its cosine similarity with the query; compare numbers only within one "
                "search. Names are displayed but not searched. The language model determines which languages work.",
                elem_classes="note",
            )
    search = _shown(lambda query: _results(gallery.search(query)))
    gr.on([button.click, query.submit], search, query, found, api_name="search")
    image.input(_shown(by_image), image, found, api_name="search_by_image", preprocess=False)
    if examples:
        with examples_at:
            _example_queries(query, found, search)
    return search, query, found


def _classify_tab(gallery: Gallery, pictures: list[ExamplePicture]) -> None:
    def classify(picture: Picture, labels: str, template: str) -> dict[str, float]:
        return gallery.classify(_decode(picture), labels.splitlines(), template)

    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = _picture_field("classify_image")
            examples = _example_pictures(pictures) if pictures else None
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
    if examples is not None:

        def classify_example(index: int) -> tuple[Any, ...]:
            path, labels, _ = pictures[index]
            return path, labels, "{}", classify(path, labels, "{}")

        examples.click(_shown(classify_example), examples, [*inputs, probabilities], api_visibility="private")


def _heat_map_tab(gallery: Gallery, pictures: list[ExamplePicture]) -> None:
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
            examples = _example_pictures(pictures) if pictures else None
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
    if examples is not None:

        def map_example(index: int) -> tuple[Any, ...]:
            path, _, caption = pictures[index]
            return path, caption, *heat_map(path, caption)

        examples.click(_shown(map_example), examples, [*inputs, *outputs], api_visibility="private")


def _compare_tab(galleries: Sequence[tuple[str, Gallery]], examples: bool) -> None:
    if len(galleries) == 1:
        gr.Markdown(
            "To compare two checkpoints, start the demo with `--compare FOLDER_OR_HUB_ID`. After `make quickstart`, "
            "`--compare runs/quickstart/stage2-raw` is a model whose LLM was not fine-tuned in stage 1."
        )
        return
    with gr.Row(equal_height=True):
        query = gr.Textbox(label="Caption", scale=5, elem_id="compare_query")
        button = gr.Button("Compare", variant="primary", scale=1, elem_id="compare_button")
    outputs: list[Any] = []
    examples_at = gr.Row()
    with gr.Row():
        for index, (name, gallery) in enumerate(galleries):
            with gr.Column():
                gr.Markdown(f"**{name}**  \n{' · '.join(_facts(gallery.model))}")
                outputs.append(_found_gallery(f"compare_{index}", 3))
    search = _shown(lambda query: [_results(gallery.search(query, 9)) for _, gallery in galleries])
    gr.on([button.click, query.submit], search, query, outputs, api_name="compare")
    if examples:
        with examples_at:
            _example_queries(query, outputs, search)


def _picture_field(identity: str, label: str = "Picture", height: int = 300) -> gr.Image:
    """Build an upload field for a picture.

    Events with such an input pass `preprocess=False`: gradio's own preprocessing opens the file with Pillow, and
    reports a damaged one as "Error" only. `decode_image` reports the reason.
    """
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height,
        elem_id=identity, elem_classes="picture", buttons=[],
    )  # fmt: skip


def _found_gallery(identity: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        label="Found", show_label=False, columns=columns, height="auto", object_fit="contain", interactive=False,
        elem_id=identity, elem_classes="found", buttons=[],
    )  # fmt: skip


def _example_queries(query: gr.Textbox, outputs: Any, search: Callable[..., Any]) -> None:
    for language, queries in QUERIES.items():
        gr.Examples(
            queries, query, outputs, search, run_on_click=True, cache_examples=False, label=language,
            api_visibility="private",
        )  # fmt: skip


def _example_pictures(pictures: list[ExamplePicture]) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(visible=False, type="filepath")], samples=[[path] for path, _, _ in pictures],
        type="index", label="Examples", elem_classes="examples",
    )  # fmt: skip


def _results(found: Sequence[ShownImage]) -> Any:
    pairs = [(image, f"{score:.2f} · {name}" if name else f"{score:.2f}") for image, name, score in found]
    return gr.update(value=pairs, selected_index=None)


def _decode(picture: Picture) -> Image.Image:
    if picture is None:
        raise ValueError("There is no picture yet: upload one, or choose an example.")
    path = picture if isinstance(picture, str) else picture.get("path")
    if path is None:
        raise ValueError(ONLY_UPLOADS)
    return decode_image(path, Path(path).name)


def _save_examples(gallery: Gallery, folder: Path) -> list[ExamplePicture]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (labels, caption) in EXAMPLE_IMAGES.items():
        image = gallery.find(name)
        if image is not None:
            path = folder / f"{name.replace(' ', '-')}.png"
            image.save(path)
            pictures.append((str(path), labels, caption))
    return pictures


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the ValueErrors of a function, which a visitor can correct, as messages on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error

    return wrapped
