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


def text_file(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    return path


def _text(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_text("Not found")
    return path


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
    "truncated .pt": (truncated_pt, "damaged or truncated"),
    "truncated safetensors": (truncated_safetensors, "damaged or truncated"),
    "code": (code, "would run code from the file, which is refused"),
    "bare pickle": (bare_pickle, "is not a torch checkpoint|would run code"),
    "a Git LFS pointer": (text_file, "is a Git LFS pointer instead of the file"),
    "a text": (lambda folder: _text(folder), "is not a torch checkpoint, or it is damaged"),
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
def test_bad_checkpoint_is_refused_without_a_traceback(case: str, tmp_path: Path, capfd: Any) -> None:
    make, message = CASES[case]
    (tmp_path / "in" / "empty").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    source = make(tmp_path / "in")
    options = ["--model-config", checkpoints.model_config(EVA, tmp_path)]
    options += ["--text-model", checkpoints.llm_of(EVA, tmp_path / "llm")]
    capfd.readouterr()
    assert cli.main(["convert", str(source), str(tmp_path / "out" / "model"), *options]) == 2
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert "code ran" not in printed.out
    assert re.search(message, printed.err), printed.err
    assert not list((tmp_path / "out").iterdir())


def test_adapter_of_an_llm_of_another_width_is_refused(tmp_path: Path, capsys: Any) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    options = ["--model-config", checkpoints.model_config(EVA, tmp_path)]
    llm = checkpoints.llm_folder(tmp_path / "llm", 32)
    assert cli.main(["convert", source, str(tmp_path / "out"), *options, "--text-model", llm]) == 2
    assert f"expects embeddings of width 24, but {llm} has width 32" in capsys.readouterr().err
    assert cli.main(["convert", source, str(tmp_path / "out"), *options]) == 2
    assert "give their LLM with --text-model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unreachable_llm_can_be_given_as_a_folder_without_weights(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    options = ["--model-config", checkpoints.model_config(EVA, tmp_path)]
    assert cli.main(["convert", source, str(tmp_path / "out"), *options, "--text-model", "somebody/llm"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the config and tokenizer of somebody/llm cannot be read" in error
    assert "a folder with its config.json and its tokenizer files, which is enough" in error
    llm = Path(checkpoints.llm_of(EVA, tmp_path / "llm"))
    for weights in llm.glob("*.safetensors"):
        weights.unlink()
    assert cli.main(["convert", source, str(tmp_path / "out"), *options, "--text-model", str(llm)]) == 0


def test_unpublished_sizes_need_a_model_config(tmp_path: Path, capsys: Any) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    assert cli.main(["convert", source, str(tmp_path / "out")]) == 2
    assert "hidden_size=48" in (error := capsys.readouterr().err)
    assert "--model-config" in error


def test_model_config_of_another_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    fields = json.loads(json.dumps(EVA.meta["config"]))
    fields["vision_cfg"]["width"] = 64
    (tmp_path / "c.json").write_text(json.dumps(fields))
    options = ["--model-config", str(tmp_path / "c.json"), "--text-model", checkpoints.llm_of(EVA, tmp_path / "llm")]
    assert cli.main(["convert", source, str(tmp_path / "out"), *options]) == 2
    assert "tensors have shapes that differ from its config" in capsys.readouterr().err


def test_existing_destination_is_only_replaced_on_request_and_success(tmp_path: Path, capsys: Any) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    options = ["--model-config", checkpoints.model_config(EVA, tmp_path)]
    options += ["--text-model", checkpoints.llm_of(EVA, tmp_path / "llm")]
    out, mine = tmp_path / "out", tmp_path / "out" / "mine.txt"
    out.mkdir()
    mine.write_text("mine")
    assert cli.main(["convert", source, str(out), *options]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    # A folder that no conversion wrote is never replaced, even if it contains a model.
    (out / "config.json").write_text("{}")
    assert cli.main(["convert", source, str(out), *options, "--overwrite"]) == 2
    assert "out is not replaced, because llm2clip convert did not write it" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.rename(tmp_path / "mine.txt")
    (out / "config.json").unlink()
    assert cli.main(["convert", source, str(out), *options, "--overwrite"]) == 0
    before = sorted(out.iterdir())
    # A failed conversion keeps the existing folder, even with --overwrite.
    (tmp_path / "in").mkdir()
    bad = str(truncated_pt(tmp_path / "in"))
    assert cli.main(["convert", bad, str(out), *options, "--overwrite"]) == 2
    assert sorted(out.iterdir()) == before
    (tmp_path / "mine.txt").rename(mine)
    assert cli.main(["convert", source, str(out), *options, "--overwrite"]) == 2
    assert "contains other files than those that llm2clip convert wrote (mine.txt)" in capsys.readouterr().err
    mine.unlink()
    assert cli.main(["convert", source, str(out), *options, "--overwrite"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_original_format_replaces_neither_a_folder_nor_a_file_of_the_model(tmp_path: Path, capsys: Any) -> None:
    tiny.save(tmp_path / "model")
    weights, file = tmp_path / "model" / "model.safetensors", tmp_path / "model.pt"
    before = weights.read_bytes()
    for destination, message in ((weights, "is inside the source"), (tmp_path / "model", "is a folder")):
        arguments = ["convert", str(tmp_path / "model"), str(destination), "--to", "original", "--overwrite"]
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert weights.read_bytes() == before
    file.write_text("mine")
    assert cli.main(["convert", str(tmp_path / "model"), str(file), "--to", "original"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "model"), str(file), "--to", "original", "--overwrite"]) == 2
    assert "is not replaced, because no conversion wrote it" in " ".join(capsys.readouterr().err.split())
    assert file.read_text() == "mine"
    torch.save({"x": torch.zeros(1)}, file)
    earlier = file.read_bytes()
    tiny.save(tmp_path / "frozen", vision_pooling="mean", center_text=True)
    assert cli.main(["convert", str(tmp_path / "frozen"), str(file), "--to", "original", "--overwrite"]) == 2
    assert "the original code knows no vision_pooling 'mean', center_text True" in capsys.readouterr().err
    assert file.read_bytes() == earlier
    (tmp_path / "link.pt").symlink_to(file)
    link = tmp_path / "link.pt"
    assert cli.main(["convert", str(tmp_path / "model"), str(link), "--to", "original", "--overwrite"]) == 0
    assert (tmp_path / "link.pt").is_symlink()
    assert file.read_bytes() != earlier
    with flip(weights):
        assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "other.pt"), "--to", "original"]) == 0
        write_manifest(tmp_path / "model", "build")
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "more.pt"), "--to", "original"]) == 2
    assert "is not what was written (model.safetensors has changed" in capsys.readouterr().err
