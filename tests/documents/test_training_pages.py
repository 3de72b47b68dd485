"""What the pages of training show has the effect that they say, and a recipe makes what the Python beside it makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip import CaptionSource, LLM2CLIPModel
from llm2clip import main as llm2clip
from llm2clip.data import distinct_captions
from llm2clip.store import Store
from llm2clip.store.store import caption_keys
from tests.documents.reading import ROOT
from tests.documents.sessions import prepare, prepare_training, python_of, run_code, write_files
from tests.documents.stand_ins import MODEL
from tests.llm2clip.trainers.stages import assert_equal_weights

TRAINER, FROZEN, KEEP = (f"docs/train/{name}.md" for name in ("trainer", "frozen", "keep"))
CHANGE = re.compile(r"^### A new ([\w ]+): (\d+) lines?\n.*?```python\n(.*?)```", re.MULTILINE | re.DOTALL)
# What is changed -> as how many lines the page says, and the code.
CHANGES = {
    name: (int(lines), code) for name, lines, code in CHANGE.findall((ROOT / TRAINER).read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which the page about Trainers was run, and its variables."""
    folder = tmp_path_factory.mktemp("trainer")
    prepare(folder)
    write_files(TRAINER, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, run_code(python_of(TRAINER))


def trainer(page: Any, kind: str = "Stage2Trainer", **changes: Any) -> Any:
    """A Trainer of the page on the model of its first block."""
    _, variables = page
    model = changes.pop("model", None) or LLM2CLIPModel.from_pretrained(MODEL)
    arguments = {"train_dataset": variables["rows"], "processing_class": variables["processor"], **changes}
    return variables[kind](model, variables["args"], **arguments)


def test_a_change_is_as_short_as_the_page_says() -> None:
    assert {name: lines for name, (lines, _) in CHANGES.items()} == {
        "loss": 10,
        "frozen part": 1,
        "data source": 5,
        "teacher": 10,
    }
    for lines, code in CHANGES.values():
        written = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
        assert len(written) <= lines


def test_the_new_loss_is_what_is_trained(page: Any) -> None:
    rows = page[1]["rows"].select(range(8))
    plain, own = (trainer(page, kind, eval_dataset=rows) for kind in ("Stage2Trainer", "WithMargin"))
    loss, embeds = plain.compute_loss(plain.model.eval(), plain.data_collator([*rows]), return_outputs=True)
    similarity = (embeds["image_embeds"] * embeds["text_embeds"]).sum(dim=-1)
    expected = loss + 0.1 * (0.5 - similarity).clamp(min=0).mean()
    assert own.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert own.evaluate()["eval_loss"] > plain.evaluate()["eval_loss"]


def test_the_frozen_part_stays_and_the_rest_trains(page: Any) -> None:
    model, before = LLM2CLIPModel.from_pretrained(MODEL), LLM2CLIPModel.from_pretrained(MODEL)
    exec(CHANGES["frozen part"][1], {"model": model})
    trainer(page, model=model).train()
    assert all(map(torch.equal, model.text_adapter.parameters(), before.text_adapter.parameters()))
    assert not model.visual_projection.weight.equal(before.visual_projection.weight)


def test_the_data_source_is_read(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, read = page[1]["MyPictures"], []
    get = pictures.__getitem__

    def recorded(self: Any, index: int) -> Any:
        read.append(get(self, index)["caption"])
        return get(self, index)

    monkeypatch.setattr(pictures, "__getitem__", recorded)
    trainer(page, train_dataset=pictures()).train()
    assert sorted(read) == sorted(f"a drawing: {caption}" for caption in page[1]["rows"]["caption"])


def test_the_rows_that_a_student_learns_are_those_of_the_teacher(page: Any) -> None:
    folder, variables = page
    store = Store.open(folder / "runs/my_student/teacher/texts")
    captions = distinct_captions([CaptionSource(**variables["texts"])])
    model, _, tokenize = variables["load"]()
    with torch.no_grad():
        expected = F.normalize(model.eval().encode_text(tokenize(captions[:1])), dim=-1)
    torch.testing.assert_close(store.read(store.find(caption_keys(captions[:1]))).float(), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which the Python of the page about frozen towers was run, with its recipes."""
    folder = tmp_path_factory.mktemp("frozen")
    prepare(folder)
    prepare_training(folder)
    write_files(FROZEN, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_code(python_of(FROZEN))
        yield folder


@pytest.mark.parametrize(("command", "name"), [("stage2", "frozen"), ("align", "aligned")])
def test_a_recipe_makes_what_the_python_beside_it_makes(command: str, name: str, frozen: Path, tmp_path: Path) -> None:
    (recipe,) = (path for path in frozen.glob("*.yaml") if f"output_dir: runs/{name}\n" in path.read_text())
    assert llm2clip([command, str(recipe), "--output-dir", str(tmp_path / "made")]) == 0
    made, expected = (
        LLM2CLIPModel.from_pretrained(folder, text_model=False) for folder in (tmp_path / "made", f"runs/{name}")
    )
    assert_equal_weights(made, expected)


@pytest.mark.parametrize(("name", "folder"), [("parts", "stage2"), ("keep", "kept")])
def test_a_recipe_of_parts_runs(name: str, folder: str, frozen: Path) -> None:
    write_files(KEEP, frozen)
    assert llm2clip(["stage2", f"{name}.yaml"]) == 0
    first, last = (LLM2CLIPModel.from_pretrained(f"runs/{folder}{part}", text_model=False) for part in ("/part1", ""))
    assert not last.visual_projection.weight.equal(first.visual_projection.weight)
