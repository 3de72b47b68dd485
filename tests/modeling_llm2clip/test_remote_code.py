"""A saved folder loads offline, in a process without this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import modeling_llm2clip
from llm2clip.hub.build import build_folder
from tests import stranger
from tests.builders import tiny

STRANGER = """
import io, json, logging, sys, torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline
)
folder, image = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
captions = ["a small dog", "a red bus in front of a church"]
inputs = processor(text=captions, images=[Image.open(image)], return_tensors="pt")
logits = model(**inputs).logits_per_image
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
scores = classify(Image.open(image), candidate_labels=captions, hypothesis_template="{}")
classifier = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
pixels = image_processor(Image.open(image), return_tensors="pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(captions, padding=True, return_tensors="pt")
assert classifier(**pixels, **tokens).logits_per_image.equal(logits)
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
assert extract(Image.open(image), pool=True, return_tensors=True).equal(model(**pixels).pooler_output)
first = tokenizer(captions[:1], return_tensors="pt")
extract = pipeline("feature-extraction", model=folder, trust_remote_code=True)
assert extract(captions[0], return_tensors=True).equal(model(**first).last_hidden_state)
shown = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(shown))
assert model.encode_text(captions).equal(model.encode_text(captions, processor))
assert "instantiate a model of type" not in shown.getvalue(), shown.getvalue()
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
again = AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
assert again(**inputs).logits_per_image.equal(logits)
model.set_text_model(again.text_model)
print(json.dumps({"module": type(model).__module__, "logits": logits.tolist(), "best": scores[0]["label"]}))
"""


@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_saved_folder_gives_equal_logits_without_this_package(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "llm2clip-tiny"
    model = tiny.save(folder, **fields)
    image = tmp_path / "noise.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(image)
    found = stranger.answer(STRANGER, folder, image, home=tmp_path)
    assert found["module"].startswith("transformers_modules.")
    captions = ["a small dog", "a red bus in front of a church"]
    processor = tiny.processor()
    inputs = processor(text=captions, images=[Image.open(image)], return_tensors="pt")
    expected = model(**inputs).logits_per_image
    torch.testing.assert_close(torch.tensor(found["logits"]), expected.detach(), atol=1e-5, rtol=0)
    assert found["best"] == captions[int(expected.argmax())]


AUDITED = """
import json, os, sys
folder, picture = sys.argv[1:]
places = [os.path.realpath(place) for place in (folder, os.getcwd(), sys.prefix, sys.base_prefix, *sys.path)]
places += ["/dev/", "/proc/", "/sys/", "/usr/", "/lib", "/etc/"]
FORBIDDEN = ("socket.connect", "socket.bind", "socket.send", "socket.getaddrinfo", "os.system", "os.exec",
             "os.posix_spawn", "os.spawn", "subprocess.", "pickle.find_class", "ctypes.dlopen")
seen = []

def look(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(tuple(place for place in places if place)):
            seen.append(f"opens {path}")
    elif event.startswith(FORBIDDEN):
        if event != "ctypes.dlopen" or "llm2clip" in str(arguments):
            seen.append(f"{event} {arguments!r}"[:300])

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline
import transformers.models.clip, transformers.models.llama
sys.addaudithook(look)
image, captions = Image.open(picture), ["a small dog"]
AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(captions)
AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")(image, return_tensors="pt")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model(**processor(text=captions, images=[image], return_tensors="pt"))
pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)(image, candidate_labels=captions)
encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
encoder.encode(captions), encoder.encode([image])
found = list(seen)
try:
    open(MISSING)
except OSError:
    pass
print(json.dumps({"seen": found, "hook": [event for event in seen if event not in found]}))
"""


@pytest.mark.slow
def test_code_of_a_folder_opens_its_own_folder_and_no_connection(tmp_path: Path) -> None:
    """Config, tokenizer, processors, model, pipeline and SentenceTransformer, under Python's audit hook."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    tiny.save(tmp_path / "model")
    build_folder(tmp_path / "model", tmp_path / "built")
    Image.effect_noise((40, 30), 80).convert("RGB").save(home / "noise.png")
    code = AUDITED.replace("MISSING", repr(str(outside)))
    found = stranger.answer(code, tmp_path / "built", home / "noise.png", home=home)
    assert found["seen"] == []
    # The hook does see what it looks for.
    assert found["hook"] == [f"opens {outside}"]


def test_security_md_lists_the_files_that_a_saved_model_brings(tmp_path: Path) -> None:
    tiny.save(tmp_path)
    page = Path(modeling_llm2clip.__file__).parents[1].joinpath("SECURITY.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+\.py)` \|", page, flags=re.MULTILINE)
    assert sorted(table) == sorted(path.name for path in tmp_path.glob("*.py"))


ENTRIES = ("configuration_llm2clip", "modeling_eva02", "modeling_llm2clip", "modeling_llm2clip_text")
ENTRIES += ("modeling_llm2clip_vision", "processing_llm2clip")


def test_one_module_knows_the_versions_of_transformers() -> None:
    folder = Path(modeling_llm2clip.__file__).parent
    assert [path.stem for path in folder.glob("*.py") if "VERSION" in path.read_text()] == ["compatibility_llm2clip"]


def _named(module: str) -> set[str]:
    source = Path(modeling_llm2clip.__file__).with_name(f"{module}.py").read_text()
    return set(re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE))


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_modules_import_all_modules_they_need_directly(entry: str) -> None:
    """From a local folder, transformers 4.57 copies only the modules that an entry module imports directly."""
    needed, found = _named(entry), set()
    while needed - found:
        found |= (names := needed - found)
        needed |= {name for module in names for name in _named(module)}
    assert _named(entry) == found - {entry}
