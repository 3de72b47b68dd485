"""What `llm2clip convert` reads: checkpoints of the original code, of open_clip, of CLIP, of language models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llm2clip.convert.checkpoint import open_checkpoint
from llm2clip.convert.conversion import ConvertConfig, convert_checkpoint
from llm2clip.convert.joint import plan_joint
from tests.damaged.data import Readers
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA, OPENAI


def make_checkpoints(folder: Path) -> None:
    for name, golden, wrap in (("eva", EVA, None), ("wrapped", EVA, "deepspeed"), ("openai", OPENAI, "state_dict")):
        place = _with_configs(folder / name, golden)
        checkpoints.original_pt(golden, place / "model.pt", wrap)
    place = _with_configs(folder / "safetensors", EVA)
    save_file(EVA.group("state"), place / "model.safetensors")
    place = _with_configs(folder / "open_clip", OPENAI)
    save_file(OPENAI.group("state"), place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPENAI.meta["config"]}))
    checkpoints.microsoft_openai_folder(folder / "microsoft")
    _with_configs(folder / "microsoft", OPENAI)
    (folder / "microsoft/README.md").write_text("---\nlicense: mit\n---\n")


def _with_configs(folder: Path, golden: checkpoints.Golden) -> Path:
    folder.mkdir(exist_ok=True)
    checkpoints.model_config(golden, folder)
    llm = Path(checkpoints.llm_of(golden, folder / "llm"))
    (llm / "model.safetensors").unlink()
    return folder


def read_checkpoint(folder: Path) -> Readers:
    names = ("model.pt", "open_clip_model.safetensors", "model.safetensors")
    source = next(folder / name for name in names if (folder / name).is_file())
    whole = folder if (folder / "config.json").is_file() else source
    options = {"text_model": str(folder / "llm")}
    if whole is source:
        options["model_config"] = str(folder / "model_config.json")

    def planned() -> None:
        plan_joint(open_checkpoint(whole), ConvertConfig(str(whole), "out", **options))

    return (lambda: _convert(whole, folder, **options), planned)


def _convert(source: Path, folder: Path, **options: str) -> None:
    destination = folder.with_name("converted")
    shutil.rmtree(destination, ignore_errors=True)
    try:
        convert_checkpoint(source, destination, **options)
    except BaseException:
        assert not destination.exists(), "something is left of a conversion that failed"
        raise


def make_language_models(folder: Path) -> None:
    whole = Path(checkpoints.llm_folder(folder / "whole", 24))
    checkpoints.llm_folder(folder / "sharded", 24, max_shard_size="20KB")
    shutil.copytree(whole, folder / "pickled")
    (folder / "pickled/model.safetensors").unlink()
    torch.save(load_file(whole / "model.safetensors"), folder / "pickled/pytorch_model.bin")


def read_language_model(folder: Path) -> Readers:
    return (lambda: _convert(folder, folder),)
