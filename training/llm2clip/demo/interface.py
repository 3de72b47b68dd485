"""The web page of the demo: three tabs for one or two galleries."""

from __future__ import annotations

import functools
import html
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from llm2clip.data import decode_image
from llm2clip.demo.gallery import Gallery, ShownImage
from llm2clip.encoders import Encoder, OurEncoder
from llm2clip.encoders.query_encoder import QueryTextEncoder
from llm2clip.models.places import model_name

TITLE = "LLM2CLIP"
# The pictures of visitors are deleted after a day; seconds between two looks, and their age.
DELETE_EVERY_AFTER = (3600, 86400)
# The same whatever was sent, so that it does not say which files and addresses exist.
ONLY_UPLOADS = "Upload the picture itself: nothing but an uploaded picture is opened."
# The model answers one visitor after another.
ONE_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# Queries for the bundled images.
QUERIES = {
    "English": ["someone riding a bicycle up a hill", "a monkey covering its mouth", "a woman in a police uniform"],
    "Deutsch": ["ein Surfer auf einer Welle", "Ein Mountainbiker in den Bergen", "Eine Pizza"],
    "Français": ["personne faisant du surf", "policière", "crayon pastel"],
}
# Labels for images that nothing is known about.
ANYTHING = ["a person", "an animal", "a building", "food", "a vehicle", "a landscape"]
# The least similarity that a heat map shows, from -1 to 1; below it, the background is as red as the picture.
CLEAR = 0.3
E_MAIL = re.compile(r"\S@\S")
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
.found .grid-wrap { padding-top: 2.4rem; }
.found > label { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.found .thumbnail-lg { background: #fff; } .found .thumbnail-lg img { padding: 8px 8px 38px; }
.found .caption-label { left: 0; right: 0; bottom: 0; max-width: none; border: 0; font-size: .75rem; }
.found .caption-label { text-align: center; white-space: normal; line-height: 1.2; min-height: 2.6rem; }
@media (width < 640px) { .found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
[data-testid="status-tracker"]:has(.error) { display: none; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
"""
# With the fonts of the visitor's system.
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", radius_size="md", font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)  # fmt: skip

# The path of an example, or what gradio passes for an uploaded file with `preprocess=False`.
Picture: TypeAlias = Path | dict[str, Any] | None
# Path of an example picture, labels for it (one per line), and its caption.
ExamplePicture: TypeAlias = tuple[Path, str, str]


class Examples(NamedTuple):
    """Queries by the heading that they are shown below, and pictures."""

    queries: dict[str, list[str]]
    pictures: list[ExamplePicture]


class Page(gr.Blocks):
    """A page whose fields take what they show, whatever a program sends for them."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        """Check the values of all fields before gradio, which fetches addresses and says which files exist."""
        taken = [_taken(field, value) for field, value in zip(block_fn.inputs, inputs, strict=False)]
        return await super().preprocess_data(block_fn, taken, *arguments, **options)


def _taken(field: gr.components.Component, value: Any) -> Any:
    if isinstance(field, gr.Image):
        # Without `meta`, by which gradio knows a file that it would fetch.
        return {"path": _uploaded(value)} if value is not None else None
    if isinstance(field, gr.Dataset):
        if type(value) is not int or not 0 <= value < len(field.samples):
            _refuse(f"There is no such example: send a number from 0 to {len(field.samples) - 1}.")
    elif not isinstance(value, str):
        _refuse(f"{field.label} has to be a text.")
    return value


def build_interface(galleries: Sequence[Gallery], is_bundled: bool, example_dir: Path) -> gr.Blocks:
    """Build the page.

    Args:
        galleries: The images with one or two models; all tabs but "Search" use the first.
        is_bundled: The images are the bundled ones, with example queries of their own.
        example_dir: Folder for the files of the example pictures.
    """
    gallery = galleries[0]
    examples = find_examples(gallery, is_bundled, example_dir)
    with Page(
        title=f"{TITLE} demo", analytics_enabled=False, fill_width=True, delete_cache=DELETE_EVERY_AFTER
    ) as page:
        gr.HTML(_head(gallery), elem_id="head")
        with gr.Tab("Search", id="search"):
            start = _search_tab(galleries, examples)
        with gr.Tab("Classify", id="classify"):
            _classify_tab(gallery, examples.pictures[:MAX_EXAMPLE_PICTURES])
        if gallery.has_heat_maps:
            with gr.Tab("Heat map", id="heat_map"):
                _heat_map_tab(gallery, _clear_examples(gallery, examples.pictures))
        if is_bundled:
            gr.Markdown(CREDITS, elem_classes="note")
        page.load(*start, api_visibility="private", **ONE_QUEUE)
    return page


def find_examples(gallery: Gallery, is_bundled: bool, folder: Path) -> Examples:
    """Choose example queries, and save the best picture of each, which is shown with the caption that it has."""
    texts = itertools.chain(*QUERIES.values()) if is_bundled else ANYTHING
    chosen: dict[bytes, tuple[Image.Image, str]] = {}
    for text in texts:
        for image, name, _ in gallery.search(text, 1):
            caption = " ".join(name.split()) if gallery.has_captions else ""
            usable = 0 < len(caption) <= MAX_EXAMPLE_CHARACTERS and not E_MAIL.search(caption)
            caption = caption if usable else text
            chosen.setdefault(image.tobytes(), (image, caption))
    captions = list(dict.fromkeys(caption for _, caption in chosen.values()))
    labels = "\n".join(captions if len(captions) > 1 else ANYTHING)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, (image, caption) in enumerate(chosen.values()):
        image.save(folder / f"{number}.png")
        pictures.append((folder / f"{number}.png", labels, caption))
    queries = {"Captions of these pictures": captions} if gallery.has_captions and captions else {"Examples": ANYTHING}
    return Examples(QUERIES if is_bundled else queries, pictures)


def _clear_examples(gallery: Gallery, pictures: Sequence[ExamplePicture]) -> list[ExamplePicture]:
    """Choose the pictures whose heat maps show where the caption matches, clearest first, and the best in any case."""
    clarity = {one: gallery.map_clarity(decode_image(one[0].read_bytes()), one[2]) for one in pictures}
    ranked = sorted(pictures, key=lambda one: -clarity[one])
    return [one for one in ranked[:MAX_EXAMPLE_PICTURES] if one == ranked[0] or clarity[one] > CLEAR]


def _head(gallery: Gallery) -> str:
    encoder = gallery.encoder
    reader = "A large language model" if isinstance(encoder, OurEncoder) else "A text tower"
    if isinstance(encoder, QueryTextEncoder):
        reader = "A small text model, taught by a large language model,"
    facts = [model_name(encoder.name), *_facts(encoder), f"{len(gallery):,} images"]
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
        title = f"Found for: {query}" if isinstance(query, str) else "Similar to your picture"
        results = [_results(gallery.search(query), title) for gallery in galleries]
        return results if len(results) > 1 else results[0]

    def by_image(picture: Picture) -> Any:
        return search(_decode(picture)) if picture else gr.skip()

    def by_example(queries: list[str], index: int) -> tuple[Any, ...]:
        found = search(queries[index])
        return queries[index], *(found if len(galleries) > 1 else [found])

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
    gr.on([button.click, query.submit], shown, query, outputs, api_name="search", **ONE_QUEUE)
    image.input(_shown(by_image), image, outputs, api_name="search_by_image", preprocess=False, **ONE_QUEUE)
    with examples_at:
        for heading, queries in examples.queries.items():
            chooser = _chooser(gr.Textbox(visible=False), queries, heading)
            search_example = _shown(functools.partial(by_example, queries))
            chooser.click(search_example, chooser, [query, *outputs], api_visibility="private", **ONE_QUEUE)
    return shown, query, outputs


def _results_field(gallery: Gallery, number: int, count: int) -> gr.Gallery:
    """Build the field of what one of `count` models finds."""
    with gr.Column(min_width=240):
        if count > 1:
            gr.Markdown(f"**{model_name(gallery.encoder.name)}**  \n{' · '.join(_facts(gallery.encoder))}")
        return gr.Gallery(
            label="Found", columns=5 - count, height="auto", object_fit="contain", interactive=False,
            elem_id=f"found_{number}", elem_classes="found", buttons=["download", "fullscreen"],
        )  # fmt: skip


def _classify_tab(gallery: Gallery, pictures: Sequence[ExamplePicture]) -> None:
    def classify(picture: Picture, labels: str, template: str) -> dict[str, float]:
        return gallery.classify(_decode(picture), labels.splitlines(), template)

    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = _picture_field("classify_image")
            chooser = _picture_chooser(pictures)
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
    button.click(_shown(classify), inputs, probabilities, api_name="classify", preprocess=False, **ONE_QUEUE)

    def classify_example(index: int) -> tuple[Any, ...]:
        path, labels, _ = pictures[index]
        return path, labels, "{}", classify(path, labels, "{}")

    shown = [*inputs, probabilities]
    chooser.click(_shown(classify_example), chooser, shown, api_visibility="private", **ONE_QUEUE)


def _heat_map_tab(gallery: Gallery, pictures: Sequence[ExamplePicture]) -> None:
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
            chooser = _picture_chooser(pictures)
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
    gr.on(
        [button.click, caption.submit], _shown(heat_map), inputs, outputs, api_name="heat_map", preprocess=False,
        **ONE_QUEUE,
    )  # fmt: skip

    def map_example(index: int) -> tuple[Any, ...]:
        path, _, caption = pictures[index]
        return path, caption, *heat_map(path, caption)

    chooser.click(_shown(map_example), chooser, [*inputs, *outputs], api_visibility="private", **ONE_QUEUE)


def _picture_field(identity: str, label: str = "Picture", height: int = 300) -> gr.Image:
    """Build an upload field for a picture.

    Events with such an input pass `preprocess=False`: gradio's own preprocessing opens the file with Pillow, and
    reports a damaged one as "Error" only. `decode_image` reports the reason.
    """
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height,
        elem_id=identity, elem_classes="picture", buttons=[],
    )  # fmt: skip


def _picture_chooser(pictures: Sequence[ExamplePicture]) -> gr.Dataset:
    return _chooser(gr.Image(visible=False, type="filepath"), [str(path) for path, _, _ in pictures], "Examples")


def _chooser(field: gr.components.Component, values: list[str], label: str) -> gr.Dataset:
    return gr.Dataset(
        components=[field], samples=[[value] for value in values], type="index", label=label, elem_classes="examples"
    )


def _results(images: Sequence[ShownImage], title: str) -> Any:
    pairs = [(image, f"{score:.2f} · {name}" if name else f"{score:.2f}") for image, name, score in images]
    return gr.update(value=pairs, label=title, selected_index=None)


def _decode(picture: Picture) -> Image.Image:
    if picture is None:
        raise ValueError("There is no picture yet: upload one, or choose an example.")
    path = picture if isinstance(picture, Path) else Path(_uploaded(picture))
    # Its bytes: `decode_image` would open whatever a path says.
    return decode_image(path.read_bytes(), path.name)


def _uploaded(picture: Any) -> str:
    """Return the real path of a file that a visitor uploaded, or was shown."""
    try:
        path = os.path.realpath(picture["path"])
    except (TypeError, KeyError, ValueError):  # it is no path
        _refuse(ONLY_UPLOADS)
    if not (Path(path).is_relative_to(os.path.realpath(get_upload_folder())) and os.path.isfile(path)):
        _refuse(ONLY_UPLOADS)
    return path


def _refuse(message: str) -> NoReturn:
    raise gr.Error(message, title="", print_exception=False)


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the ValueErrors of a function, which a visitor can correct, as messages on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            _refuse(str(error))

    return wrapped
