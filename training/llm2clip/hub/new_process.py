"""Load a saved folder as its users do: in a new process, offline, without this package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

# Names of environment variables that the code in a folder does not get to see.
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)
TOLERANCE = 1e-5
CAPTIONS = ("a photo of a dog", "two children play football in a green park behind a red brick church")

# The new process cannot import this package, although it is installed on the machine that builds the folder.
SCRIPT = """
import json, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
                 "socket.gethostbyname", "socket.gethostbyaddr", "subprocess.Popen", "os.system", "os.exec",
                 "os.posix_spawn", "os.spawn"):
        raise PermissionError(f"code of the folder tries {event}; a model opens no connection and starts no program")

sys.addaudithook(refuse)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_llm2clip", "llm2clip"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

task = json.loads(sys.argv[1])
folder, outputs = task["folder"], {}
model = AutoModel.from_pretrained(folder, trust_remote_code=True, **task["loading"]).eval()
with torch.inference_mode():
    if task["image"]:
        images = [Image.open(task["image"])]
        pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images, return_tensors="pt")
        outputs["image"] = model(**pixels.to(model.dtype)).pooler_output
    if task["captions"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        batch = tokenizer(task["captions"], padding=True, return_tensors="pt")
        outputs["text"] = model(**batch).pooler_output
    if task["llm_embeds"]:
        outputs["text"] = model.get_text_features(llm_embeds=load_file(task["llm_embeds"])["embeds"]).pooler_output
if task["image"] and task["captions"]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=task["captions"], images=images, return_tensors="pt")
    with torch.inference_mode():
        outputs["logits"] = model(**inputs.to(model.dtype)).logits_per_image
save_file({name: value.float().contiguous() for name, value in outputs.items()}, task["output"])
"""


def outputs_of_new_process(
    folder: Path,
    image: Image.Image | None,
    captions: Sequence[str],
    llm_embeds: Tensor | None = None,
    **loading: Any,
) -> dict[str, Tensor]:
    """Load a folder in a new process and compute its outputs.

    This runs the Python code in the folder, as everybody does who loads it with `trust_remote_code`. Python refuses it
    connections and other programs, and its environment has no tokens. That stops mistakes; native code would get by.

    Args:
        folder: A saved model with its processor or tokenizer.
        image: An image, for a model with a vision tower.
        captions: Captions, for a model that contains an LLM.
        llm_embeds: `(batch, hidden_size)`, instead of captions for a joint model without its LLM.
        loading: Arguments of `from_pretrained`.

    Returns:
        `image` `(1, width)` and `text` `(captions, width)`, not normalized, and `logits` if there are both; float32.

    Raises:
        RuntimeError: The process failed; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task: dict[str, Any] = {"folder": str(folder.resolve()), "captions": list(captions), "loading": loading}
        task |= {"image": None, "llm_embeds": None, "output": str(Path(scratch) / "outputs.safetensors")}
        if image is not None:
            task["image"] = str(Path(scratch) / "image.png")
            image.save(task["image"])
        if llm_embeds is not None:
            task["llm_embeds"] = str(Path(scratch) / "llm_embeds.safetensors")
            save_file({"embeds": llm_embeds}, task["llm_embeds"])
        environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        # The file of the token that the user is logged in with.
        environment |= {"HF_TOKEN_PATH": str(Path(scratch) / "no token"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(task)]
        options: dict[str, Any] = {"env": environment, "cwd": scratch, "capture_output": True, "text": True}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, **options)
        if done.returncode != 0:
            output = done.stderr.strip()[-2000:]
            raise RuntimeError(f"{folder} does not load in a new process without this package:\n{output}")
        return load_file(task["output"])


def compare_with_new_process(folder: Path, expected: dict[str, Tensor], *inputs: Any, **loading: Any) -> float:
    """Compare the outputs of a folder in a new process with those of the model that was saved, `expected`.

    `inputs` and `loading` are those of [`outputs_of_new_process`]. Returns the largest difference, relative to the
    largest entry.

    Raises:
        RuntimeError: The folder does not load, or its outputs differ.
    """
    found = outputs_of_new_process(folder, *inputs, **loading)
    worst = 0.0
    for name, wanted in expected.items():
        difference = (found[name] - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1)
        worst = max(worst, difference.item())
        # Not `>`, which is false for NaN.
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the {name} outputs of {folder} in a new process differ by {difference:.1e}.")
    return worst


def sample_picture(size: int = 96) -> Image.Image:
    """An image with edges and colors, for models without an example image."""
    ramp = torch.arange(size * size * 3).reshape(size, size, 3)
    return Image.fromarray((ramp * 7 % 251).to(torch.uint8).numpy())


def sample_llm_embeds(width: int) -> Tensor:
    """Values in the place of the LLM embeddings of two captions, `(2, width)`, for models without their LLM."""
    return torch.arange(2 * width).reshape(2, width) * 7 % 251 / 125 - 1
