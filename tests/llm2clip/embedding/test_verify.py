"""Verification of stored embeddings: every flipped bit, and everything that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.embedding.verify import DamagedError, VerifyConfig, run
from tests.llm2clip.embedding import encoder
from tests.llm2clip.embedding.shards import embed, write_shards


def verify(folder: Path) -> dict[str, int]:
    return run(VerifyConfig(folder=str(folder)))


def test_whole_sidecars_and_caches_pass(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "data" / "part")
    embed(source, None)
    embed(source, tmp_path / "out")
    assert verify(tmp_path / "data") == verify(tmp_path / "out") == {"num_shards": 4, "num_captions": 12}
    encoder.build(tmp_path / "cache", ["a", "b", "c"], shard_size=2)
    assert verify(tmp_path / "cache") == {"num_shards": 2, "num_captions": 3}
    with pytest.raises(FileNotFoundError, match="contains no embeddings"):
        verify(tmp_path / "data" / "nothing")


def test_every_flipped_bit_of_a_sidecar_is_found(tmp_path: Path) -> None:
    embed(write_shards(tmp_path, 1), None)
    path = tmp_path / "0.emb.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match="1 faults in the 1 sidecars"):
            verify(tmp_path)
    path.write_bytes(content)
    assert verify(tmp_path)["num_captions"] == 3


def test_all_faults_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, 5)
    embed(write_shards(tmp_path, 5), None)
    (tmp_path / "0.emb.manifest").unlink()
    (tmp_path / "1.emb.safetensors").unlink()
    (tmp_path / "2.emb.manifest").write_text("{}")
    content = bytearray((tmp_path / "3.parquet").read_bytes())
    content[10] ^= 1
    (tmp_path / "3.parquet").write_bytes(content)
    assert cli.main(["verify", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    for fault in (
        "0.emb.safetensors has no manifest",
        "0.parquet has no sidecar",
        "1.emb.safetensors is missing",
        "2.emb.manifest is not the manifest of a sidecar",
        f"the shard {tmp_path}/3.parquet has changed since it was embedded",
        "5 faults in the 4 sidecars",
    ):
        assert fault in shown
    (tmp_path / ".4.emb.safetensors.host.1.tmp").touch()
    assert cli.main(["verify", str(tmp_path), "--sources", "false"]) == 1
    assert ".4.emb.safetensors.host.1.tmp is what a run has not finished" in (shown := capsys.readouterr().err)
    assert "4 faults in the 4 sidecars" in shown
