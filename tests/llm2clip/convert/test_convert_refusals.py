"""Damaged or unknown checkpoints: `llm2clip convert` prints one clear message and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm2clip import cli
from llm2clip.files.manifests import write_manifest
from tests.builders import tiny
from tests.damage import flip
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA
from tests.llm2clip.convert.conftest import Refused


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the pickle's code ran",))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_pt(path: Path) -> None:
    checkpoints.original_pt(EVA, path)
    cut(path)


def truncated_safetensors(path: Path) -> None:
    save_file(checkpoints.ours(EVA), path)
    cut(path)


def saved(**changes: Any) -> Callable[[Path], None]:
    """Save the golden model with other or without some tensors."""
    state = {**EVA.group("state"), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return lambda path: torch.save({name: value for name, value in state.items() if value is not None}, path)


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated .pt": (truncated_pt, "is not a checkpoint that can be read safely: it is damaged.*; download it again"),
    "truncated safetensors": (truncated_safetensors, "damaged or truncated"),
    "code": (saved(hook=Bomb()), "is not a checkpoint that can be read safely: .* would run code from the file"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer instead of the file",
    ),
    "NaN": (
        saved(visual__norm__weight=torch.full((48,), float("nan"))),
        r"1 tensors contain NaN or infinity: vision_model\.norm\.weight",
    ),
    "another model": (
        lambda path: torch.save({"encoder.conv.weight": torch.zeros(2)}, path),
        r"contains no vision tower or LLM in a known layout; its first tensors are encoder\.conv\.weight",
    ),
    "extra keys": (saved(visual__lora=torch.zeros(3)), r"do not belong to it: visual\.lora"),
    "missing keys": (
        saved(visual__blocks__1__norm2__weight=None),
        r"1 tensors are missing: vision_model\.blocks\.1\.norm2\.weight \(48,\)",
    ),
    "mixed widths": (
        saved(visual__blocks__1__mlp__w3__weight=torch.zeros(64, 128)),
        r"blocks\.1\.mlp\.w3\.weight is \(64, 128\), not \(48, 128\)",
    ),
    "nothing": (lambda path: None, "is not a file, a folder or a Hub id"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint_is_refused_and_nothing_is_written(
    case: str, tmp_path: Path, eva_options: list[str], refused: Refused
) -> None:
    make, message = CASES[case]
    (tmp_path / "out").mkdir()
    source = tmp_path / ("model.safetensors" if "safetensors" in case else "model.pt")
    make(source)
    refused(message, source, tmp_path / "out" / "model", *eva_options)
    assert not list((tmp_path / "out").iterdir())


def test_what_does_not_fit_a_checkpoint_is_refused(tmp_path: Path, eva_options: list[str], refused: Refused) -> None:
    source, config, narrow = checkpoints.original_pt(EVA, tmp_path / "model.pt"), eva_options[:2], tmp_path / "narrow"
    fields = json.loads(json.dumps(EVA.meta["config"]))
    fields["vision_cfg"]["width"] = 64
    (tmp_path / "c.json").write_text(json.dumps(fields))
    checkpoints.llm_folder(narrow, 32)
    for message, *options in (
        ("has hidden_size=48, .* give its model_configs JSON with --model-config",),
        ("give their LLM with --text-model", *config),
        (f"expects embeddings of width 24, but {narrow} has width 32", *config, "--text-model", str(narrow)),
        ("have shapes that differ from its config", "--model-config", str(tmp_path / "c.json"), *eva_options[2:]),
        ("projection_dim is 8, but .* has a projection", *eva_options, "--projection-dim", "8"),
        ("prompt_name is x, but .* is no LLM", *eva_options, "--prompt-name", "x"),
        ("text_model_revision is v2, but it is that of a text_model", *config, "--text-model-revision", "v2"),
        ("image_size is 56, but the original format", "--to", "original", "--image-size", "56"),
    ):
        refused(message, source, tmp_path / "out", *options)
    refused("reset_heads is True, but .* is an LLM", str(narrow), tmp_path / "out", "--reset-heads")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_llm_can_be_given_as_a_folder_without_weights(
    tmp_path: Path, eva_options: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = [checkpoints.original_pt(EVA, tmp_path / "model.pt"), str(tmp_path / "out"), *eva_options]
    refused("of somebody/llm cannot be read.*a folder with its config.json and its tok", *command[:-1], "somebody/llm")
    for weights in (tmp_path / "llm").glob("*.safetensors"):
        weights.unlink()
    assert cli.main(["convert", *command]) == 0


def test_existing_destination_is_only_replaced_on_request_and_success(
    tmp_path: Path, eva_options: list[str], refused: Refused
) -> None:
    source, out = checkpoints.original_pt(EVA, tmp_path / "model.pt"), tmp_path / "out"
    for _ in range(2):
        assert cli.main(["convert", source, str(out), *eva_options, "--overwrite"]) == 0
    before = sorted(out.iterdir())
    refused("add --overwrite", source, out, *eva_options)
    refused("contains the source", source, tmp_path / "llm", *eva_options, "--overwrite")
    cut(Path(source))
    refused("damaged", source, out, *eva_options, "--overwrite")
    assert sorted(out.iterdir()) == before


def test_the_original_format_replaces_neither_a_folder_nor_a_file_of_the_model(
    tmp_path: Path, refused: Refused
) -> None:
    model, frozen, file, link = (tmp_path / name for name in ("model", "frozen", "model.pt", "link.pt"))
    tiny.save(model)
    tiny.save(frozen, vision_pooling="mean", vision_layers=[1, 2], center_text=True)
    weights, original = model / "model.safetensors", ("--to", "original")
    before = weights.read_bytes()
    refused("is inside the source", model, weights, *original, "--overwrite")
    refused("is a folder", model, model, *original, "--overwrite")
    assert weights.read_bytes() == before
    file.write_text("mine")
    refused("add --overwrite", model, file, *original)
    refused("is not replaced, because no conversion wrote it", model, file, *original, "--overwrite")
    assert file.read_text() == "mine"
    torch.save({"x": torch.zeros(1)}, file)
    earlier = file.read_bytes()
    words = r"knows no vision_pooling 'mean', vision_layers \[1, 2\], center_text True"
    refused(words, frozen, file, *original, "--overwrite")
    assert file.read_bytes() == earlier
    link.symlink_to(file)
    assert cli.main(["convert", str(model), str(link), *original, "--overwrite"]) == 0
    assert link.is_symlink()
    assert file.read_bytes() != earlier
    with flip(weights):
        write_manifest(model, "build")
    refused(r"is not what was written \(model.safetensors has changed", model, tmp_path / "more.pt", *original)
