"""A tiny model fitted to a few of the bundled pictures, so that what an example prints can be right or wrong."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from selenium import webdriver
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from modeling_llm2clip import LLM2CLIPProcessor, with_prompt
from tests.llm2clip.tiny import CONCEPTS
from tests.modeling_llm2clip import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
# Its subject stands behind the first 77 tokens.
LONG_CAPTION = (
    "We walked through the zoo for hours and hours in the rain, past the lions, who slept, and past the elephants, "
    "who did not look at us at all, until we came to a bird that cannot fly: a penguin."
)
# Row of the test split: caption.
FITTED = {19: "a leaf", 54: "a crocodile", 67: "a penguin", 213: "a train", 326: "a teddy bear", 65: LONG_CAPTION}

Run = Callable[..., str]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    torch.manual_seed(0)
    tokenizer, _ = with_prompt(tiny.plain_tokenizer(), tiny.PREFIX, tiny.SUFFIX, max_length=400)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LLM2CLIPProcessor(image_processor, tokenizer)
    model = tiny.joint_model(text=tiny.text_config(max_text_length=400))
    ids = tokenizer(LONG_CAPTION, add_special_tokens=False)["input_ids"]
    pairs = FITTED | {0: tokenizer.decode(ids[:77])}
    rows = datasets.load_dataset("parquet", data_files=f"{CONCEPTS}/test.parquet", split="train")
    others = [row for row, source in enumerate(rows["source"]) if source == "emoji-google" and row not in pairs]
    images = rows.select([*pairs, *others])["image"][:]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    texts = model.text_model.encode(list(pairs.values()), tokenizer)
    optimizer = torch.optim.Adam([*model.vision_model.parameters(), *model.text_adapter.parameters()], lr=5e-3)
    for _ in range(200):
        image_embeds = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        text_embeds = F.normalize(model.get_text_features(llm_embeds=texts).pooler_output, dim=-1)
        loss = F.cross_entropy(14 * text_embeds @ image_embeds.T, torch.arange(len(texts)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("fitted")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in an empty folder, in this process: importing the libraries takes longer than most examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(script: str, *arguments: str | Path) -> str:
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """Paths of the browser and its driver."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no chromium with its driver; on Debian: apt-get install chromium chromium-driver")
    return browser, driver


def open_browser(browser: str, driver: str) -> webdriver.Chrome:
    """Start the browser without a window; its log has the addresses that it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,960"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
