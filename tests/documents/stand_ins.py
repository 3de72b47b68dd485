"""Small models and data that replace those named by the commands of the documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm2clip.convert.original import to_original
from llm2clip.convert.published import published_models
from llm2clip.recipes import find_recipe, load_recipe
from tests.builders import embedding_models, small_runs, tiny
from tests.documents.reading import ROOT, blocks
from tests.golden import FOLDER as GOLDEN
from tests.llm2clip.convert.checkpoints import microsoft_openai_names, with_text_tower
from tests.tars import write_tar

Builder = Callable[[Path], Any]
DREAMLIP = [f"{length}{llm}_captions" for length in ("short", "long") for llm in ("IB", "SV", "LLA")]


@cache
def rows(count: int = 24) -> list[dict[str, Any]]:
    """Return some of the bundled images, each with a short and a long caption."""
    return [
        {"image": row["image"], "caption": row["caption"], "long": f"{row['caption']}: {row['keywords']}"}
        for row in small_runs.rows_of_concepts(f":{count}")
    ]


def llm(golden: str, folder: Path) -> None:
    """Save a causal LLM with the architecture and tokenizer of a golden text tower."""
    config = AutoConfig.from_pretrained(GOLDEN / golden)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / golden).save_pretrained(folder)


def clip(folder: Path) -> None:
    """Save a CLIP model in OpenAI's layout, with its image processor and its tokenizer."""
    sizes = {**tiny.SIZES, "image_size": 28, "patch_size": 7}
    tokenizer = embedding_models.byte_pairs()
    text = {**tiny.SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(vision_config=sizes, text_config=text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.processor().image_processor.save_pretrained(folder)


def published(name: str, folder: Path) -> None:
    """Save a checkpoint with the tensor names and shapes of a published one."""
    model = published_models()[name]
    tensors = model.build().state_dict()
    config = {"model_type": "clip", "projection_dim": model.config.projection_dim}
    if name.startswith("LLM2CLIP-Openai"):
        tensors, file = microsoft_openai_names(tensors), "pytorch_model.bin"
        config["vision_config"] = model.config.vision_config.to_dict()
    else:
        tensors, file = to_original(model.config, tensors), f"{name}.pt"
    save_zeros(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))


def eva_clip(path: Path) -> None:
    """Save a checkpoint with the tensor names and shapes of EVA02-CLIP-L-14."""
    model = published_models()["LLM2CLIP-EVA02-L-14-224"]
    save_zeros(with_text_tower(to_original(model.config, model.build().state_dict())), path)


def save_zeros(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save one zero, repeated for every tensor; a pickle keeps the one, so that gigabytes are some kilobytes."""
    zero = torch.zeros((), dtype=torch.float16)
    torch.save({name: zero.expand(tensor.shape) for name, tensor in tensors.items()}, path)


def wide_llm(width: int, folder: Path) -> None:
    """Save an LLM of one small layer, but of the width that the adapter of a published model expects."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / LLAMA)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = LlamaConfig(hidden_size=width, intermediate_size=8, vocab_size=len(tokenizer), **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def photos(folder: Path) -> None:
    """Save photographs, without captions."""
    for number, row in enumerate(rows(8)):
        row["image"].convert("RGB").save(folder / f"{number}.jpg")


def wikitext(folder: Path) -> None:
    """Write free text in the layout of `Salesforce/wikitext`."""
    name = "wikitext-103-raw-v1"
    (folder / name).mkdir()
    texts = [row["long"] for row in rows()]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / name / "train-00000-of-00001.parquet")
    config = {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")


def table(columns: dict[str, str], splits: tuple[str, ...], folder: Path) -> None:
    """Captioned images in parquet files, one per split; `columns` says which caption each column holds."""
    for split in splits:
        content = [{"image": row["image"], **{name: row[kind] for name, kind in columns.items()}} for row in rows()]
        datasets.Dataset.from_list(content).to_parquet(folder / f"{split}.parquet")


def captions_csv(columns: list[str], folder: Path) -> None:
    """Write captions of images, one column per kind."""
    content = [{name: row["long" if "long" in name else "caption"] for name in columns} for row in rows()]
    datasets.Dataset.from_list(content).to_csv(folder / "part-0.csv")


def text_pairs(folder: Path) -> None:
    """Write queries with a positive and a negative each."""
    content = [
        {"query": row["caption"], "positive": row["long"], "negative": other["long"]}
        for row, other in zip(rows(), reversed(rows()), strict=True)
    ]
    (folder / "part-0.jsonl").write_text("\n".join(map(json.dumps, content)))


def shards(folder: Path) -> None:
    """Write two webdataset shards with the captions of DreamLIP."""
    for shard in range(2):
        files = []
        for number, row in enumerate(rows()[shard::2]):
            jpeg = BytesIO()
            row["image"].convert("RGB").save(jpeg, "jpeg")
            captions = dict.fromkeys(("raw_caption", "shortSV_captions"), row["caption"])
            fields = json.dumps({**captions, "longSV_captions": row["long"]}).encode()
            files += [(f"{shard}-{number:03d}.jpg", jpeg.getvalue()), (f"{shard}-{number:03d}.json", fields)]
        write_tar(folder / f"{shard}.tar", files)


def questions(folder: Path) -> None:
    """Write questions about pictures."""
    content = [{"image": row["image"], "question": "What is this?", "answer": row["caption"]} for row in rows()]
    for split in ("train", "test"):
        datasets.Dataset.from_list(content).to_parquet(folder / f"{split}.parquet")


def pictures(folder: Path) -> None:
    """Write a folder of pictures with `metadata.jsonl` for each split, more than one batch of the recipe."""
    for split in ("train", "test"):
        (folder / split).mkdir()
        lines = []
        for number, row in enumerate(rows(72)):
            row["image"].save(folder / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "caption": row["caption"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def small_profile(path: Path) -> None:
    """Write the profile of the quickstart with a few small training steps on a CPU."""
    profile = load_recipe(find_recipe("quickstart_default"))
    small = {"use_cpu": True, "max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 8}
    for part in ("stage1", "stage2"):
        profile[part] |= small
    profile["stage2"]["projection_dim"] = 16
    del profile["stage2"]["vision_layers"]  # The stand-in of the user's tower has two layers.
    path.write_text(yaml.safe_dump(profile))


def pairs_csv(path: Path) -> None:
    """Write a CSV of captions and of the paths of pictures in a folder beside it."""
    (path.parent / "images").mkdir(parents=True)
    lines = ["photo,title"]
    for number, row in enumerate(rows()):
        row["image"].save(path.parent / "images" / f"{number}.png")
        lines.append(f'images/{number}.png,"{row["caption"]}"')
    path.write_text("\n".join(lines), encoding="utf-8")


def museum(folder: Path) -> None:
    """Write the files of the documented benchmark."""
    images = folder / "images"
    images.mkdir(parents=True)
    for row, name in zip(rows(3), ("vase.png", "beetle.png", "pot.png"), strict=True):
        row["image"].save(images / name)
    lines = ["image,caption", 'vase.png," a vase, Greek"', "beetle.png,ein Käfer aus Gold", "pot.png,a vase"]
    lines += ["vase.png,a vase", "pot.png,"]
    (folder / "captions.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")


def documented_benchmark(path: Path) -> None:
    """Write the benchmark that docs/evaluate.md shows."""
    (shown,) = (content for _, content in blocks("docs/evaluate.md") if "BENCHMARKS = [" in content)
    path.write_text(shown)


def photo(path: Path) -> None:
    """Save an image of noise."""
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)


def labels(path: Path) -> None:
    """Write some labels."""
    path.write_text("bicycle\ntruck\nflower\n", encoding="utf-8")


E5, MINILM = "intfloat/multilingual-e5-small", "sentence-transformers/all-MiniLM-L6-v2"
LLAMA, QWEN, SMOL = "llm2vec_llama_a_hf", "llm2vec_qwen2_a_hf", "llm2vec_mistral_a_hf"
LLM_1B, LLM_8B = "LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned", "LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
MODEL = "runs/quickstart/llm2clip"
# Repos of the Hub, by id. A published LLM is any LLM of its width: `convert` reads all its sizes from its files.
HUB: dict[str, Builder] = {
    "meta-llama/Llama-3.1-8B-Instruct": partial(llm, LLAMA),
    "meta-llama/Llama-3.2-1B-Instruct": partial(llm, LLAMA),
    "Qwen/Qwen2.5-0.5B": partial(llm, QWEN),
    "HuggingFaceTB/SmolLM2-135M-Instruct": partial(llm, SMOL),
    "openai/clip-vit-base-patch16": clip,
    "openai/clip-vit-large-patch14-336": clip,
    E5: partial(embedding_models.save, family="xlm-roberta"),
    MINILM: partial(embedding_models.save, family="bert"),
    "facebook/dinov2-small": small_runs.save_dinov2_tower,
    "Salesforce/wikitext": wikitext,
    f"microsoft/{LLM_1B}": partial(wide_llm, 2048),
    f"microsoft/{LLM_8B}": partial(wide_llm, 4096),
    **{
        f"microsoft/{name}": partial(published, name)
        for name, model in published_models().items()
        if model.is_joint and model.checkpoint is not None
    },
}
DATASETS = ("Salesforce/wikitext",)
# Folders of the reader's, by path: what `make quickstart` and `convert` leave, and data. A small model of ours stands
# for a converted checkpoint, and contains its LLM.
FOLDERS: dict[str, Builder] = {
    MODEL: tiny.save,
    "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336": tiny.save,
    "LLM2CLIP-Openai-L-14-336": tiny.save,
    "EVA02-CLIP-L-14": partial(small_runs.save_vision_tower, logit_scale_init_value=4.6),
    "runs/quickstart/weights/smollm2-135m-instruct": partial(llm, SMOL),
    "my_images": partial(
        table,
        {"caption": "caption", "short_caption": "caption", "long_caption": "long"},
        ("train", "validation", "test"),
    ),
    "my_pictures": pictures,
    "my_photos": photos,
    "questions": questions,
    "data/dreamlip": partial(captions_csv, ["raw_caption", *DREAMLIP]),
    "data/text_pairs": text_pairs,
    "data/captions": partial(captions_csv, ["short_caption", "long_caption"]),
    "data/cc3m": shards,
    "data/museum": museum,
    "data/mine": partial(table, {"caption": "caption"}, ("train", "validation")),
}
# Files, and folders of the checkout.
FILES: dict[str, Builder] = {
    "examples": lambda path: path.symlink_to(ROOT / "examples"),
    "training": lambda path: path.symlink_to(ROOT / "training"),
    "museum.py": documented_benchmark,
    "data/pairs.csv": pairs_csv,
    "labels.txt": labels,
    "photo.jpg": photo,
    "EVA02_CLIP_L_psz14_s4B.pt": eva_clip,
    "default.yaml": small_profile,
}
STAND_INS = {**FILES, **FOLDERS, **HUB}
