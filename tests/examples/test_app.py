"""The demo in headless Chromium: typing, uploading and the resulting page. Screenshots: `build/artefacts/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from torch.nn import functional as F

from llm2clip.demo.demo import DemoConfig, open_images
from llm2clip.demo.gallery import Gallery
from modeling_llm2clip import LLM2CLIPModel
from tests.examples.conftest import open_browser
from tests.examples.server import serving
from tests.llm2clip import tiny as training
from tests.modeling_llm2clip import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "build" / "artefacts"
QUERY = "person surfing"
KNOWN = (QUERY, "camera", "red heart", "penguin", "monorail", "crayon", "person mountain biking", "eagle")
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def table() -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=f"{training.CONCEPTS}/test.parquet", split="train")


@pytest.fixture(scope="module")
def model(chromium: tuple[str, str], table: datasets.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has memorized which images belong to a few captions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    clip: LLM2CLIPModel = tiny.joint_model()
    processor = tiny.processor()
    pixels = processor(images=[image.convert("RGB") for image in table["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        llm_embeds = clip.text_model(**processor(text=list(KNOWN), return_tensors="pt")).pooler_output
    right = torch.tensor([[name == caption for name in table["caption"]] for caption in KNOWN])
    parts = (clip.vision_model, clip.visual_projection, clip.text_adapter)
    optimizer = torch.optim.AdamW([weight for part in parts for weight in part.parameters()], lr=2e-3)
    for _ in range(300):
        images = F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1)
        texts = F.normalize(clip.get_text_features(llm_embeds=llm_embeds).pooler_output, dim=-1)
        log_probabilities = (20 * texts @ images.T).log_softmax(dim=-1)
        loss = -(log_probabilities * right).sum() / right.sum()
        first = log_probabilities.argmax(dim=-1)
        if all(right[row, column] for row, column in enumerate(first.tolist())) and loss < 1.5:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        pytest.fail(f"the tiny model has not learned its captions; the loss is {loss:.2f}")
    clip.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opposite(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ranks images in the reverse order of the other."""
    clip = LLM2CLIPModel.from_pretrained(model)
    with torch.no_grad():
        clip.visual_projection.weight.neg_()
    folder = tmp_path_factory.mktemp("opposite")
    clip.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path, opposite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("run")
    with serving(ROOT / "examples" / "app.py", "--model", model, "--compare", opposite, folder=folder) as address:
        yield address


@pytest.fixture
def browser(address: str, chromium: tuple[str, str]) -> Iterator[webdriver.Chrome]:
    browser = open_browser(*chromium)
    try:
        browser.get(address)
        wait(browser, lambda: len(captions(browser, "found_0")) == 12)  # the results of the first example
        yield browser
        assert {url for url in requests(browser) if not url.startswith((address, "data:", "blob:"))} == set()
    finally:
        browser.quit()


def wait(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, WAIT_SECONDS).until(lambda _: condition())


def requests(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def shoot(browser: webdriver.Chrome, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(ARTEFACTS / f"demo_{name}.png"))


def type_text(browser: webdriver.Chrome, identity: str, text: str) -> None:
    field = browser.find_element(By.CSS_SELECTOR, f"#{identity} textarea, #{identity} input")
    field.clear()
    field.send_keys(text)


def open_tab(browser: webdriver.Chrome, name: str) -> None:
    tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
    next(tab for tab in tabs if tab.text == name).click()


def captions(browser: webdriver.Chrome, identity: str) -> list[str]:
    # In one call, so that the page does not change between two labels.
    script = "return [...document.querySelectorAll(arguments[0])].map(label => label.textContent.trim())"
    return browser.execute_script(script, f"#{identity} .caption-label")


def upload(browser: webdriver.Chrome, identity: str, path: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, f"#{identity} input[type=file]").send_keys(str(path))


@pytest.fixture
def picture(table: datasets.Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    table[table["caption"].index("camera")]["image"].convert("RGB").save(path)
    return path


def shown(element: WebElement) -> bool:
    return element.is_displayed() and int(element.get_property("naturalWidth")) > 0


def test_a_typed_caption_finds_the_right_picture_first(browser: webdriver.Chrome) -> None:
    before = captions(browser, "found_0")
    type_text(browser, "query", QUERY)
    browser.find_element(By.ID, "search_button").click()
    found = wait(browser, lambda: (now := captions(browser, "found_0")) != before and len(now) == 12 and now)
    assert found[0].endswith(f"· {QUERY}")
    scores = [float(text.split(" · ")[0]) for text in found]
    assert scores == sorted(scores, reverse=True)
    wait(browser, lambda: all(map(shown, browser.find_elements(By.CSS_SELECTOR, "#found_0 img"))))
    shoot(browser, "search")


def test_an_uploaded_picture_is_its_own_first_result(browser: webdriver.Chrome, picture: Path) -> None:
    upload(browser, "query_image", picture)
    wait(browser, lambda: "1.00 · camera" in captions(browser, "found_0")[:1])
    shoot(browser, "search_by_image")


def test_an_uploaded_picture_is_classified(browser: webdriver.Chrome, picture: Path) -> None:
    open_tab(browser, "Classify")
    wait(browser, lambda: browser.find_element(By.ID, "classify_button").is_displayed())
    type_text(browser, "labels", "camera\npenguin\nmonorail")
    browser.find_element(By.ID, "classify_button").click()
    wait(browser, lambda: "There is no picture yet" in browser.find_element(By.TAG_NAME, "body").text)
    upload(browser, "classify_image", picture)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#classify_image img"))
    browser.find_element(By.ID, "classify_button").click()
    result = wait(
        browser, lambda: (text := browser.find_element(By.ID, "probabilities").text).count("%") == 3 and text
    )
    labels = [line for line in result.splitlines() if line in ("camera", "penguin", "monorail")]
    assert labels[0] == "camera"
    shoot(browser, "classify")


def test_an_example_picture_gets_a_heat_map(browser: webdriver.Chrome) -> None:
    open_tab(browser, "Heat map")
    examples = wait(browser, lambda: list(filter(shown, browser.find_elements(By.CSS_SELECTOR, ".gallery-item img"))))
    examples[0].click()
    wait(browser, lambda: any(map(shown, browser.find_elements(By.CSS_SELECTOR, "#heat_map img"))))
    assert "4 × 4 patches" in browser.find_element(By.TAG_NAME, "body").text
    shoot(browser, "heat_map")


def test_two_checkpoints_are_compared_side_by_side(
    browser: webdriver.Chrome, model: Path, opposite: Path, tmp_path: Path
) -> None:
    before = captions(browser, "found_1")
    type_text(browser, "query", QUERY)
    browser.find_element(By.ID, "search_button").click()
    wait(browser, lambda: captions(browser, "found_1") != before)
    for side, folder in (("found_0", model), ("found_1", opposite)):
        found = Gallery.open(str(folder), open_images(DemoConfig()), tmp_path).search(QUERY)
        shown = [caption.split(" · ") for caption in captions(browser, side)]
        assert [name for _, name in shown] == [hit.name for hit in found]
        assert [float(score) for score, _ in shown] == pytest.approx([hit.score for hit in found], abs=0.006)
        assert (found[0].name == QUERY) == (folder == model)
    shoot(browser, "compare")
