"""The estimated tables of docs/scaling.md: hours and disk space of large data sets, computed from counts."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.units import UNITS
from llm2clip.convert.published import published_models
from llm2clip.planning.costs import (
    ENCODING_USE,
    PEAK,
    TOKENS_PER_CAPTION,
    TRAINING_USE,
    count_flops,
    embedding_bytes,
    hours,
)
from modeling_llm2clip import EVA02VisionModel, LLM2CLIPTextModel

# Numbers of images of CC3M, of CC3M + CC12M, and of the paper's set of 60M.
DATA_SETS = {"CC3M": 2_873_538, "15M": 12_873_763, "60M": 60_000_000}
# Assumed: embedded captions per image, epochs of stage 2.
CAPTIONS_PER_IMAGE, EPOCHS = 3, 4
CHARACTERS_PER_TOKEN = 4
# The backward pass of a training step costs two forward passes.
FORWARDS_PER_STEP = 3
# Index of a cache: the sorted key and its row.
INDEX_BYTES = 24
LLMS = {"1B": "LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned", "8B": "LLM2CLIP-Llama-3.1-8B-Instruct-CC"}
TOWERS = {"B/16-224": "LLM2CLIP-EVA02-B-16", "L/14-336": "LLM2CLIP-EVA02-L-14-336"}
COLUMNS = [(card, gpus) for card in ("H100", "A100") for gpus in (1, 8)]
# The paper's table of costs: hours of stage 2 from offline features on 16 A100.
PAPER_HOURS, PAPER_GPUS = 1.3, 16
L14_224 = "LLM2CLIP-EVA02-L-14-224"


def image_flops(config: Any) -> float:
    """Count the floating-point operations of the forward pass of an EVA02 vision tower for one image."""
    with torch.device("meta"), torch.no_grad():
        model = EVA02VisionModel(config).eval()
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        return count_flops(lambda: model(pixels))


def token_flops(config: Any) -> float:
    """Estimate the floating-point operations of the forward pass of a text tower per token.

    Two operations per weight, without the token embeddings; the products within attention are below 2% at the length
    of captions.
    """
    with torch.device("meta"):
        model = LLM2CLIPTextModel(config)
    table = config.decoder_config.vocab_size * config.hidden_size
    return 2 * (sum(parameter.numel() for parameter in model.parameters()) - table)


def tables() -> str:
    """Return the tables in Markdown."""
    lines = ["| data | images | captions | LLM | cache on disk | embed: 1 H100 | 8 H100 | 1 A100 | 8 A100 |"]
    lines.append("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    configs = {name: published.config for name, published in published_models().items()}
    units = {llm: (token_flops(configs[name]), configs[name].hidden_size) for llm, name in LLMS.items()}
    for data, images in DATA_SETS.items():
        for llm, (flops, width) in units.items():
            captions = images * CAPTIONS_PER_IMAGE
            work = captions * TOKENS_PER_CAPTION * flops
            size = embedding_bytes(captions, width) / 1e9
            cells = [_hours(hours(work, ENCODING_USE, gpus, PEAK[card])) for card, gpus in COLUMNS]
            counts = f"{images / 1e6:.1f}M | {captions / 1e6:.1f}M"
            lines.append(f"| {data} | {counts} | {llm} | {size:,.0f} GB | {' | '.join(cells)} |")
    lines += ["", f"| data | vision tower | {EPOCHS} epochs: 1 H100 | 8 H100 | 1 A100 | 8 A100 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    forward = {tower: image_flops(configs[name].vision_config) for tower, name in TOWERS.items()}
    for data, images in DATA_SETS.items():
        for tower, flops in forward.items():
            work = images * EPOCHS * FORWARDS_PER_STEP * flops
            cells = [_hours(hours(work, TRAINING_USE, gpus, PEAK[card])) for card, gpus in COLUMNS]
            lines.append(f"| {data} | EVA02-{tower} | {' | '.join(cells)} |")
    lines += ["", "| unit of work | count |", "| --- | ---: |"]
    lines += [f"| EVA02-{tower}, forward, one image | {flops / 1e9:,.0f} GFLOP |" for tower, flops in forward.items()]
    lines += [f"| Llama {llm}, forward, one token | {flops / 1e9:,.1f} GFLOP |" for llm, (flops, _) in units.items()]
    lines += [f"| cached caption, {llm} | {embedding_bytes(1, width):,} bytes |" for llm, (_, width) in units.items()]
    lines += ["", *_measured(units["8B"][1], forward["L/14-336"])]
    lines += ["", "| if the paper's 1.3 h is 4 epochs of CC3M with | share of 16 A100's peak |", "| --- | ---: |"]
    available = PEAK["A100"] * PAPER_GPUS * PAPER_HOURS * 3600
    for tower, flops in {
        "L/14-224": image_flops(configs[L14_224].vision_config),
        "L/14-336": forward["L/14-336"],
    }.items():
        share = DATA_SETS["CC3M"] * EPOCHS * FORWARDS_PER_STEP * flops / available
        lines.append(f"| EVA02-{tower} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def _measured(width: int, image: float) -> list[str]:
    """Return the measurements on one core, extrapolated to 60M images with the 8B LLM on eight GPUs."""
    measured: dict[str, Any] = json.loads(UNITS.read_text(encoding="utf-8"))
    images = DATA_SETS["60M"]
    count = images * CAPTIONS_PER_IMAGE
    overhead = measured["bytes_per_caption"] - measured["characters_per_caption"]
    held = count * (overhead + TOKENS_PER_CAPTION * CHARACTERS_PER_TOKEN) / 1e9
    index = count * INDEX_BYTES / 1e9
    check = count * 2 * width / measured["cache_bytes_checked_per_second"] / 8 / 60
    rate = PEAK["H100"] * TRAINING_USE / (FORWARDS_PER_STEP * image)
    exact, fast, rows = (measured[f"{name}_per_second"] for name in ("jpegs", "fast_jpegs", "cached_rows"))
    read = measured["images_read_per_second"]
    lines = [
        f"| measured on one core ({measured['machine']}, {measured['date']}) | | at 60M images, 8 H100 |",
        "| --- | ---: | --- |",
        f"| `embed` into a cache reads the captions of tars (30 KB images, files in memory) | {read:,.0f} images/s | "
        f"{_hours(images / read / 3600)}, in every process, before the first is embedded |",
        f"| it holds the distinct ones | {overhead:,.0f} bytes and the text | {held:,.0f} GB in every process |",
        f"| stage 2 checks the cache (`verify_cache`), a share in every process | "
        f"{measured['cache_bytes_checked_per_second'] / 1e9:.2f} GB/s | {check:,.0f} minutes for the 8B LLM's |",
        f"| stage 2 finds captions in the open cache | {rows:,.0f} captions/s | "
        f"{index:.1f} GB of index, which all processes map |",
        f"| it decodes and resizes JPEGs of 500 to 1,500 pixels to 336 x 336, `exact` | {exact:,.0f} images/s | "
        f"{rate / exact:.1f} cores for each GPU that trains EVA02-L/14-336 ({rate:,.0f} images/s) |",
        f"| the same, `fast` | {fast:,.0f} images/s | {rate / fast:.1f} cores for each GPU |",
    ]
    return lines


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value < 100 else f"{value:,.0f} h"
