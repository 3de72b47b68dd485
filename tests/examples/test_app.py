"""The demo in headless Chromium: typing, uploading and the resulting page. Screenshots: `build/artefacts/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoProcessor

from llm2clip.demo.demo import DemoConfig, open_images
from llm2clip.demo.gallery import Gallery
from modeling_llm2clip import LLM2CLIPModel
from tests.builders.small_runs import rows_of_concepts
from tests.examples.conftest import FITTED
from tests.examples.server import served

if TYPE_CHECKING:
    from tests.examples.browser import Browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROW, NAME = 326, "teddy bear"
QUERY = FITTED[ROW]


@pytest.fixture(scope="module")
def opposite(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ranks images in the reverse order of the other."""
    clip = LLM2CLIPModel.from_pretrained(fitted)
    with torch.no_grad():
        clip.visual_projection.weight.neg_()
    folder = tmp_path_factory.mktemp("opposite")
    clip.save_pretrained(folder)
    AutoProcessor.from_pretrained(fitted).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(fitted: Path, opposite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("run")
    with served("-m", "llm2clip", "demo", "--model", fitted, "--compare", opposite, folder=folder) as (address, _):
        yield address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Browser]:
    """The demo, which asks no other server for anything."""
    browser.driver.get(address)
    browser.wait(lambda: len(browser.labels("found_0")) == 12)  # the results of the first example
    yield browser
    assert browser.other_addresses(address) == set()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    rows_of_concepts()[ROW]["image"].convert("RGB").save(path)
    return path


def test_a_typed_caption_and_an_uploaded_picture_find_the_right_picture_first(page: Browser, picture: Path) -> None:
    before = page.labels("found_0")
    page.type("query", QUERY)
    page.click("#search_button")
    found = page.wait(lambda: (now := page.labels("found_0")) != before and len(now) == 12 and now)
    assert found[0].endswith(f"· {NAME}")
    scores = [float(text.split(" · ")[0]) for text in found]
    assert scores == sorted(scores, reverse=True)
    page.wait(lambda: len(page.pictures("#found_0")) >= 12)
    page.shoot("demo_search")
    page.upload("query_image", picture)
    page.wait(lambda: page.labels("found_0")[:1] == [f"1.00 · {NAME}"])


def test_results_say_what_they_are_and_open_their_pictures(page: Browser) -> None:
    title = page.run("return document.querySelector('#found_0 > label').textContent")
    assert "someone riding a bicycle up a hill" in title
    page.click("#found_0 .thumbnail-item")
    assert page.wait(lambda: page.find("#found_0 button[title=Fullscreen], #found_0 button[title=Download]"))
    page.wait(lambda: len(page.pictures("#found_0 .thumbnails")) >= 3)
    heights = page.run("""return [...document.querySelectorAll('#found_0 .thumbnails img')].map(picture =>
        picture.clientHeight - 2 * parseFloat(getComputedStyle(picture).paddingBottom))""")
    assert min(heights) > 20


def test_an_error_leaves_the_results(page: Browser) -> None:
    before = page.labels("found_0")
    page.type("query", " ")
    page.click("#search_button")
    page.wait(lambda: "There is no caption yet" in page.text())
    assert page.labels("found_0") == before
    (first, *_) = page.find("#found_0 .thumbnail-item")
    page.wait(
        lambda: page.run(
            """const place = arguments[0].getBoundingClientRect();
        return arguments[0].contains(document.elementFromPoint(place.x + 40, place.y + 40))""",
            first,
        )
    )


def test_the_page_fits_a_phone_and_hides_where_models_are(page: Browser, fitted: Path, opposite: Path) -> None:
    assert [folder.name in page.text() for folder in (fitted, opposite)] == [True] * 2
    assert [str(folder) in page.text() for folder in (fitted, opposite)] == [False] * 2
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for name in ("Search", "Classify", "Heat map"):
        page.open_tab(name)
        if name == "Heat map":
            page.wait(lambda: page.pictures(".gallery-item"))[0].click()
            page.wait(lambda: page.pictures("#heat_map"))
        assert page.run("return document.documentElement.scrollWidth") <= 390
        page.shoot(f"demo_phone_{name.replace(' ', '_').lower()}")


def test_an_uploaded_picture_is_classified(page: Browser, picture: Path) -> None:
    page.open_tab("Classify")
    page.click("#classify_button")
    page.wait(lambda: "There is no picture yet" in page.text())
    page.type("labels", f"a penguin\n{QUERY}\na train")
    page.upload("classify_image", picture)
    page.wait(lambda: page.find("#classify_image img"))
    page.click("#classify_button")
    result = page.wait(lambda: (text := page.find("#probabilities")[0].text).count("%") == 3 and text)
    assert next(line for line in result.splitlines() if line.startswith("a ")) == QUERY
    page.shoot("demo_classify")


def test_an_example_picture_gets_a_heat_map(page: Browser) -> None:
    page.open_tab("Heat map")
    page.wait(lambda: page.pictures(".gallery-item"))[0].click()
    page.wait(lambda: page.pictures("#heat_map"))
    assert "4 × 4 patches" in page.text()
    page.shoot("demo_heat_map")


def test_two_checkpoints_are_compared_side_by_side(
    page: Browser, fitted: Path, opposite: Path, tmp_path: Path
) -> None:
    before = page.labels("found_1")
    page.type("query", QUERY)
    page.click("#search_button")
    page.wait(lambda: page.labels("found_1") != before)
    for side, folder in (("found_0", fitted), ("found_1", opposite)):
        found = Gallery.open(str(folder), open_images(DemoConfig()), tmp_path).search(QUERY)
        shown = [caption.split(" · ") for caption in page.labels(side)]
        assert [name for _, name in shown] == [hit.name for hit in found]
        assert [float(score) for score, _ in shown] == pytest.approx([hit.score for hit in found], abs=0.006)
        assert (found[0].name == NAME) == (folder == fitted)
    page.shoot("demo_compare")
