"""Every manifest says after reading what was written, and is refused by name where it says what it cannot."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2clip.search.index_manifest import IndexManifest
from llm2clip.store.manifest import SourceFile, StoreManifest
from llm2clip.trainers.checkpoints import finish_checkpoint, last_checkpoint
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.manifests import (
    FOLDER_MANIFEST,
    MANIFEST_CHECKSUM,
    MODEL_MANIFEST,
    damage,
    faults,
    foreign_files,
    listed_files,
    own_files,
    with_checksum,
    write_manifest,
    write_model_manifest,
    written_by,
)
from llm2clip.verification.kinds import verify_folder
from tests.llm2clip.encoders.shards import description
from tests.properties.inputs import TEXTS, VALUES, quick
from tests.refusals import accepted

COUNTS = st.integers(0, 2**40)
NAME = "0.manifest"
NAMES = st.text(st.characters(categories=["L", "N", "S"], exclude_characters="/"), min_size=1, max_size=12)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name, "the-manifests")


class Kind(NamedTuple):
    """A manifest that is an object: an example, how it is written, and how it is read."""

    example: Any
    write: Callable[[Any, Path], None]
    read: Callable[[Path], Any]


KINDS = {
    "store": Kind(
        dataclasses.replace(
            description(),
            counts={"truncated": 1},
            skipped=[[2, "key", "reason"]],
            source=SourceFile("0.tar", 9, "a", 3, ["caption"], {"start": 0, "stop": 2, "total": 4}, "/shards/0.tar"),
            shards={"shard-00000.safetensors": [3, 9, "a"]},
        ),
        lambda manifest, place: manifest.write(place),
        StoreManifest.read,
    ),
    "index": Kind(
        IndexManifest(
            "model", None, "2-abc", 24, "float16", {"kind": "folder", "path": "x"}, {"type": "flat"}, ["label"],
            stored={"version": 3, "faiss": "x"}, versions={"torch": "2"},
        ),
        lambda manifest, place: write_json(place, dataclasses.asdict(manifest)),
        lambda place: IndexManifest.from_fields(str(place), read_json(place)),
    ),
}  # fmt: skip


def _texts(example: Any) -> list[str]:
    """The names of fields that may be any text."""
    refused = {"dtype", "image_backend", "embed", "kind"}
    return [name for name, value in vars(example).items() if isinstance(value, str) and name not in refused]


@quick(40)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_is_written_is_read(kind: str, data: st.DataObject) -> None:
    example, write, read = KINDS[kind]
    counts = [name for name, value in vars(example).items() if type(value) is int and name != "format_version"]
    drawn = {name: data.draw(TEXTS) for name in _texts(example)} | {name: data.draw(COUNTS) for name in counts}
    manifest = dataclasses.replace(example, **drawn)
    with folder() as place:
        write(manifest, place / NAME)
        assert read(place / NAME) == manifest


@quick(60)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_field_with_any_value_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    example, write, read = KINDS[kind]
    with folder() as place:
        path = place / NAME
        write(example, path)
        fields = json.loads(path.read_text())
        path_in_it, document = [], fields
        while isinstance(document, dict) and document and (not path_in_it or data.draw(st.booleans())):
            path_in_it.append(data.draw(st.sampled_from(list(document))))
            parent, document = document, document[path_in_it[-1]]
        parent[path_in_it[-1]] = data.draw(VALUES)
        write_json(path, fields)
        if (found := accepted(lambda: read(path), place.name)) is None:
            return
        # What is accepted means the same when it is written again.
        write(found, path)
        assert read(path) == found


def _written(place: Path, names: list[str]) -> Path:
    checkpoint = place / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    for number, name in enumerate(names):
        (checkpoint / name).write_bytes(bytes(number))
    return checkpoint


@quick(25)
@given(st.lists(NAMES, unique=True, min_size=1, max_size=5), st.data())
def test_lists_of_files_name_what_is_there(names: list[str], data: st.DataObject) -> None:
    with folder() as place:
        checkpoint = _written(place, names)
        write_model_manifest(checkpoint, names)
        write_manifest(checkpoint, "build")
        assert (written_by(checkpoint), foreign_files(checkpoint, "build")) == ("build", [])
        assert set(listed_files(checkpoint)) == {*names, MODEL_MANIFEST}
        assert list(faults(checkpoint)) == []
        name = data.draw(st.sampled_from(names))
        (checkpoint / name).write_bytes(b"something else")
        found = "\n".join(faults(checkpoint))
        assert name in found
        assert damage(checkpoint) is not None
        (checkpoint / "new").write_text("")
        assert foreign_files(checkpoint, "build") == ["new"]


@quick(60)
@pytest.mark.parametrize("manifest", [FOLDER_MANIFEST, MODEL_MANIFEST])
@given(value=VALUES, place_of=st.lists(st.integers(0, 3), min_size=1, max_size=2))
def test_a_list_of_files_with_any_value_is_read_or_refused(manifest: str, value: Any, place_of: list[int]) -> None:
    with folder() as place:
        checkpoint = _written(place, ["model.safetensors", "trainer_state.json"])
        if manifest == MODEL_MANIFEST:
            write_model_manifest(checkpoint, ["model.safetensors"])
        finish_checkpoint(checkpoint, None, None)
        fields = read_json(checkpoint / manifest)
        parent: Any = fields
        for number in place_of[:-1]:
            inner = parent[list(parent)[number % len(parent)]]
            parent = inner if isinstance(inner, dict) else parent
        parent[list(parent)[place_of[-1] % len(parent)]] = value
        if MANIFEST_CHECKSUM in fields:
            fields = with_checksum({name: value for name, value in fields.items() if name != MANIFEST_CHECKSUM})
        write_json(checkpoint / manifest, fields)
        for door in (
            lambda: listed_files(checkpoint),
            lambda: written_by(checkpoint),
            lambda: own_files(checkpoint, "training"),
            lambda: foreign_files(checkpoint, "training"),
            lambda: verify_folder(checkpoint),
            lambda: damage(checkpoint),
        ):
            accepted(door, place.name, manifest)
        # What is taken as whole has no fault.
        is_whole = damage(checkpoint, contents=True) is None
        assert (last_checkpoint(place) is not None) == is_whole
