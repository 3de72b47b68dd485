"""R12: the cost of a fresh process until it has embedded its first caption and image."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.small_llama import new_folder, write_text_tower

CAPTION = "a small dog walks on a bridge"
# As in the README.
OURS = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, values, caption = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
text = model.encode_text(caption, processor)
image = model.encode_image(Image.new("RGB", (320, 240), "red"), processor)
np.savez(values, text=text.numpy(), image=image.numpy())
"""
SENTENCE_TRANSFORMERS = """
import sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

folder, values, caption = sys.argv[1:]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
text = model.encode([caption])
image = model.encode([Image.new("RGB", (320, 240), "red")])
np.savez(values, text=text, image=image)
"""
PEAK = "\nimport resource\nprint('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"


def _joint_model(folder: Path) -> Path:
    """Write a small model with vision tower, adapter and LLM, as `llm2clip build` does."""
    from transformers import AutoTokenizer, CLIPImageProcessor

    from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
    from llm2clip.models.new_model import from_vision_text_pretrained
    from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel, LLM2CLIPProcessor

    towers = new_folder()
    sizes = {"hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = EVA02VisionModel(EVA02VisionConfig(**sizes, image_size=112, patch_size=14))
    vision.save_pretrained(towers / "vision")
    images = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    images.save_pretrained(towers / "vision")
    text = write_text_tower(towers / "text", hidden=64, mlp=128, layers=2)
    fields = {"projection_dim": 64, "initializer_range": 0.2}
    from_vision_text_pretrained(towers / "vision", text, **fields).save_pretrained(folder)
    LLM2CLIPProcessor(images, AutoTokenizer.from_pretrained(text)).save_pretrained(folder)
    write_sentence_transformers_files(folder)
    return folder


def _process(program: str) -> Work:
    import numpy as np
    import torch

    torch.manual_seed(0)
    folder = new_folder()
    values = folder / "values.npz"
    command = [sys.executable, "-c", program + PEAK, str(_joint_model(folder / "model")), str(values), CAPTION]

    def work() -> Outcome:
        # The worker measures the seconds of child processes, but not their memory.
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return Outcome(dict(np.load(values)), {"memory": float(output.split()[-1]) * 1024})

    return work


def contests(device: str) -> list[Contest]:
    peer = "sentence-transformers"
    contestants = {
        "ours": Contestant(partial(_process, OURS)),
        peer: Contestant(partial(_process, SENTENCE_TRANSFORMERS)),
    }
    title = "a tiny model of both towers, a fresh process each time"
    note = "Memory is the peak of the whole process. By far the most of it all is the import of transformers."
    return [Contest(title, contestants, (Goal(peer, "cpu", 0.7),), {"text": 1e-4, "image": 1e-4}, note=note)]


SHORTFALL = (
    "the import of AutoModel alone is 0.66 of the time of sentence-transformers on an AMD EPYC; the rest adds 8%."
)
ROW = Row("R12", "import, load, first caption and first image embedded", contests, shortfall=SHORTFALL)
