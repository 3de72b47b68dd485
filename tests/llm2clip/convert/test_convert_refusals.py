"""Damaged or unknown checkpoints: `llm2clip convert` prints one clear message and writes nothing."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm2clip import cli
from llm2clip.utils.manifests import write_manifest
from tests.damage import flip
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA
from tests.modeling_llm2clip import tiny


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the pickle's code ran",))


def truncated_pt(folder: Path) -> Path:
    path = Path(checkpoints.original_pt(EVA, folder / "model.pt"))
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def truncated_safetensors(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(checkpoints.ours(EVA), path)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def code(folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save({"state_dict": EVA.group("state"), "hook": Bomb()}, path)
    return path


def bare_pickle(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_bytes(pickle.dumps({"x": Bomb()}))
    return path


def text(content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "model.pt").write_text(content)
        return folder / "model.pt"

    return make


def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = dict(EVA.group("state"))
        change(state)
        torch.save(state, folder / "model.pt")
        return folder / "model.pt"

    return make


def spoil(state: dict[str, torch.Tensor]) -> None:
    state["visual.norm.weight"] = state["visual.norm.weight"] * float("nan")


def mix(state: dict[str, torch.Tensor]) -> None:
    state["visual.blocks.1.mlp.w3.weight"] = torch.zeros(64, 128)


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated .pt": (truncated_pt, "is not a checkpoint that can be read safely: it is damaged.*; download it again"),
    "truncated safetensors": (truncated_safetensors, "damaged or truncated"),
    "code": (code, "is not a checkpoint that can be read safely: .* would run code from the file; save only"),
    "bare pickle": (bare_pickle, "is not a checkpoint that can be read safely"),
    "a Git LFS pointer": (
        text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer instead of the file",
    ),
    "a text": (
        text("Not found"),
        "is not a checkpoint that can be read safely: it is damaged, or of another format",
    ),
    "NaN": (edited(spoil), r"1 tensors contain NaN or infinity: vision_model\.norm\.weight"),
    "another model": (
        lambda folder: _saved(folder, {"encoder.conv.weight": torch.zeros(2), "decoder.x": torch.zeros(2)}),
        r"contains no vision tower or LLM in a known layout; its first tensors are encoder\.conv\.weight",
    ),
    "extra keys": (
        edited(lambda s: s.update({"visual.lora": torch.zeros(3)})),
        r"do not belong to it: visual\.lora",
    ),
    "missing keys": (
        edited(lambda s: s.pop("visual.blocks.1.norm2.weight")),
        r"1 tensors are missing: vision_model\.blocks\.1\.norm2\.weight \(48,\)",
    ),
    "mixed widths": (edited(mix), r"blocks\.1\.mlp\.w3\.weight is \(64, 128\), not \(48, 128\)"),
    "nothing": (lambda folder: folder / "absent.pt", "is not a file, a folder or a Hub id"),
    "an empty folder": (lambda folder: folder / "empty", "contains no weights"),
}


def _saved(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint_is_refused_without_a_traceback(
    case: str, tmp_path: Path, eva_options: list[str], capfd: Any
) -> None:
    make, message = CASES[case]
    (tmp_path / "in" / "empty").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    source = make(tmp_path / "in")
    capfd.readouterr()
    assert cli.main(["convert", str(source), str(tmp_path / "out" / "model"), *eva_options]) == 2
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert "code ran" not in printed.out
    assert re.search(message, printed.err), printed.err
    assert not list((tmp_path / "out").iterdir())


def test_what_does_not_fit_a_checkpoint_is_refused(tmp_path: Path, eva_options: list[str], capsys: Any) -> None:
    source, config, narrow = checkpoints.original_pt(EVA, tmp_path / "model.pt"), eva_options[:2], tmp_path / "narrow"
    fields = json.loads(json.dumps(EVA.meta["config"]))
    fields["vision_cfg"]["width"] = 64
    (tmp_path / "c.json").write_text(json.dumps(fields))
    for options, message in (
        ([], "has hidden_size=48, .* give its model_configs JSON with --model-config"),
        (config, "give their LLM with --text-model"),
        (
            [*config, "--text-model", checkpoints.llm_folder(narrow, 32)],
            f"expects embeddings of width 24, but {narrow} has width 32",
        ),
        (["--model-config", str(tmp_path / "c.json"), *eva_options[2:]], "have shapes that differ from its config"),
    ):
        assert cli.main(["convert", source, str(tmp_path / "out"), *options]) == 2
        assert re.search(message, " ".join(capsys.readouterr().err.split()))
        assert not (tmp_path / "out").exists()


def test_an_unreachable_llm_can_be_given_as_a_folder_without_weights(
    tmp_path: Path, eva_options: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["convert", checkpoints.original_pt(EVA, tmp_path / "model.pt"), str(tmp_path / "out"), *eva_options]
    assert cli.main([*command[:-1], "somebody/llm"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the config and tokenizer of somebody/llm cannot be read" in error
    assert "a folder with its config.json and its tokenizer files, which is enough" in error
    for weights in (tmp_path / "llm").glob("*.safetensors"):
        weights.unlink()
    assert cli.main(command) == 0


def test_existing_destination_is_only_replaced_on_request_and_success(
    tmp_path: Path, eva_options: list[str], capsys: Any
) -> None:
    source, out = checkpoints.original_pt(EVA, tmp_path / "model.pt"), tmp_path / "out"
    for _ in range(2):
        assert cli.main(["convert", source, str(out), *eva_options, "--overwrite"]) == 0
    assert cli.main(["convert", source, str(out), *eva_options]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    before = sorted(out.iterdir())
    (tmp_path / "in").mkdir()
    bad = str(truncated_pt(tmp_path / "in"))
    assert cli.main(["convert", bad, str(out), *eva_options, "--overwrite"]) == 2
    assert sorted(out.iterdir()) == before
    assert cli.main(["convert", source, str(tmp_path / "llm"), *eva_options, "--overwrite"]) == 2
    assert "contains the source" in capsys.readouterr().err


def test_the_original_format_replaces_neither_a_folder_nor_a_file_of_the_model(tmp_path: Path, capsys: Any) -> None:
    model, frozen, file, link = (tmp_path / name for name in ("model", "frozen", "model.pt", "link.pt"))
    tiny.save(model)
    tiny.save(frozen, vision_pooling="mean", center_text=True)
    weights = model / "model.safetensors"
    before = weights.read_bytes()

    def refused(message: str, source: Path, destination: Path, *options: str) -> None:
        assert cli.main(["convert", str(source), str(destination), "--to", "original", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    refused("is inside the source", model, weights, "--overwrite")
    refused("is a folder", model, model, "--overwrite")
    assert weights.read_bytes() == before
    file.write_text("mine")
    refused("add --overwrite", model, file)
    refused("is not replaced, because no conversion wrote it", model, file, "--overwrite")
    assert file.read_text() == "mine"
    torch.save({"x": torch.zeros(1)}, file)
    earlier = file.read_bytes()
    refused("the original code knows no vision_pooling 'mean', center_text True", frozen, file, "--overwrite")
    assert file.read_bytes() == earlier
    link.symlink_to(file)
    assert cli.main(["convert", str(model), str(link), "--to", "original", "--overwrite"]) == 0
    assert link.is_symlink()
    assert file.read_bytes() != earlier
    with flip(weights):
        write_manifest(model, "build")
    refused("is not what was written (model.safetensors has changed", model, tmp_path / "more.pt")
