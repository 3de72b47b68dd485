"""Verification of an index in a folder: a flip in every file, and no false alarm after updates and kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from llm2clip.files.manifests import FOLDER_MANIFEST, MANIFEST_CHECKSUM, with_checksum
from llm2clip.search.lance_store import HINT
from llm2clip.search.verify_index import verify_index
from tests.damage import flip

from .helpers import Model, encoded, index, picture


def files(folder: Path) -> list[Path]:
    unlisted = {folder / name for name in (".lock", FOLDER_MANIFEST, HINT)}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in unlisted)


@pytest.mark.parametrize("index_type", ["ivf_rq", "faiss"])
def test_a_flip_in_every_file_of_an_index_is_found(
    index_type: str, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "index"
    index(pictures, model[0], output, index_type=index_type)
    assert cli.main(["verify", str(output)]) == 0
    assert "num_images: 12" in capsys.readouterr().out
    for path in files(output):
        with flip(path):
            assert cli.main(["verify", str(output)]) == 2
            shown = capsys.readouterr().err
            assert f"{path} has changed" in shown or f"{path} is not valid JSON" in shown
            assert f"--output-dir {output} --overwrite" in shown
        path.rename(tmp_path / "moved")
        assert cli.main(["verify", str(output)]) == 2
        assert f"{path} is missing" in capsys.readouterr().err
        (tmp_path / "moved").rename(path)
    for place in range((output / HINT).stat().st_size):
        with flip(output / HINT, place):
            assert cli.main(["verify", str(output)]) == 0
            assert cli.main(["search", str(output), "a dog"]) == 0


def test_the_copy_of_an_index_at_a_url_is_read_and_its_list_is_not_trusted(
    indexed: Path, pictures: Path, model: Model
) -> None:
    fields = json.loads((indexed / FOLDER_MANIFEST).read_text())
    del fields["sha256"], fields[MANIFEST_CHECKSUM]
    fields["files"]["manifest.json"] += 7
    (indexed / FOLDER_MANIFEST).write_text(json.dumps(with_checksum(fields)))
    found = verify_index(indexed)
    assert found.faults == []
    assert found.remarks == [f"{indexed} has no checksums of its files, since it was written at a URL."]
    assert found.counts["num_images"] == 12
    (pictures / "new.png").write_bytes(encoded(picture(99)))
    index(pictures, model[0], indexed)
    assert verify_index(indexed).remarks == []


def test_embeddings_that_are_no_unit_vectors_are_a_fault(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    embed = OurEncoder.encode_image_parts

    def doubled(*arguments: Any, **settings: Any) -> Iterator[Any]:
        for part in embed(*arguments, **settings):
            yield replace(part, rows=2 * part.rows)

    with monkeypatch.context() as patch:
        patch.setattr(OurEncoder, "encode_image_parts", doubled)
        index(pictures, model[0], output)
    assert [fault.what for fault in verify_index(output).faults] == [
        f"12 embeddings of the index {output} are no unit vectors"
    ]
