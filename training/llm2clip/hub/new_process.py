"""Load a saved folder as its users do: in a new process, offline, without this package."""

from __future__ import annotations

import inspect
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
from safetensors.torch import load_file
from torch import Tensor

# Names of environment variables that the code in a folder does not get to see.
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)


def outputs_of(
    model: Any, image_processor: Any, tokenizer: Any, processor: Any, image: Any, captions: Any
) -> dict[str, Any]:
    """Compute the outputs of a model; the new process runs the source of this function.

    Args:
        model: A joint model, a vision half or a text tower.
        image_processor: None for a text tower.
        tokenizer: None for a model without an LLM; instead of captions, a text adapter then gets fixed embeddings.
        processor: That of a joint model.
        image: An image.
        captions: Captions.

    Returns:
        `image` `(1, width)` and `text` `(captions, width)`, not normalized, and `logits` if there are both; float32.
    """
    outputs: dict[str, Any] = {}
    with torch.inference_mode():
        if image_processor is not None:
            pixels = image_processor(images=[image], return_tensors="pt")
            outputs["image"] = model(**pixels.to(model.dtype)).pooler_output
        if tokenizer is not None:
            outputs["text"] = model(
                **tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            ).pooler_output
        elif hasattr(model, "text_adapter"):
            width = model.config.text_config.hidden_size
            embeds = torch.arange(2 * width).reshape(2, width) * 7 % 251 / 125 - 1
            outputs["text"] = model.get_text_features(llm_embeds=embeds).pooler_output
        if image_processor is not None and tokenizer is not None:
            inputs = processor(text=captions, images=[image], return_tensors="pt")
            outputs["logits"] = model(**inputs.to(model.dtype)).logits_per_image
    return {name: rows.float().contiguous() for name, rows in outputs.items()}


# The new process cannot import this package, although it is installed on the machine that builds the folder.
SCRIPT = f"""
from __future__ import annotations
import json, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
                 "socket.gethostbyname", "socket.gethostbyaddr", "subprocess.Popen", "os.system", "os.exec",
                 "os.posix_spawn", "os.spawn"):
        raise PermissionError(f"code of the folder tries {{event}}; a model opens no connection and starts no program")

sys.addaudithook(refuse)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_llm2clip", "llm2clip"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

{inspect.getsource(outputs_of)}

task = json.loads(sys.argv[1])
folder, (has_image, has_text) = task["folder"], task["parts"]
model = AutoModel.from_pretrained(folder, trust_remote_code=True, **task["loading"]).eval()
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil") if has_image else None
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True) if has_text else None
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True) if has_image and has_text else None
image = Image.open(task["image"])
save_file(outputs_of(model, image_processor, tokenizer, processor, image, task["captions"]), task["output"])
"""


def outputs_of_new_process(
    folder: Path, parts: tuple[bool, bool], image: Image.Image, captions: Sequence[str], **loading: Any
) -> dict[str, Tensor]:
    """Load a folder in a new process and compute its outputs.

    This runs the Python code in the folder, as everybody does who loads it with `trust_remote_code`. Python refuses it
    connections and other programs, and its environment has no tokens. That stops mistakes; native code would get by.

    Args:
        folder: A saved model with its processor or tokenizer.
        parts: Whether the model has a vision tower, and whether it contains an LLM.
        image: An image.
        captions: Captions.
        loading: Arguments of `from_pretrained`.

    Returns:
        See [`outputs_of`].

    Raises:
        RuntimeError: The process failed; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task = {"folder": str(folder.resolve()), "parts": parts, "captions": list(captions), "loading": loading}
        task |= {name: f"{scratch}/{file}" for name, file in (("image", "i.png"), ("output", "o.safetensors"))}
        image.save(str(task["image"]))
        environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        # The file of the token that the user is logged in with.
        environment |= {"HF_TOKEN_PATH": f"{scratch}/no token", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(task)]
        options: dict[str, Any] = {"env": environment, "cwd": scratch, "capture_output": True, "text": True}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, **options)
        if done.returncode != 0:
            output = done.stderr.strip()[-2000:]
            raise RuntimeError(f"{folder} does not load in a new process without this package:\n{output}")
        return load_file(str(task["output"]))
