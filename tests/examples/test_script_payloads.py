"""Captions, names and queries that would be scripts, in every page that the package writes or serves, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from llm2clip import cli
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.session import Session
from llm2clip.quickstart import report
from llm2clip.quickstart.config import Arm, QuickstartConfig
from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.image_steps import FinalModel
from modeling_llm2clip import LLM2CLIPModel
from tests.examples.conftest import open_browser
from tests.examples.server import serving
from tests.llm2clip import tiny as training
from tests.modeling_llm2clip import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 60
# What each would set if it ran: window.ran, which no page has.
PAYLOADS = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "<svg onload=window.ran=1></svg>",
    "'\"><script>window.ran=1</script>",
    "' onerror='window.ran=1' x='",
    "</title></style></pre><script>window.ran=1</script>",
    "[link](javascript:window.ran=1) ![p](x)",
    '<iframe srcdoc="<script>parent.ran=1</script>"></iframe>',
    "{{constructor.constructor('window.ran=1')()}}",
    "<!--><script>window.ran=1</script>",
]
NAME = "<img src=x onerror=window.ran=1>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    torch.manual_seed(0)
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundled pictures with payloads as captions, as the splits of a data set."""
    folder = tmp_path_factory.mktemp("table")
    pictures = datasets.load_dataset("parquet", data_files=f"{training.CONCEPTS}/test.parquet", split="train")
    rows = pictures.select_columns("image").select(range(len(PAYLOADS))).add_column("caption", PAYLOADS)
    for split in ("train", "validation", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def browser(chromium: tuple[str, str]) -> Iterator[webdriver.Chrome]:
    browser = open_browser(*chromium)
    try:
        yield browser
    finally:
        browser.quit()


def text_of(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.documentElement.textContent"))


def assert_nothing_ran(browser: webdriver.Chrome) -> None:
    assert browser.execute_script("return window.ran ?? null") is None
    made = "return [...document.querySelectorAll('[onerror],[onload],iframe[srcdoc],a[href^=javascript]')]"
    assert browser.execute_script(f"{made}.map(element => element.outerHTML)") == []


def open_page(browser: webdriver.Chrome, path: Path) -> None:
    """Open a page that has to show all payloads as text, and no script."""
    browser.get(path.as_uri())
    shown = text_of(browser)
    assert [payload for payload in PAYLOADS if payload not in shown] == []
    assert browser.execute_script("return document.querySelectorAll('script, svg, iframe').length") == 0
    assert_nothing_ran(browser)


def test_this_browser_runs_such_scripts(browser: webdriver.Chrome, tmp_path: Path) -> None:
    for number, payload in enumerate(PAYLOADS[:4]):
        (tmp_path / f"{number}.html").write_text(f"<title>'{'' if number < 3 else payload}</title><p>{payload}")
        browser.get((tmp_path / f"{number}.html").as_uri())
        WebDriverWait(browser, WAIT_SECONDS).until(lambda _: browser.execute_script("return window.ran") == 1)


def test_the_page_of_a_search(browser: webdriver.Chrome, model: Path, table: Path, tmp_path: Path) -> None:
    index, page = tmp_path / "index", tmp_path / "page.html"
    options = ["--model", str(model), "--split", "test", "--output-dir", str(index), "--num-workers", "0"]
    assert cli.main(["index", str(table), *options]) == 0
    assert cli.main(["search", str(index), *PAYLOADS, "--html", str(page)]) == 0
    open_page(browser, page)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for payload in PAYLOADS:
        if "/" not in payload:
            bundled_picture().save(folder / f"{payload}.png")
    assert (
        cli.main(["index", str(folder), *options[:2], "--output-dir", str(index), "--overwrite", *options[-2:]]) == 0
    )
    assert cli.main(["search", str(index), *PAYLOADS, "--html", str(page)]) == 0
    open_page(browser, page)


def bundled_picture() -> Any:
    return datasets.load_dataset("parquet", data_files=f"{training.CONCEPTS}/test.parquet", split="train")[0]["image"]


def test_the_report_of_a_quickstart(
    browser: webdriver.Chrome, model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = LLM2CLIPModel.from_pretrained(model)
    (tmp_path / "llm2clip").symlink_to(model)
    arm = Arm("raw", PAYLOADS[3], "raw")
    run: Any = SimpleNamespace(
        folder=tmp_path, arms=[arm], cache=lambda name: tmp_path / name, config=QuickstartConfig(),
        data=QuickstartData.find(str(table), ["caption"], "image"),
    )  # fmt: skip

    def lookup(captions: list[str]) -> torch.Tensor:
        return clip.text_model.encode(captions, tiny.processor().tokenizer)

    monkeypatch.setattr(report, "NUM_QUERIES", 3 * len(PAYLOADS))
    monkeypatch.setattr(report.EmbeddingCache, "open", lambda folder: SimpleNamespace(lookup=lookup))
    monkeypatch.setattr(report, "draw_curves", lambda runs, arms: Figure())
    tables = [(payload, ([payload, payload], [[payload, payload]])) for payload in PAYLOADS]
    monkeypatch.setattr(report, "all_tables", lambda results: tables)
    settings = {"profile": NAME, "seed": 0, "llm": NAME, "vision_model": NAME, "data": NAME, "payloads": PAYLOADS}
    results = {"settings": settings, "seconds": {NAME: 1}, "machine": {"threads": NAME, "processor": NAME}, "runs": {}}
    results |= {"reading": PAYLOADS, "protocol": dict.fromkeys(PAYLOADS, NAME)}
    found = {"query": PAYLOADS[0], "rows": [0], "right": [True]}
    results["typed_queries"] = {"queries": 1, "first": 1, "found": 1, "shown": 1, "results": [found]}
    retrieval, encoder = (
        RetrievalData.from_source(run.data.test_source()),
        StoredEncoder(clip.eval(), tiny.processor(), lookup),
    )
    embeds = Session(encoder).embed_images(retrieval.images)
    final = FinalModel(clip.eval(), tiny.processor(), encoder, retrieval, embeds, list(range(len(embeds))))
    report.write_report(tmp_path / "report.html", results, run, arm, final)
    open_page(browser, tmp_path / "report.html")
    queries = {element.text for element in browser.find_elements(By.CLASS_NAME, "query")}
    assert queries == set(PAYLOADS)


def test_the_demo(browser: webdriver.Chrome, model: Path, table: Path, tmp_path: Path) -> None:
    data = ["--data", str(table), "--compare", str(model)]

    def wait(condition: Any) -> Any:
        return WebDriverWait(browser, WAIT_SECONDS).until(lambda _: condition())

    def fill(identity: str, text: str) -> None:
        field = browser.find_element(By.CSS_SELECTOR, f"#{identity} textarea, #{identity} input")
        field.clear()
        field.send_keys(text)

    def click(selector: str) -> None:
        wait(lambda: browser.find_element(By.CSS_SELECTOR, selector).is_displayed())
        browser.find_element(By.CSS_SELECTOR, selector).click()

    def open_tab(name: str) -> None:
        wait(lambda: [tab for tab in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text == name])
        next(tab for tab in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text == name).click()

    picture = tmp_path / f"{NAME}.png"
    picture.write_bytes(b"no picture")
    with serving(ROOT / "examples" / "app.py", "--model", model, *data, folder=tmp_path) as address:
        browser.get(address)
        wait(lambda: browser.find_elements(By.ID, "search_button"))
        fill("query", PAYLOADS[1])
        click("#search_button")
        wait(lambda: [payload for payload in PAYLOADS if f"· {payload}" not in text_of(browser)] == [])
        assert_nothing_ran(browser)
        browser.find_element(By.CSS_SELECTOR, "#query_image input[type=file]").send_keys(str(picture))
        wait(lambda: "cannot be used" in text_of(browser))
        assert_nothing_ran(browser)
        open_tab("Classify")
        fill("labels", "\n".join(PAYLOADS[1:3]))
        good = tmp_path / "good.png"
        bundled_picture().save(good)
        browser.find_element(By.CSS_SELECTOR, "#classify_image input[type=file]").send_keys(str(good))
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#classify_image img"))
        click("#classify_button")
        wait(lambda: browser.find_element(By.ID, "probabilities").text.count("%") == 2)
        assert_nothing_ran(browser)
        open_tab("Search")
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#found_1 .caption-label"))
        assert NAME in text_of(browser)
        assert_nothing_ran(browser)
