"""Inputs of `benchmarks.scale`: tars of tiny captioned pictures, a text tower that costs little, and pairs."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CAPTIONS_PER_TAR, WIDTH, VOCABULARY, WORDS = 5_000, 512, 10_000, 8
# Alt-texts repeat: one caption in twenty is one of these.
REPEATED, REPEATED_SHARE = [f"w{number} w{number + 1}" for number in range(100)], 0.05
# Widths of the images and texts that are aligned, and how many directions they share.
IMAGE_WIDTH, TEXT_WIDTH, SHARED = 512, 768, 64
# Of a caption with its picture and its embedding, of a pair in both stores, and left free.
CAPTION_BYTES, PAIR_BYTES, SPARE_BYTES = 2_560 + 2 * WIDTH + 24, 2 * (IMAGE_WIDTH + TEXT_WIDTH) + 80, 2 * 10**9


def require_space(folder: Path, bytes_needed: int) -> None:
    """Raise OSError if the disk of a folder has no room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = bytes_needed + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{needed / 1e9:.0f} GB are needed in {folder}, and {free / 1e9:.0f} GB are free; choose another --folder "
            "or fewer --captions."
        )


def write_tars(folder: Path, captions: int, processes: int = 2) -> None:
    """Write the tars of a data set that do not exist yet."""
    require_space(folder, captions * CAPTION_BYTES)
    paths = [folder / f"{number:05}.tar" for number in range(-(-captions // CAPTIONS_PER_TAR))]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(_write_tar, [path for path in paths if not path.exists()], chunksize=8))


def _write_tar(path: Path) -> None:
    from PIL import Image

    picture, tar, temporary = io.BytesIO(), int(path.stem), path.with_suffix(".tmp")
    Image.new("RGB", (8, 8), (tar % 256, 128, 128)).save(picture, "JPEG")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row, caption in enumerate(captions_of(tar), tar * CAPTIONS_PER_TAR):
            for suffix, content in (("jpg", picture.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{row:09}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.replace(temporary, path)


def captions_of(tar: int) -> Iterator[str]:
    """Yield the captions of a tar by its number."""
    choose = random.Random(tar)
    for _ in range(CAPTIONS_PER_TAR):
        if choose.random() < REPEATED_SHARE:
            yield choose.choice(REPEATED)
        else:
            yield " ".join(f"w{choose.randrange(VOCABULARY)}" for _ in range(WORDS))


def write_text_tower(folder: Path) -> Path:
    """Write a text tower without layers, of random weights: a caption's embedding is the mean of its words' rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel, with_prompt

    words = ["<unk>", "<s>", "<pad>", *(f"w{number}" for number in range(VOCABULARY))]
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")
    tokenizer, _ = with_prompt(plain, max_length=64)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 0, "num_attention_heads": 8}
    tokens = {"vocab_size": len(words), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    # Without layers no token sees another one, which the probe of attention would refuse.
    config = LLM2CLIPTextConfig(
        decoder_config=AutoConfig.for_model("llama", **sizes, **tokens),
        max_text_length=64,
        verified_attention=["mask"],
    )
    LLM2CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_stores(stores: Path, pairs: int) -> None:
    """Write two stores of random rows that share directions, `images` and `texts`."""
    import numpy as np

    from llm2clip.encoders.image_features import feature_manifest
    from llm2clip.store import build_store, caption_manifest

    require_space(stores, pairs * PAIR_BYTES)
    images = feature_manifest(
        "random", "random", width=IMAGE_WIDTH, pooling="cls", image_backend="exact", max_pixels=1
    )
    prompt: dict[str, Any] = {"pooling": "mean", "prompt_prefix": "", "prompt_suffix": "", "max_length": 64}
    texts = caption_manifest("random", "random", width=TEXT_WIDTH, **prompt)
    keys = np.stack([np.arange(pairs), np.zeros(pairs, dtype=np.int64)], axis=1)
    for name, width, manifest in (("images", IMAGE_WIDTH, images), ("texts", TEXT_WIDTH, texts)):
        with build_store(stores / name, keys, manifest, title=name.title()) as build:
            for number, positions in build:
                build.write(number, positions, _rows(width, positions))
                build.bar.update(len(positions))


def _rows(width: int, positions: Any) -> Any:
    """Make the rows of a shard."""
    import torch

    from llm2clip.store.building import ComputedRows

    basis = torch.randn(SHARED, width, generator=torch.Generator().manual_seed(width))
    shared, own = (torch.Generator().manual_seed(int(positions[0]) * 10_000 + number) for number in (0, width))
    rows = torch.randn(len(positions), SHARED, generator=shared) @ basis
    rows += 4 * torch.rand(len(positions), width, generator=own)
    return ComputedRows(rows.half())
