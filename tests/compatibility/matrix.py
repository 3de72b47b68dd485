"""Load saved folders with other transformers versions: `python -m tests.compatibility.matrix [VERSION ...]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, XLMRobertaConfig

from llm2clip.models.attention_probe import probe_text_tower
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.compatibility.check import CAPTIONS, pictures

# Requirements of each version; other packages come from this environment.
OLD = ["huggingface_hub>=1.3,<2", "tokenizers==0.22.2"]
COMPANIONS = {
    "4.57.6": ["huggingface_hub==0.36.2", "tokenizers==0.22.2"],
    "5.2.0": OLD,
    "5.6.2": OLD,
    "5.12.1": OLD,
    "5.23.0": [],
    "5.24.0": [],
}
ENVIRONMENTS = Path(__file__).resolve().parents[2] / "build" / "compat"
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def write_cases(folder: Path) -> None:
    """Write one case for each vision tower and LLM: a saved model, its inputs and its outputs."""
    cases: dict[str, tuple[Any, Any]] = {
        "EVA02 + Llama 3": (tiny.vision_config(), tiny.text_config("llama")),
        "CLIP + Qwen2": (tiny.other_vision_config("clip_vision_model"), tiny.text_config("qwen2")),
        "DINOv2 + Llama": (tiny.other_vision_config("dinov2"), tiny.text_config("llama")),
        "SigLIP + Gemma 3": (tiny.other_vision_config("siglip_vision_model"), tiny.text_config("gemma3_text")),
    }
    # As the files of embedding models say.
    own: dict[str, Any] = {"bidirectional": None, "pool_prompt": True, "normalize": True}
    # As the quickstart's model: features of class token and patches, standardized, before an encoder like E5.
    e5 = BertConfig(**tiny.SIZES, vocab_size=430, max_position_embeddings=130)
    cases["frozen DINOv2 + E5"] = (tiny.other_vision_config("dinov2"), tiny.text_config(decoder_config=e5, **own))
    own["dense"] = [{"out_features": 24, "bias": True, "activation": "tanh"}]
    encoder = XLMRobertaConfig(**tiny.SIZES, vocab_size=430, max_position_embeddings=130)
    cases["EVA02 + XLM-R"] = (tiny.vision_config(), tiny.text_config(decoder_config=encoder, **own))
    cases["frozen EVA02 + Qwen2"] = (tiny.vision_config(), tiny.text_config("qwen2"))
    cases["EVA02 + Llama 3"][1].decoder_config.rope_parameters = dict(LLAMA_3)
    for name, (vision, text) in cases.items():
        torch.manual_seed(0)
        fields: dict[str, Any] = {"logit_bias_init_value": -2.3} if name.startswith("SigLIP") else {}
        if name.startswith("frozen"):
            fields = tiny.FROZEN_TOWER
        model = tiny.with_statistics(LLM2CLIPModel(tiny.joint_config(vision, text, **fields)).eval())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        probe_text_tower(model.text_model)
        model.save_pretrained(folder / name / "model")
        processor = tiny.processor()
        processor.save_pretrained(folder / name / "model")
        model = LLM2CLIPModel.from_pretrained(folder / name / "model", attn_implementation="sdpa").eval()
        inputs = processor(text=CAPTIONS, images=pictures(28), return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        tensors = {f"in/{key}": value for key, value in inputs.items()}
        tensors |= {"logits": output.logits_per_image, "image_embeds": output.image_embeds}
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name / "expected.safetensors")


def environment(version: str) -> Path:
    """Return a folder with that version, installing it at first use."""
    target = ENVIRONMENTS / version
    if not (target / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--target", str(target)]
        if COMPANIONS[version]:
            subprocess.run([*command, *COMPANIONS[version]], check=True)
        # Last, since its folder is the mark that the environment is complete.
        subprocess.run([*command, "--no-deps", f"transformers=={version}"], check=True)
    return target


def check(version: str, cases: Path, home: Path) -> dict[str, Any]:
    """Return the results of `check.py` under a version."""
    variables = {**os.environ, "PYTHONPATH": str(environment(version)), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("check.py")
    done = subprocess.run(
        [sys.executable, str(script), str(cases)], env=variables, cwd=home, capture_output=True, text=True, check=False
    )
    if "REPORT " not in done.stdout:
        return {"transformers": version, "crash": done.stderr[-2000:]}
    return dict(json.loads(done.stdout.rpartition("REPORT ")[2]))


def main(versions: list[str]) -> int:
    # As in check.py: sums over several threads round differently.
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        cases = Path(scratch) / "cases"
        write_cases(cases)
        print(f"{'transformers':14}{'case':20}{'sdpa':>10}{'eager':>10}  result")
        for version in versions or list(COMPANIONS):
            home = Path(scratch) / f"home-{version}"
            home.mkdir()
            report = check(version, cases, home)
            if "crash" in report:
                failed = True
                print(f"{version:14}crashed:\n{report['crash']}")
                continue
            assert report.pop("transformers") == version
            for name, result in report.items():
                error = result.get("error")
                failed |= error is not None
                sdpa, eager = (f"{result[key]:.1e}" if key in result else "-" for key in ("sdpa", "eager"))
                print(f"{version:14}{name:20}{sdpa:>10}{eager:>10}  {error or 'equal'}")
                if error:
                    print(result["trace"], file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
