"""Measure what it costs to search photos, and write docs/results/costs.json and the table of costs into README.md.

python docs/make_costs.py [--measure]    without --measure, only the table is written

The models have the real shapes and random weights, as files of the type that is published, so that time and memory are
real and results are not. Times are seconds of one core (`OMP_NUM_THREADS=1`) that further photos add; memory is the
peak of the whole command. Hours on a GPU are computed from operations, as `llm2clip plan` does.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "costs.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- costs: made by docs/make_costs.py -->\n", "<!-- /costs -->"
# Photos of two runs: what the larger one takes more is what photos take.
FEW, MANY = 2, 10
SIZE = (1600, 1200)
CLIP, LLM2CLIP = "openai/clip-vit-base-patch16", "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336"
LLM = "LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"
# The table: name, folder, type of --dtype.
ROWS = [
    ("CLIP B/16", CLIP, None),
    ("LLM2CLIP with the 1B LLM", LLM2CLIP, "bfloat16"),
    ("the same", LLM2CLIP, "float32"),
]
GPU, CORES, PHOTOS = "H100", 16, (1_000, 50_000)
TEXT = "a dog that runs along a beach"


def make_models(folder: Path) -> None:
    """Save both models with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    from llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel
    from llm2clip.convert.published import published_models
    from llm2clip.models.prompting import with_prompt

    words = ["<bos>", "<eos>", "<unk>", *TEXT.split()]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<bos>", 0), ("<eos>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=77, **special)

    text, vision = {"eos_token_id": 1, "bos_token_id": 0}, {"patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder / CLIP)
    CLIPImageProcessor().save_pretrained(folder / CLIP)
    tokenizer.save_pretrained(folder / CLIP)

    prompted, prefix_tokens = with_prompt(tokenizer)
    prompt = {"prompt_prefix": "", "prompt_suffix": "", "num_prefix_tokens": prefix_tokens}
    config = published_models()[LLM].config
    for name, value in {**prompt, "prompt_token_ids": prompted("")["input_ids"]}.items():
        setattr(config, name, value)
    llm = LLM2CLIPTextModel(config).to(torch.float32)  # as it is published
    llm.save_pretrained(folder / LLM)
    prompted.save_pretrained(folder / LLM)

    joint = published_models()[LLM2CLIP].config
    joint.text_config, joint.text_model_name_or_path = config, str(folder / LLM)
    joint.text_model_fingerprint, joint.text_model_revision = llm.fingerprint(), None
    LLM2CLIPModel(joint).to(torch.float16).save_pretrained(folder / LLM2CLIP)
    size = joint.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LLM2CLIPProcessor(images, prompted).save_pretrained(folder / LLM2CLIP)


def gpu_seconds(folder: Path) -> float:
    """Compute the seconds of a photo on a GPU, from the operations of the vision tower."""
    import torch
    from transformers import AutoConfig, AutoModel

    import modeling_llm2clip  # noqa: F401  # EVA02, for AutoModel
    from llm2clip.planning.counts import count_flops
    from llm2clip.planning.plan import ENCODING_USE, PEAK, hours

    config = AutoConfig.from_pretrained(folder).vision_config
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
    return hours(count_flops(lambda: tower(pixels)), ENCODING_USE, 1, PEAK[GPU]) * 3600


def reading_seconds(photo: Path) -> float:
    """Measure the seconds in which one core reads and resizes a photo."""
    from transformers import CLIPImageProcessorPil

    from llm2clip.data import decode_image

    processor, repeats = CLIPImageProcessorPil(), 10
    begun = time.process_time()
    for _ in range(repeats):
        processor(decode_image(photo), return_tensors="pt")
    return (time.process_time() - begun) / repeats


def run(*arguments: str) -> tuple[float, int]:
    """Run a command of llm2clip on one thread; return the seconds of its core, and the peak of its memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "llm2clip", *arguments], env=environment, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"llm2clip {' '.join(arguments)} failed.")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def measure(folder: Path) -> list[dict[str, Any]]:
    """Index photos with each row's model, and search them."""
    from PIL import Image

    for count in (FEW, MANY):
        (folder / f"{count}").mkdir()
        for number in range(count):
            noise = Image.effect_noise(SIZE, 80).convert("RGB")
            noise.save(folder / f"{count}" / f"{number}.jpg")
    rows = []
    for name, model, dtype in ROWS:
        chosen = ["--model", str(folder / model), *(["--dtype", dtype] if dtype else [])]
        index = folder / f"{name}-{dtype}"
        few, _ = run("index", str(folder / f"{FEW}"), *chosen, "--output-dir", f"{index}-few")
        many, peak = run("index", str(folder / f"{MANY}"), *chosen, "--output-dir", str(index))
        seconds, search_peak = run("search", str(index), TEXT, *chosen)
        files = [folder / model / "model.safetensors"]
        if model == LLM2CLIP:
            files += list((folder / LLM).glob("*.safetensors"))
        rows.append(
            {
                "name": name,
                "model": model,
                "dtype": dtype or "float32",
                "disk_bytes": sum(path.stat().st_size for path in files),
                "index_bytes": peak,
                "search_bytes": search_peak,
                "photo_seconds": round((many - few) / (MANY - FEW), 3),
                "search_seconds": round(seconds, 1),
                "gpu_photo_seconds": gpu_seconds(folder / model),
            }
        )
    return rows


def result(rows: list[dict[str, Any]], reading: float) -> dict[str, Any]:
    """Say where and on what the rows were measured."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": "python docs/make_costs.py --measure",
        "weights": "random, of the real shapes and published types",
        "photos": f"JPEG of {SIZE[0]} x {SIZE[1]} pixels",
        "machine": {"processor": processor, "threads": 1},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "reading_seconds": round(reading, 3),
        "rows": rows,
    }


def duration(seconds: float) -> str:
    """Format a time with two digits at most."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def table(costs: dict[str, Any]) -> str:
    """Return the table, and a line that says where it is from."""
    few, many = PHOTOS
    names = [f"{few:,} photos", f"{many:,} photos", f"{many:,} with an {GPU} and {CORES} cores, computed"]
    reading = many * costs["reading_seconds"] / CORES
    lines = [
        f"| | on disk | memory: index / search | a photo | {' | '.join(names)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in costs["rows"]:
        memory = " / ".join(f"{row[f'{command}_bytes'] / 1e9:.1f}" for command in ("index", "search"))
        seconds, on_gpu = row["photo_seconds"], many * row["gpu_photo_seconds"]
        lines.append(
            f"| {row['name']}, {row['dtype']} | {row['disk_bytes'] / 1e9:.1f} GB | {memory} GB | {seconds:.1f} s | "
            f"{duration(few * seconds)} | {duration(many * seconds)} | {duration(max(reading, on_gpu))} |"
        )
    lines += [
        "",
        f"Times are those of one core ({costs['machine']['processor']}, {costs['date']}, commit {costs['commit']}), "
        "with random weights of the real shapes: divide them by your cores. The last column is computed, as `llm2clip "
        "plan` does: reading the photos takes most of it.",
    ]
    return "\n".join(lines) + "\n"


def with_table(page: str, costs: dict[str, Any]) -> str:
    """Replace the table of a page."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(costs) + END + rest.partition(END)[2]


def main() -> None:
    """Measure if asked, and write the table."""
    if sys.argv[1:] == ["--measure"]:
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own: the peak of a command begins with the memory of the process that starts it.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(make_models, Path(folder)).result()
            rows = measure(Path(folder))
            reading = reading_seconds(Path(folder, f"{MANY}", "0.jpg"))
        RESULT.write_text(json.dumps(result(rows, reading), indent=1) + "\n", encoding="utf-8")
    costs = json.loads(RESULT.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), costs), encoding="utf-8")


if __name__ == "__main__":
    main()
