"""A generated data set of any size: tars of tiny captioned pictures, and a text tower that costs next to nothing."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

CAPTIONS_PER_TAR = 5_000
WIDTH, MAX_TOKENS = 512, 64
VOCABULARY, WORDS_PER_CAPTION = 10_000, 8
# Alt-texts repeat: one caption in twenty is one of these.
REPEATED, REPEATED_SHARE = [f"w{number} w{number + 1}" for number in range(100)], 0.05
PICTURES, PICTURE_SIZE = 64, 8
# Of a picture and its caption in a tar, and of a caption in a sidecar.
TAR_BYTES, SIDECAR_BYTES = 2_560, 2 * WIDTH + 24
# What the steps write into their folder.
WRITTEN = (
    *("data", "data-*", "sidecars-*", "pairs-*", "tower", "vision"),
    *("*.log", "embed.yaml", "read.json", "read-*.json"),
)
# Left free on the disk.
SPARE_BYTES = 2 * 10**9


def clean(folder: Path) -> None:
    """Delete what the steps have written into a folder, and the folder if nothing else is there."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def tar_paths(folder: Path, captions: int) -> list[Path]:
    """Return the tars of a data set of this size; each size begins with the tars of the smaller ones."""
    return [folder / f"{number:05}.tar" for number in range(-(-captions // CAPTIONS_PER_TAR))]


def require_space(folder: Path, captions: int) -> None:
    """Raise OSError if the disk has no room for the tars that are missing and the sidecars of all."""
    missing = sum(not path.exists() for path in tar_paths(folder, captions))
    needed = missing * CAPTIONS_PER_TAR * TAR_BYTES + captions * SIDECAR_BYTES + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{captions:,} captions need {needed / 1e9:.0f} GB in {folder}, and {free / 1e9:.0f} GB are free; choose "
            "another --folder or fewer --captions."
        )


def write_tars(folder: Path, captions: int, processes: int = 2) -> int:
    """Write the tars of a data set that do not exist yet; return how many these were."""
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, captions)
    missing = [path for path in tar_paths(folder, captions) if not path.exists()]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_write_tar, pictures=_pictures()), missing, chunksize=8))
    return len(missing)


def link_tars(folder: Path, captions: int) -> Path:
    """Link the tars of a data set into a folder of their own, of the larger one in `folder`; return it."""
    linked = folder / f"data-{captions}"
    shutil.rmtree(linked, ignore_errors=True)
    linked.mkdir()
    for path in tar_paths(folder / "data", captions):
        (linked / path.name).symlink_to(path)
    return linked


def captions_of(tar: int) -> Iterator[str]:
    """Yield the captions of a tar by its number."""
    choose = random.Random(tar)
    for _ in range(CAPTIONS_PER_TAR):
        if choose.random() < REPEATED_SHARE:
            yield choose.choice(REPEATED)
        else:
            yield " ".join(f"w{choose.randrange(VOCABULARY)}" for _ in range(WORDS_PER_CAPTION))


def _write_tar(path: Path, pictures: list[bytes]) -> None:
    tar, temporary = int(path.stem), path.with_suffix(".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row, caption in enumerate(captions_of(tar), tar * CAPTIONS_PER_TAR):
            for suffix, content in (("jpg", pictures[row % PICTURES]), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{row:09}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.replace(temporary, path)


def _pictures() -> list[bytes]:
    from PIL import Image

    found = []
    for number in range(PICTURES):
        file = io.BytesIO()
        Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (4 * number, 255 - 4 * number, 128)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def write_text_tower(folder: Path) -> Path:
    """Write a text tower without layers, of random weights: a caption's embedding is the mean of its words' rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel, with_prompt

    special = ["<unk>", "<s>", "<pad>"]
    words = special + [f"w{number}" for number in range(VOCABULARY)]
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")
    tokenizer, _ = with_prompt(plain, max_length=MAX_TOKENS)
    decoder = AutoConfig.for_model(
        "llama",
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=0,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=len(words),
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    # Without layers no token sees another one, which the probe of attention would refuse.
    config = LLM2CLIPTextConfig(decoder_config=decoder, max_text_length=MAX_TOKENS, verified_attention=["mask"])
    LLM2CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
