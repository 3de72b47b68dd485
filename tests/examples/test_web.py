"""The page that searches in the browser, in headless Chromium, from a server of files alone."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from llm2clip import load_encoder
from llm2clip.hub import export_onnx
from tests import node
from tests.examples.conftest import Run, open_browser
from tests.examples.test_app import ARTEFACTS, requests
from tests.llm2clip.hub.test_onnx_layouts import teach
from tests.llm2clip.tiny import CONCEPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUERIES = ("a penguin", "  a train ")
COUNT = 60


class Files(SimpleHTTPRequestHandler):
    """A server of files that says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_page_finds_what_torch_finds(fitted: Path, chromium: tuple[str, str], run: Run, tmp_path: Path) -> None:
    model = Path(shutil.copytree(fitted, tmp_path / "llm2clip"))
    teach(model, "static")
    site = tmp_path / "site"
    node.install(site)
    export_onnx.run(
        export_onnx.ExportOnnxConfig(str(model), str(site / "model"), "transformers.js", ["text"], dtype="int8")
    )
    rows = datasets.load_dataset("parquet", data_files=f"{CONCEPTS}/test.parquet", split=f"train[:{COUNT}]")
    (tmp_path / "pictures").mkdir()
    rows.to_parquet(tmp_path / "pictures" / "train.parquet")
    run("web/make_site.py", tmp_path / "pictures", "--model", model, "--output-dir", site)
    encoder = load_encoder(str(model), text_encoder="query")
    exact = encoder.encode_text(QUERIES) @ encoder.encode_image(rows["image"][:]).T

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(site))) as server, ExitStack() as stack:
        Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        browser = open_browser(*chromium)
        stack.callback(browser.quit)
        address = f"http://127.0.0.1:{server.server_port}/"
        browser.get(address)
        field = browser.find_element(By.ID, "query")
        for query, scores in zip(QUERIES, exact, strict=True):
            WebDriverWait(browser, 60).until(lambda _: field.is_enabled())
            field.clear()
            field.send_keys(query)
            WebDriverWait(browser, 60).until(lambda _, text=query: shown_query(browser) == text)
            found = [
                (int(item.get_attribute("data-row")), float(item.get_attribute("data-score")))
                for item in browser.find_elements(By.CSS_SELECTOR, "#results li")
            ]
            assert len(found) == 24
            torch.testing.assert_close(
                torch.tensor([score for _, score in found]), scores[[row for row, _ in found]], atol=0.03, rtol=0
            )
            best = [row for row, _ in found]
            assert scores[best].min() > scores.sort(descending=True).values[len(best)] - 0.06
            assert rows["caption"][best[0]] in browser.find_element(By.CSS_SELECTOR, "#results li").text
        image = browser.find_element(By.CSS_SELECTOR, "#results img")
        WebDriverWait(browser, 60).until(lambda _: int(image.get_property("naturalWidth")) > 0)
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(ARTEFACTS / "web.png"))
        assert {url for url in requests(browser) if not url.startswith((address, "data:", "blob:"))} == set()


def shown_query(browser: webdriver.Chrome) -> str | None:
    return browser.find_element(By.ID, "results").get_attribute("data-query")
