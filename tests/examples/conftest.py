"""A tiny model fitted to a few of the bundled pictures, so that what an example prints can be right or wrong."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from llm2clip.models.prompting import with_prompt
from modeling_llm2clip import LLM2CLIPProcessor
from tests.builders import tiny
from tests.builders.small_runs import rows_of_concepts

if TYPE_CHECKING:
    from tests.examples.browser import Browser

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
    rows = rows_of_concepts()
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


@pytest.fixture
def browser() -> Iterator[Browser]:
    selenium_browser = pytest.importorskip("tests.examples.browser", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("there is no chromium with its driver; on Debian: apt-get install chromium chromium-driver")
    opened = selenium_browser.Browser(program, driver)
    yield opened
    opened.driver.quit()
