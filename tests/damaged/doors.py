"""The doors: every reader of files that come from elsewhere, with good files, and wrong ones that once got through."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from typing import Any

import torch

from llm2clip.files.manifests import MANIFEST_CHECKSUM, with_checksum
from tests.damaged import data, models, stores
from tests.damaged.cases import Door, Wrong
from tests.damaged.images import hostile


class Code:
    """Its pickle calls the system when it is read."""

    def __reduce__(self) -> Any:
        return (os.system, ("exit 1",))


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _listing(name: str) -> Any:
    """Of a list of files: the same list with one more file, and a checksum that fits."""

    def change(good: bytes) -> bytes:
        fields = {key: value for key, value in json.loads(good).items() if key != MANIFEST_CHECKSUM}
        return json.dumps(with_checksum(fields | {"files": fields["files"] | {name: 1}})).encode()

    return change


def _of_another_encoder(good: bytes) -> bytes:
    fields = json.loads(good)
    return json.dumps(fields | {"identity": fields["identity"] | {"more": 3}}).encode()


def _without_patch_size(good: bytes) -> bytes:
    fields = json.loads(good)
    del fields["vision_cfg"]["patch_size"]
    return json.dumps(fields).encode()


IMAGES = tuple(Wrong("plain.png", "image", content) for content in hostile().values())
TABLES = (
    Wrong("a.csv.gz", "a.csv.gz", gzip.compress(b"caption\n" + b"a dog\n" * 99, mtime=0)[:-12]),
    Wrong("a.csv.gz", "a.csv.gz", gzip.compress(b"caption\na dog\n", mtime=0)[:2] + b"\0" * 20),
    Wrong("a.csv", "a.csv", b"caption\n\xff\xfe\n"),
    Wrong("a.jsonl", "a.jsonl", b'{"caption": "a dog"}\n{"caption": "a'),
    # It ended the process.
    Wrong("a.jsonl", "a.jsonl", b'null\n{"caption": "a dog"}\n'),
    Wrong("a.json", "a.json", b'[{"caption" "a dog"}]'),
    Wrong("a.arrow", "a.arrow", b"ARROW1"),
    *(Wrong("saved", "state.json", content) for content in (b"[]", b'{"_data_files": 1}', b"{")),
)
RECIPES = (
    Wrong("mntp.json", "mntp.json", {"": 1}),
    Wrong("stage1_paper", "stage1_paper.yaml", b"3: 1"),
    Wrong("stage2_small_gpu.json", "stage2_small_gpu.json", {"save_strategy": "epoc"}),
    Wrong("stage2_small_gpu.json", "stage2_small_gpu.json", {"accelerator_config": {"x": 1}}),
    Wrong("stage2_small_gpu.json", "stage2_small_gpu.json", {"accelerator_config": "absent.json"}),
    Wrong("embed_paper", "embed_paper.yaml", b"!!python/object/apply:os.system ['exit 1']"),
)
LISTS = (
    Wrong("checkpoint", "checkpoint-3/.llm2clip.json", _listing("a\0b"), any),
    Wrong("checkpoint", "checkpoint-3/.llm2clip.json", _listing("../../outside"), any),
    # It was taken for a format.
    Wrong("model", "checkpoint-3/.llm2clip.json", {"written_by": "{a: b}"}, any),
)
SIDECARS = (Wrong("files", "1.emb.manifest", _of_another_encoder, any),)
INDEXES = (Wrong("flat", "manifest.json", {"width": 25}),)
CHECKPOINTS = (
    Wrong("microsoft", "README.md", b"---\nlicense: \xff\n---\n", any),
    Wrong("microsoft", "config.json", {"vision_config": {"model_type": "clip_vision_model", "image_size": "x"}}),
    Wrong("eva", "model.pt", pickle.dumps({"visual.proj": Code()})),
    Wrong("eva", "model.pt", _saved({"visual.proj": torch.zeros(2, 2), "x": Code()})),
    Wrong("eva", "model.pt", _saved({"x": Code()}, _use_new_zipfile_serialization=False)),
    Wrong("eva", "model_config.json", {"vision_cfg": "x"}),
    Wrong("eva", "model_config.json", {"text_cfg": True}),
    Wrong("eva", "model_config.json", _without_patch_size),
    Wrong("eva", "model_config.json", {"vision_cfg": {"image_size": -1}}),
)
LANGUAGE_MODELS = (
    Wrong("pickled", "pytorch_model.bin", _saved({"x": Code()})),
    Wrong("whole", "config.json", {"eos_token_id": "x"}),
    Wrong("whole", "config.json", {"model_type": {}}),
    Wrong("whole", "tokenizer.json", {"post_processor": {"type": "x"}}),
    Wrong("whole", "tokenizer_config.json", {"__class__": 3}),
)

DOORS = {
    "images": Door(data.make_images, data.read_image, IMAGES),
    "tars": Door(data.make_tars, data.read_tar, several=True),
    "tables": Door(data.make_tables, data.read_table, TABLES, limit=60),
    "recipes": Door(data.make_recipes, data.read_recipe, RECIPES, names=data.SETTINGS),
    "lists": Door(stores.make_lists, stores.read_lists, LISTS, several=True, checked=True, unchecked=("*/README.md",)),
    "caches": Door(stores.make_caches, stores.read_cache, several=True, checked=True),
    "sidecars": Door(stores.make_sidecars, stores.read_sidecars, SIDECARS, unchanged=("*.parquet",), checked=True),
    "indexes": Door(stores.make_indexes, stores.read_index, INDEXES, limit=60, checked=True),
    "checkpoints": Door(models.make_checkpoints, models.read_checkpoint, CHECKPOINTS, limit=60, unchanged=("llm/*",)),
    "language_models": Door(models.make_language_models, models.read_language_model, LANGUAGE_MODELS, limit=60),
}
