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

    from benchmarks.stage2_inputs import write_vision_tower
    from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
    from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor

    towers = new_folder()
    vision = write_vision_tower(towers, hidden=64, layers=2, patch=14, size=112)
    text = write_text_tower(towers / "text", hidden=64, mlp=128, layers=2)
    model = LLM2CLIPModel.from_vision_text_pretrained(vision, text, projection_dim=64, initializer_range=0.2)
    model.save_pretrained(folder)
    processor = LLM2CLIPProcessor(CLIPImageProcessor.from_pretrained(vision), AutoTokenizer.from_pretrained(text))
    processor.save_pretrained(folder)
    write_sentence_transformers_files(folder)
    return folder


def _process(program: str, with_model: bool) -> Work:
    import numpy as np
    import torch

    torch.manual_seed(0)
    folder = new_folder()
    values = folder / "values.npz"
    arguments = [str(_joint_model(folder / "model")), str(values), CAPTION] if with_model else []
    command = [sys.executable, "-c", program + PEAK, *arguments]

    def work() -> Outcome:
        # The worker measures the seconds of child processes, but not their memory.
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak = float(output.split()[-1]) * 1024
        return Outcome(dict(np.load(values)) if with_model else {}, {"memory": peak})

    return work


def contests(device: str) -> list[Contest]:
    contestants = {
        "ours": Contestant(partial(_process, OURS, True)),
        "sentence-transformers": Contestant(partial(_process, SENTENCE_TRANSFORMERS, True)),
        "import transformers.AutoModel": Contestant(
            partial(_process, "from transformers import AutoModel, AutoProcessor", False), is_limit=True
        ),
    }
    return [
        Contest(
            "a tiny model of both towers, a fresh process each time",
            contestants,
            (Goal("sentence-transformers", "cpu", 0.7), Goal("import transformers.AutoModel", "cpu", 1.25)),
            {"text": 1e-4, "image": 1e-4},
            rounds=5,
            note="Memory is the peak of the whole process. By far the most of it all is the import of transformers, "
            "which is shown as a limit.",
        )
    ]


SHORTFALL = (
    "the import of AutoModel alone is 0.66 of the time of sentence-transformers on an AMD EPYC; loading the model "
    "from its folder and both embeddings add 8% to it."
)
ROW = Row("R12", "import, load, first caption and first image embedded", contests, shortfall=SHORTFALL)
