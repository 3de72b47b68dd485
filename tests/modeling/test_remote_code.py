"""A saved folder works for strangers: a process that has never seen this package, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from tests.modeling import tiny

# The test environment has the package installed; this hides it as if it were not.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_llm2clip", "llm2clip_training", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""
STRANGER = (
    HIDE
    + """
import json, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
folder, image = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
captions = ["a small dog", "a red bus in front of a church"]
inputs = processor(text=captions, images=[Image.open(image)], return_tensors="pt")
logits = model(**inputs).logits_per_image
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
scores = classify(Image.open(image), candidate_labels=captions, hypothesis_template="{}")
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
again = AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
assert again(**inputs).logits_per_image.equal(logits)
model.set_text_model(again.text_model)
print(json.dumps({"module": type(model).__module__, "logits": logits.tolist(), "best": scores[0]["label"]}))
"""
)


def test_stranger_gets_equal_logits(tmp_path: Path) -> None:
    folder = tmp_path / "llm2clip-tiny"
    model = tiny.save(folder)
    image = tmp_path / "noise.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(image)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder), str(image)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    captions = ["a small dog", "a red bus in front of a church"]
    inputs = tiny.processor()(text=captions, images=[Image.open(image)], return_tensors="pt")
    expected = model(**inputs).logits_per_image
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected.detach(), atol=1e-5, rtol=0)
    assert answer["best"] == captions[int(expected.argmax())]
