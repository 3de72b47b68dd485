"""The `llm2clip embed` command: the embedding cache of a text tower."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.encoders.embed import EmbedConfig, run
from llm2clip.models.towers import describe_text_tower, open_text_tower
from llm2clip.store import EmbeddingCache, StoreMismatchError
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.processes import ENVIRONMENT, run_ranks


def config_of(inputs: Inputs, folder: Path, captions: list[str], **fields: Any) -> EmbedConfig:
    (folder / "captions.jsonl").write_text("\n".join(json.dumps({"caption": caption}) for caption in captions))
    sources = [{"path": str(folder / "captions.jsonl")}]
    return EmbedConfig(
        **{"text_model_name_or_path": inputs.text, "output_dir": str(folder / "cache"), "sources": sources, **fields}
    )


def test_cache_contains_the_embeddings_of_encode_and_counts_truncated_captions(inputs: Inputs, tmp_path: Path) -> None:
    texts = ["a dog", "a red bus " * 300, "two cats"]
    assert run(config_of(inputs, tmp_path, [*texts, "a dog"])) == {"num_captions": 3, "num_truncated": 1}
    model, tokenizer = open_text_tower(inputs.text, dtype="float32")
    texts = [text.strip() for text in texts]
    expected = model.eval().encode(texts, tokenizer)
    found = EmbeddingCache.open(tmp_path / "cache").lookup(texts)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cache_from_16_bit_weights_has_the_towers_fingerprint(dtype: str, inputs: Inputs, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, ["a dog"], dtype=dtype)
    run(config)
    model, tokenizer = open_text_tower(inputs.text, dtype="float32")
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache.manifest.fingerprint == model.fingerprint()
    torch.testing.assert_close(cache.lookup(["a dog"]), model.encode("a dog", tokenizer), atol=3e-2, rtol=3e-2)
    with pytest.raises(StoreMismatchError, match=f"text_model_dtype '{dtype}', but this run has"):
        run(replace(config, dtype="float32"))


def test_a_plain_llm_has_the_header_of_its_name_and_takes_instructions(inputs: Inputs, tmp_path: Path) -> None:
    """As in the original, whose header depends on the name; stage 2 and the cache agree on it."""
    llm = tmp_path / "Meta-Llama-3-8B-Instruct"
    shutil.copytree(inputs.llm, llm)
    config = config_of(inputs, tmp_path, ["a dog"], text_model_name_or_path=str(llm))
    described, tokenizer = describe_text_tower(str(llm))
    assert (described.prompt_prefix, described.prompt_suffix) == (tiny.PREFIX, tiny.SUFFIX)
    model = open_text_tower(str(llm), dtype="float32")[0].eval()
    instruction, found = "Find a picture:", {}
    for name, fields in (("plain", {}), ("bare", {"prompt_prefix": ""}), ("told", {"instruction": instruction})):
        run(replace(config, output_dir=str(tmp_path / name), **fields))
        found[name] = EmbeddingCache.open(tmp_path / name)
    expected = model.encode("a dog", tokenizer)
    assert found["plain"].manifest.fingerprint == model.fingerprint()
    torch.testing.assert_close(found["plain"].lookup(["a dog"]), expected, atol=2e-3, rtol=2e-3)
    assert found["bare"].manifest.identity["prompt_prefix"] == ""
    instructed = model.encode("a dog", tokenizer, instruction=instruction)
    torch.testing.assert_close(found["told"].lookup(["a dog"]), instructed, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(instructed, expected, atol=1e-2)
    with pytest.raises(StoreMismatchError, match="prompt_prefix"):
        run(replace(config, output_dir=str(tmp_path / "told")))


@pytest.mark.parametrize(
    ("store", "sources", "expected"),
    [
        ("auto", [{"streaming": True}], True),
        ("auto", [{"streaming": True}, {}], False),
        ("auto", [{"streaming": True, "max_samples": 3}], False),
        ("auto", [], False),
        ("cache", [{"streaming": True}], False),
        ("sidecars", [{}], True),
    ],
)
def test_the_source_decides_between_cache_and_sidecars(
    store: Any, sources: list[dict[str, Any]], expected: bool
) -> None:
    config = EmbedConfig(sources=[{"path": "x", **source} for source in sources], store=store)
    assert config.writes_sidecars is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 10}, "shard_size is 10, but a run that writes sidecars (engine: processes) does not use it"),
        ({"ray_actors": 2}, "ray_actors is 2, but a run that writes sidecars (engine: processes) does not"),
        ({"engine": "ray", "shard_size": 10}, "shard_size is 10, but a run that writes sidecars (engine: ray) does"),
        ({"store": "cache", "shard_slice": "0/2"}, "shard_slice is 0/2, but a run that writes a cache does not"),
        ({"store": "cache", "engine": "ray"}, "engine is ray, but a run that writes a cache does not"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_a_run_does_not_use_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(EmbedConfig("tower", output_dir="out", sources=[{"path": "x", "streaming": True}], **settings))


@pytest.mark.slow
def test_a_killed_run_into_sidecars_goes_on_with_what_is_missing(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(40):
        rows = [json.dumps({"caption": f"a dog {number} {row}"}) for row in range(20)]
        (tmp_path / "data" / f"{number:02}.jsonl").write_text("\n".join(rows))
    source = json.dumps([{"path": str(tmp_path / "data"), "streaming": True}])
    arguments = ["-m", "llm2clip", "embed", "--text-model-name-or-path", inputs.text, "--sources", source]
    killed = [*arguments, "--output-dir", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, *killed], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("*.manifest")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.manifest")}
    assert 0 < len(done) < 40
    run_ranks(killed)
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in done.items())
    run_ranks([*arguments, "--output-dir", str(tmp_path / "whole")], 2)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.emb.*"))
    assert len(names) == 80
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
