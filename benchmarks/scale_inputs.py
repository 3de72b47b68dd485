"""Inputs of `benchmarks.scale`: tars of tiny captioned pictures, and towers that cost little."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

CAPTIONS_PER_TAR, WIDTH, VOCABULARY, WORDS = 5_000, 512, 10_000, 8
# Alt-texts repeat: one caption in twenty is one of these.
REPEATED, REPEATED_SHARE = [f"w{number} w{number + 1}" for number in range(100)], 0.05


def write_tars(folder: Path, captions: int) -> None:
    """Write the tars of a data set that do not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.tar" for number in range(-(-captions // CAPTIONS_PER_TAR))]
    with ProcessPoolExecutor(2) as pool:
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


def write_text_tower(folder: Path) -> None:
    """Write a text tower without layers, of random weights: a caption's embedding is the mean of its words' rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from llm2clip.models.prompting import with_prompt
    from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel

    words = ["<unk>", "<s>", "<pad>", *(f"w{number}" for number in range(VOCABULARY))]
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")
    tokenizer, _ = with_prompt(plain, max_length=64)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 0, "num_attention_heads": 8}
    tokens = {"vocab_size": len(words), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = LLM2CLIPTextConfig(decoder_config=AutoConfig.for_model("llama", **sizes, **tokens), max_text_length=64)
    LLM2CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vision_tower(folder: Path) -> None:
    """Write an EVA02 of one layer with random weights and its image processor."""
    import torch
    from transformers import CLIPImageProcessor

    from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel

    sizes = {"hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    EVA02VisionModel(EVA02VisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
