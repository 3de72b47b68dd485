"""Check saved folders under one transformers version, without this package, and print the results as JSON.

`python check.py CASES`: a folder of cases, each a model folder `model` with `expected.safetensors` beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.utils import logging

CAPTIONS = ["a red squirrel", "a steam train on a snowy mountain, seen from a valley"]
SDPA_TOLERANCE, EAGER_TOLERANCE = 0.0, 5e-6


def pictures(size: int) -> list[Image.Image]:
    """Return two pictures that resizing and cropping change."""
    ramp = torch.arange(3 * (size + 9) * (size + 30)).reshape(size + 9, size + 30, 3)
    return [Image.fromarray((ramp * factor % 256).to(torch.uint8).numpy()) for factor in (3, 7)]


def dirty_allocator() -> None:
    """Fill freed memory with large values, which uninitialised buffers would expose."""
    for size in (64, 1024, 65536, 2**20):
        blocks = [torch.full((size,), 1e30) for _ in range(64)]
        del blocks


def load(folder: Path, **kwargs: Any) -> Any:
    dirty_allocator()
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **kwargs)
    found = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.eval()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape, (left.shape, right.shape)
    return float((left.double() - right.double()).abs().max())


def check_logits(folder: Path, expected: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
    inputs = {name.removeprefix("in/"): value for name, value in expected.items() if name.startswith("in/")}
    for attention, tolerance in (("sdpa", SDPA_TOLERANCE), ("eager", EAGER_TOLERANCE)):
        model = load(folder, attn_implementation=attention)
        with torch.no_grad():
            output = model(**inputs)
        result[attention] = difference(output.logits_per_image, expected["logits"])
        assert result[attention] <= tolerance, f"{attention}: logits differ by {result[attention]}"


def check_processor(folder: Path, expected: dict[str, torch.Tensor], size: int) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(text=CAPTIONS, images=pictures(size), return_tensors="pt")
    for name, value in batch.items():
        allowed = 0.0 if name != "pixel_values" else 1e-6
        assert difference(value, expected[f"in/{name}"]) <= allowed, name
    bare = AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    assert bare["input_ids"].equal(expected["in/input_ids"])
    model = load(folder)
    assert model.encode_text(CAPTIONS).equal(model.encode_text(CAPTIONS, processor))
    assert model.encode_image(pictures(size)).equal(model.encode_image(pictures(size), processor))


def check_pipelines(folder: Path, expected: dict[str, torch.Tensor], size: int) -> None:
    options = {"model": str(folder), "trust_remote_code": True}
    classify = pipeline("zero-shot-image-classification", **options)
    scores = classify(pictures(size)[0], candidate_labels=CAPTIONS, hypothesis_template="{}")
    probabilities = expected["logits"].softmax(dim=-1)[0]
    for row in scores:
        assert abs(row["score"] - float(probabilities[CAPTIONS.index(row["label"])])) < 1e-4, scores
    embed = pipeline("image-feature-extraction", **options)
    pooled = torch.tensor(embed(pictures(size)[0], pool=True))
    assert difference(torch.nn.functional.normalize(pooled, dim=-1)[0], expected["image_embeds"][0]) < 1e-5
    states = pipeline("feature-extraction", **options)(CAPTIONS[0])
    assert torch.tensor(states).isfinite().all()


def check_sixteen_bits(folder: Path) -> None:
    model = load(
        folder, **{"dtype" if not transformers.__version__.startswith("4.5") else "torch_dtype": torch.bfloat16}
    )
    assert model.dtype == torch.bfloat16
    assert model.logit_scale.dtype == torch.float32
    assert model.logit_bias is None or model.logit_bias.dtype == torch.float32
    exact, statistics = dict(load(folder).named_buffers()), ("visual_standardization.", "text_adapter.")
    kept = {name: value for name, value in model.named_buffers() if name.startswith(statistics)}
    assert len(kept) == 3 * bool(model.config.standardize_vision)
    assert all(value.dtype == torch.float32 and value.equal(exact[name]) for name, value in kept.items())
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        assert json.loads((Path(copy) / "config.json").read_text())["dtype"] == "bfloat16"
        again = load(Path(copy), **{} if not transformers.__version__.startswith("4.") else {"dtype": "auto"})
        assert again.dtype == torch.bfloat16
        assert again.logit_scale.dtype == torch.float32
        for (name, left), right in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert left.equal(right), name


def check_parts(folder: Path) -> None:
    model = load(folder, text_model_kwargs={"dtype": torch.bfloat16})
    assert (model.dtype, model.text_model.dtype) == (torch.float32, torch.bfloat16)
    model = load(folder, attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    assert model.vision_model.config._attn_implementation == "eager"
    assert model.text_model.decoder.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert model.vision_model.config._attn_implementation == "sdpa"
    if model.config.text_config.bidirectional is None:
        return  # an encoder, which versions before 5.23 cannot run from disk, alone neither
    with tempfile.TemporaryDirectory() as offload:
        model = load(folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=offload)
        assert next(model.text_model.parameters()).is_meta
        ids = torch.arange(1, 9)[None]
        found, expected = (one.get_text_features(ids).pooler_output for one in (model, load(folder)))
        assert difference(found, expected) == 0


def check_weights_survive(folder: Path) -> None:
    """Check that loaded weights are not initialised again: parameters saved as 0.5 are still 0.5."""
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        for name, parameter in load(Path(copy)).named_parameters():
            assert bool((parameter == 0.5).all()), name


def check_case(case: Path) -> dict[str, Any]:
    expected = load_file(case / "expected.safetensors")
    folder, size = case / "model", expected["in/pixel_values"].shape[-1]
    result: dict[str, Any] = {}
    check_logits(folder, expected, result)
    check_processor(folder, expected, size)
    check_pipelines(folder, expected, size)
    check_sixteen_bits(folder)
    check_parts(folder)
    check_weights_survive(folder)
    return result


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    report: dict[str, Any] = {"transformers": transformers.__version__}
    for case in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        try:
            report[case.name] = check_case(case)
        except Exception as error:
            report[case.name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    assert "modeling_llm2clip" not in sys.modules
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main()
