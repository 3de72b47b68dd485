"""Captions, names and queries that would be scripts, in every page that the package writes or serves, in Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from llm2clip import cli
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.session import Session
from llm2clip.quickstart import report
from llm2clip.quickstart.data import QUERY, QuickstartData
from llm2clip.quickstart.report import FinalModel
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.builders.small_runs import rows_of_concepts
from tests.examples.server import served

if TYPE_CHECKING:
    from tests.examples.browser import Browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
    pictures = rows_of_concepts(f":{len(PAYLOADS)}")
    rows = pictures.select_columns("image").add_column("caption", PAYLOADS)
    for split in ("train", "validation", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def assert_nothing_ran(browser: Browser) -> None:
    assert browser.run("return window.ran ?? null") is None
    assert browser.find("[onerror], [onload], iframe[srcdoc], a[href^=javascript]") == []


def open_page(browser: Browser, path: Path) -> None:
    """Open a page that has to show all payloads as text, and no script."""
    browser.driver.get(path.as_uri())
    shown = browser.text()
    assert [payload for payload in PAYLOADS if payload not in shown] == []
    assert browser.find("script, svg, iframe") == []
    assert_nothing_ran(browser)


def test_this_browser_runs_such_scripts(browser: Browser, tmp_path: Path) -> None:
    for number, payload in enumerate(PAYLOADS[:3]):
        (tmp_path / f"{number}.html").write_text(f"<p>{payload}")
        browser.driver.get((tmp_path / f"{number}.html").as_uri())
        browser.wait(lambda: browser.run("return window.ran") == 1)


def test_the_page_of_a_search(browser: Browser, model: Path, table: Path, tmp_path: Path) -> None:
    pictures, page = tmp_path / "pictures", tmp_path / "page.html"
    pictures.mkdir()
    for payload in PAYLOADS:
        if "/" not in payload:
            rows_of_concepts(":1")[0]["image"].save(pictures / f"{payload}.png")
    for folder, options in ((table, ["--split", "test"]), (pictures, [])):
        index = str(tmp_path / f"index-{folder.name}")
        made = ["index", str(folder), "--model", str(model), "--output-dir", index, "--num-workers", "0", *options]
        assert cli.main(made) == 0
        assert cli.main(["search", index, *PAYLOADS, "--html", str(page)]) == 0
        open_page(browser, page)


def test_the_report_of_a_quickstart(
    browser: Browser, model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = LLM2CLIPModel.from_pretrained(model)
    (tmp_path / "llm2clip").symlink_to(model)
    data = QuickstartData.find(str(table), ["caption"], "image")

    def lookup(captions: list[str]) -> torch.Tensor:
        return clip.text_model.encode(captions, tiny.processor().tokenizer)

    monkeypatch.setattr(report, "NUM_QUERIES", 3 * len(PAYLOADS))
    settings = {"profile": NAME, "seed": 0, "llm": NAME, "vision_model": NAME, "data": NAME, "payloads": PAYLOADS}
    results: dict[str, Any] = {"settings": settings, "seconds": {NAME: 1}, "best_text_encoder": PAYLOADS[3]}
    results |= {"protocol": dict.fromkeys(PAYLOADS, NAME), "machine": {"threads": NAME, "processor": NAME}}
    results |= {"text_encoders": [PAYLOADS[3]], "caption_retrieval": {PAYLOADS[3]: {}}, "image_retrieval": {}}
    found = {"query": PAYLOADS[0], "rows": [0], "right": [True]}
    results["typed_queries"] = {"queries": 1, "first": 1, "found": 1, "shown": 1, "results": [found]}
    retrieval = RetrievalData.from_source(data.test_source())
    encoder = StoredEncoder(clip.eval(), tiny.processor(), lookup)
    embeds = Session(encoder).embed_images(retrieval.images)
    final = FinalModel(clip.eval(), tiny.processor(), encoder, data, retrieval, embeds, list(range(len(embeds))))
    report.write_report(tmp_path / "report.html", results, {QUERY: "caption"}, final)
    open_page(browser, tmp_path / "report.html")
    assert {element.text for element in browser.find(".query")} == set(PAYLOADS)


def test_the_demo(browser: Browser, model: Path, table: Path, tmp_path: Path) -> None:
    broken, good = tmp_path / f"{NAME}.png", tmp_path / "good.png"
    broken.write_bytes(b"no picture")
    rows_of_concepts(":1")[0]["image"].save(good)
    options = ["--model", model, "--data", table, "--compare", model]
    with served("-m", "llm2clip", "demo", *options, folder=tmp_path) as (address, _):
        browser.driver.get(address)
        browser.wait(lambda: browser.find("#search_button"))
        browser.type("query", PAYLOADS[1])
        browser.click("#search_button")
        browser.wait(lambda: [payload for payload in PAYLOADS if f"· {payload}" not in browser.text()] == [])
        assert_nothing_ran(browser)
        browser.upload("query_image", broken)
        browser.wait(lambda: "cannot be used" in browser.text())
        assert_nothing_ran(browser)
        browser.open_tab("Classify")
        browser.type("labels", "\n".join(PAYLOADS[1:3]))
        browser.upload("classify_image", good)
        browser.wait(lambda: browser.find("#classify_image img"))
        browser.click("#classify_button")
        browser.wait(lambda: browser.find("#probabilities")[0].text.count("%") == 2)
        assert_nothing_ran(browser)
        browser.open_tab("Search")
        browser.wait(lambda: browser.labels("found_1"))
        assert NAME in browser.text()
        assert_nothing_ran(browser)
