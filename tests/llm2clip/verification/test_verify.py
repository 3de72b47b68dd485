"""Verification of everything that is written: flipped bits, and everything that is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm2clip import cli
from llm2clip.command_line.settings import build_config
from llm2clip.hub import build
from llm2clip.hub.source_model import SourceModel
from llm2clip.store import building
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.verification.verify import DamagedError, VerifyConfig, run
from tests.builders import small_runs
from tests.damage import flip
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.shards import embed, write_shards
from tests.llm2clip.store import encoder


def verify(folder: Path) -> dict[str, int]:
    return run(VerifyConfig(folder=str(folder)))


def found(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a damaged folder."""
    capsys.readouterr()
    assert cli.main(["verify", str(folder)]) == 2
    return capsys.readouterr().err


def test_whole_sidecars_and_caches_pass(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data" / "part")
    embed(source, None)
    embed(source, tmp_path / "out")
    assert verify(tmp_path / "data") == verify(tmp_path / "out") == {"num_shards": 4, "num_captions": 12}
    encoder.build(tmp_path / "cache", ["a", "b", "c"], shard_size=2)
    assert verify(tmp_path / "cache") == {"num_shards": 2, "num_captions": 3}
    assert verify(tmp_path) == {"num_shards": 10, "num_captions": 27}
    for nothing in ("nothing", "data/nothing"):
        with pytest.raises(FileNotFoundError, match="contains nothing that can be verified"):
            verify(tmp_path / nothing)


def assert_flips_are_found(path: Path) -> None:
    """Flip a bit of every third byte, of each another one than of that before it."""
    size = path.stat().st_size
    assert size > 100
    for position in range(0, size, 3):
        with flip(path, position, position % 8), pytest.raises(DamagedError, match="1 faults in "):
            verify(path.parent)


@pytest.mark.parametrize("name", ["0.emb.safetensors", "0.emb.manifest"])
def test_a_flipped_bit_of_a_sidecar_is_found(name: str, tmp_path: Path) -> None:
    embed(write_shards(tmp_path, 1), None)
    assert_flips_are_found(tmp_path / name)
    assert verify(tmp_path)["num_captions"] == 3


def test_all_faults_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(write_shards(tmp_path, 5), None)
    (tmp_path / "0.emb.manifest").unlink()
    (tmp_path / "1.emb.safetensors").unlink()
    (tmp_path / "2.emb.manifest").write_text("{}")
    with flip(tmp_path / "3.parquet", 10):
        shown = found(tmp_path, capsys)
    for fault in (
        "0.emb.safetensors has no manifest",
        "1.emb.safetensors is missing",
        "2.emb.manifest has changed since it was written",
        f"the captions of the shard {tmp_path}/3.parquet cannot be read",
        f"restore that shard, or delete {tmp_path}/3.emb.manifest and run `llm2clip embed`",
        "4 faults in ",
    ):
        assert fault in shown
    (tmp_path / ".4.emb.safetensors.host.1.tmp").touch()
    assert cli.main(["verify", str(tmp_path), "--sources", "false"]) == 2
    assert ".4.emb.safetensors.host.1.tmp is what a run has not finished" in (shown := capsys.readouterr().err)
    assert "3 faults in " in shown


def test_shards_whose_sidecars_lie_elsewhere_are_compared_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data" / "part", tmp_path / "out"
    source = write_shards(data, 5)
    embed(source, out)
    shutil.copy(data / "2.parquet", data / "1.parquet")
    assert f"the captions of the shard {data}/1.parquet have changed since they were embedded" in found(out, capsys)
    data.rename(tmp_path / "moved")
    assert verify(out)["num_shards"] == 5


@pytest.mark.parametrize("name", ["shard-00001", "index"])
@pytest.mark.parametrize("suffix", [".safetensors", ".manifest"])
def test_a_flipped_bit_of_a_cache_is_found_and_mended_as_verify_says(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"caption {number}" for number in range(10)]
    encoder.build(tmp_path, texts, shard_size=4)
    path, manifest = tmp_path / f"{name}{suffix}", tmp_path / f"{name}.manifest"
    assert_flips_are_found(path)
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert f"delete {manifest} and run " in found(tmp_path, capsys)
    manifest.unlink()
    encoder.build(tmp_path, texts, shard_size=4)
    assert verify(tmp_path) == {"num_shards": 3, "num_captions": 10}


def test_what_is_missing_of_a_cache_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.build(tmp_path, ["a", "b", "c"], shard_size=2)
    lost, interrupted = f"{tmp_path}/shard-00001.safetensors", f"the build of {tmp_path} was interrupted"
    for files, fault in (
        (["shard-00001.manifest"], f"{lost} has no manifest"),
        (["shard-00001.safetensors", "shard-00001.manifest"], f"the shard {lost} is missing"),
        (["index.manifest"], interrupted),
    ):
        contents = {tmp_path / name: (tmp_path / name).read_bytes() for name in files}
        for path in contents:
            path.unlink()
        shown = found(tmp_path, capsys)
        assert fault in shown
        assert "1 faults in" in shown
        for path, content in contents.items():
            path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(building, "_write_index", None)
        with pytest.raises(TypeError):
            encoder.build(tmp_path, ["d"], shard_size=2)
    assert interrupted in found(tmp_path, capsys)
    encoder.build(tmp_path, ["d"], shard_size=2)
    assert verify(tmp_path) == {"num_shards": 3, "num_captions": 4}


def test_features_of_a_frozen_tower(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = small_runs.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    fields |= {"freeze_vision": "all", "feature_cache": str(tmp_path / "features")}
    run_stage2.run(build_config(Stage2Recipe, fields))
    assert verify(tmp_path / "features")["num_images"] > 0
    (shard,) = (tmp_path / "features").rglob("shard-00000.safetensors")
    with flip(shard):
        message = found(tmp_path / "features", capsys)
    assert f"delete {shard.with_suffix('.manifest')} and start the training again" in message


def test_a_run_with_its_checkpoints_and_what_is_built_from_it(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer, scheduler, random numbers, the state of the Trainer, code, configs."""
    monkeypatch.setattr(SourceModel, "compare", lambda *_: 0.0)
    out = tmp_path / "run"
    run_stage2.run(build_config(Stage2Recipe, small_runs.stage2_fields(out, inputs.vision, inputs.text, inputs.cache)))
    assert verify(tmp_path)["num_files"] > 20
    checkpoint = out / "checkpoint-3"
    for path in sorted(checkpoint.iterdir()):
        if path.name.startswith(".") or path.name in ("README.md", "LICENSE"):
            continue
        with flip(path):
            shown = found(tmp_path, capsys)
            assert f"{checkpoint}: {path.name} has changed" in shown
            assert f"delete {checkpoint}; --resume takes an older checkpoint" in shown
    files = ("model.safetensors", "config.json", "modeling_llm2clip.py", "tokenizer.json", "trainer_state.json")
    for name in (*files, "settings.json", "1_Normalize/config.json"):
        with flip(out / name):
            assert f"{out}: {name} has changed" in found(out, capsys)
            assert cli.main(["build", str(out), str(tmp_path / "built")]) == 2
            assert f"{out} is not what was written ({name} has changed" in capsys.readouterr().err
    build.build_folder(out, tmp_path / "built")
    assert verify(tmp_path / "built")["num_files"] > 10
    for name in ("adapter_config.json", "model.safetensors.index.json", "added_tokens.json"):
        (tmp_path / "built" / name).write_text("{}")
        assert f"{name} was not written with the model, but would be loaded" in found(tmp_path / "built", capsys)
        (tmp_path / "built" / name).unlink()
    (tmp_path / "built" / "onnx").mkdir()
    for name in ("NOTICE", "curve.png", "onnx/vision_model.onnx"):
        (tmp_path / "built" / name).write_text("")
    assert verify(tmp_path / "built")["num_files"] > 10
    shutil.copytree(checkpoint, out / "checkpoint-9")
    (out / "checkpoint-9" / ".llm2clip.json").unlink()
    assert cli.main(["verify", str(out)]) == 0
    assert "checkpoint-9 has no .llm2clip.json, which is written last" in capsys.readouterr().err


def test_links_and_manifests_of_others_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder.build(tmp_path / "elsewhere", ["a"], shard_size=2)
    encoder.build(tmp_path / "all" / "cache", ["a"], shard_size=2)
    (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
    other = tmp_path / "all" / "other" / "manifest.json"
    other.parent.mkdir()
    for content in ('{"name": "my extension", "version": 1}', "{"):
        other.write_text(content)
        assert verify(tmp_path / "all") == {"num_shards": 1, "num_captions": 1}
    assert f"{tmp_path / 'all' / 'link'} is a link to a folder, whose content was not checked" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder.build(tmp_path / "cache", ["a"], shard_size=2)
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        verify(tmp_path)
