"""The page that searches in the browser, in headless Chromium, from a server of files alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
import torch

from llm2clip import load_encoder
from llm2clip.hub import export_onnx
from tests import node
from tests.builders.small_runs import rows_of_concepts
from tests.examples.conftest import Run
from tests.llm2clip.hub.onnx_programs import teach

if TYPE_CHECKING:
    from tests.examples.browser import Browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUERIES = ("a penguin", "  a train ")


@contextmanager
def files(folder: Path) -> Iterator[str]:
    """A server of files, by its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_page_finds_what_torch_finds(fitted: Path, browser: Browser, run: Run, tmp_path: Path) -> None:
    model = Path(shutil.copytree(fitted, tmp_path / "llm2clip"))
    teach(model, "static")
    site = tmp_path / "site"
    node.install(site)
    export_onnx.run(
        export_onnx.ExportOnnxConfig(str(model), str(site / "model"), "transformers.js", ["text"], dtype="int8")
    )
    rows = rows_of_concepts(":60")
    (tmp_path / "pictures").mkdir()
    rows.to_parquet(tmp_path / "pictures" / "train.parquet")
    run("web/make_site.py", tmp_path / "pictures", "--model", model, "--output-dir", site)
    encoder = load_encoder(str(model), text_encoder="query")
    exact = encoder.encode_text(QUERIES) @ encoder.encode_image(rows["image"][:]).T

    with files(site) as address:
        browser.driver.get(address)
        (field,), (results,) = browser.find("#query"), browser.find("#results")
        for query, scores in zip(QUERIES, exact, strict=True):
            browser.wait(field.is_enabled)
            field.clear()
            field.send_keys(query)
            browser.wait(lambda text=query: results.get_attribute("data-query") == text)
            items = browser.find("#results li")
            found = {int(item.get_attribute("data-row")): float(item.get_attribute("data-score")) for item in items}
            best = list(found)
            assert len(best) == 24
            torch.testing.assert_close(torch.tensor([*found.values()]), scores[best], atol=0.03, rtol=0)
            assert scores[best].min() > scores.sort(descending=True).values[24] - 0.06
            assert rows["caption"][best[0]] in items[0].text
        browser.wait(lambda: browser.pictures("#results"))
        browser.shoot("web")
        assert browser.other_addresses(address) == set()

        vectors = site / "index" / "vectors.bin"
        vectors.write_bytes(vectors.read_bytes()[:-1])
        browser.driver.refresh()
        browser.wait(lambda: "vectors.bin has" in browser.find("#status")[0].text)
        assert not browser.find("#query")[0].is_enabled()
