"""What the fuzz run and the property tests have found, in its smallest form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llm2clip.convert.conversion import convert_checkpoint
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.data.opened_table import SourceError
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.search.search_index import SearchIndex
from llm2clip.store import StoreManifest, StoreMismatchError
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.manifests import FOLDER_MANIFEST, with_checksum, write_manifest
from llm2clip.utils.settings import build_config
from llm2clip.verification.kinds import verify_folder
from tests.fuzz import stores
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA
from tests.llm2clip.encoders import shards


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", gzip.compress(b"caption\n" + b"a dog\n" * 99, mtime=0)[:-12]),
        ("a.csv.gz", gzip.compress(b"caption\na dog\n", mtime=0)[:2] + b"\0" * 20),
        ("a.csv", b"caption\n\xff\xfe\n"),
        ("a.jsonl", b'{"caption": "a dog"}\n{"caption": "a'),
        ("a.json", b'[{"caption" "a dog"}]'),
        ("a.arrow", b"ARROW1"),
    ],
)
def test_a_damaged_table_is_named(name: str, content: bytes, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=name):
        distinct_captions(CaptionSource(str(tmp_path / name), streaming=streaming), False)


def test_a_list_of_numbers_is_no_table_of_captions(tmp_path: Path) -> None:
    # Of a stream, `datasets` 5.2 returns them as text.
    (tmp_path / "a.json").write_bytes(b"[true, 1]")
    with pytest.raises(SourceError, match=r"a\.json"):
        distinct_captions(CaptionSource(str(tmp_path / "a.json")), False)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_json_that_is_null_does_not_end_the_process(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('null\n{"caption": "a dog"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl"):
        distinct_captions(CaptionSource(str(path), streaming=streaming), False)
    path.write_text('{"caption": "a dog"}\nnull\n{"caption": null}\n')
    assert distinct_captions(CaptionSource(str(path), streaming=streaming), False) == ["a dog"]


@pytest.mark.parametrize("content", ["[]", '{"_data_files": 1}', "{"])
def test_a_damaged_saved_table_is_named(content: str, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"caption": ["a dog"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text(content)
    with pytest.raises(SourceError, match="saved cannot be read"):
        distinct_captions(CaptionSource(str(tmp_path / "saved")), False)


def test_a_sidecar_with_one_more_field_of_its_encoder_is_of_another(tmp_path: Path) -> None:
    source = shards.write_shards(tmp_path, 2)
    shards.embed(source, None)
    path = tmp_path / "1.emb.manifest"
    manifest = StoreManifest.read(path)
    more = {**manifest.identity, "more": 3}
    less = {name: value for name, value in manifest.identity.items() if name != "tokenizer_fingerprint"}
    for identity, message in ((more, "more 3, but .* has None"), (less, "tokenizer_fingerprint None")):
        replace(manifest, identity=identity).write(path)
        with pytest.raises(StoreMismatchError, match=rf"1\.emb\.manifest has {message}"):
            SourceSidecars(tmp_path, ShardedSource(source).shards).check(["caption"])


def test_a_command_with_braces_is_no_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, "{a: b}")
    (tmp_path / "config.json").write_text("{")
    (fault,) = verify_folder(tmp_path).faults
    assert "{a: b}" in str(fault)


def test_the_manifest_of_an_index_that_has_changed_is_refused(tmp_path: Path) -> None:
    stores.make_indexes(tmp_path / "seeds", ["flat"])
    path = tmp_path / "seeds/flat/manifest.json"
    path.write_text(path.read_text().replace('"width": 24', '"width": 25'))
    with pytest.raises(ValueError, match=r"does not fit its manifest_checksum.*build it again"):
        SearchIndex.open(path.parent)


def test_a_damaged_column_of_an_index_is_not_blamed_on_the_condition(tmp_path: Path) -> None:
    stores.make_indexes(tmp_path / "seeds", ["flat"])
    folder = tmp_path / "seeds/flat"
    query = np.ones((1, SearchIndex.open(folder).manifest.width), np.float32)
    for path in folder.glob("images.lance/_indices/*/*.lance"):
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"the index .* is damaged"):
        SearchIndex.open(folder).search(query, 3, "extension = 'png'")


def _model(folder: Path) -> Path:
    return Path(checkpoints.microsoft_openai_folder(folder))


def _broken_card(folder: Path) -> Path:
    (_model(folder) / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    return folder / "README.md"


def _broken_config(folder: Path) -> Path:
    path = _model(folder) / "config.json"
    write_json(path, read_json(path) | {"vision_config": {"model_type": "clip_vision_model", "image_size": "x"}})
    return folder


@pytest.mark.parametrize("make", [_broken_card, _broken_config])
def test_a_folder_of_a_checkpoint_with_a_damaged_file_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    named = make(tmp_path / "in")
    llm = checkpoints.llm_of(checkpoints.OPENAI, tmp_path / "llm")
    with pytest.raises(ValueError, match=named.name):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", text_model=llm)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(vision_cfg="x"),
        lambda fields: fields.update(text_cfg=True),
        lambda fields: fields["vision_cfg"].pop("patch_size"),
        lambda fields: fields["vision_cfg"].update(image_size=-1),
        lambda fields: fields["vision_cfg"].update(width="x"),
    ],
)
def test_a_model_config_with_other_types_is_named(change: Callable[[Any], Any], tmp_path: Path) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    path = Path(checkpoints.model_config(EVA, tmp_path))
    fields = read_json(path)
    change(fields)
    write_json(path, fields)
    llm = checkpoints.llm_of(EVA, tmp_path / "llm")
    with pytest.raises(ValueError, match=path.name):
        convert_checkpoint(source, tmp_path / "out", model_config=str(path), text_model=llm)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda fields: fields.update(eos_token_id="x")),
        ("config.json", lambda fields: fields.update(model_type={})),
        ("tokenizer.json", lambda fields: fields.update(post_processor={"type": "x"})),
        ("tokenizer_config.json", lambda fields: fields.update(__class__=3)),
    ],
)
def test_a_language_model_with_a_damaged_file_is_named(
    name: str, change: Callable[[Any], Any], tmp_path: Path
) -> None:
    folder = Path(checkpoints.llm_folder(tmp_path / "llm", 24))
    fields = json.loads((folder / name).read_text())
    change(fields)
    write_json(folder / name, fields)
    with pytest.raises(ValueError, match="llm"):
        convert_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("save_strategy", "epoc"), ("accelerator_config", {"x": 1}), ("accelerator_config", "absent.json")],
)
def test_settings_of_the_trainer_are_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        build_config(Stage2Recipe, {"output_dir": str(tmp_path), "use_cpu": True, name: value})


def test_the_manifest_of_a_folder_may_have_any_name_of_a_file(tmp_path: Path) -> None:
    write_json(tmp_path / FOLDER_MANIFEST, with_checksum({"written_by": "llm2clip build", "files": {"a\0b": 1}}))
    (fault,) = verify_folder(tmp_path).faults
    assert "is missing" in str(fault)


@pytest.mark.parametrize("name", [None, 3])
def test_a_field_of_a_recipe_is_named_by_a_text(name: Any) -> None:
    with pytest.raises(ValueError, match=f"the recipe has no field {name}"):
        build_config(Stage2Recipe, {name: 1})
