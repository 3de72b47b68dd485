"""Run the project on the simulated GPU, in a process of its own; print one JSON line a case.

`python -m tests.simulated_gpu.checks [CASE ...]` also prints what the named cases waited for, with the line.
"""

from __future__ import annotations

# isort: off
from tests.simulated_gpu.device import DeviceTensor  # before torch
from tests.simulated_gpu.torch_cuda import simulated_cuda
from tests.simulated_gpu.waits import Waits
# isort: on

import collections
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, Trainer, TrainerCallback

import llm2clip
import llm2clip.models.identity as identity
from llm2clip import LLM2CLIPModel
from llm2clip.command_line.settings import build_config
from llm2clip.encoders import embed
from llm2clip.losses import clip_loss, sigmoid_loss
from llm2clip.search.top_k import top_k
from llm2clip.trainers import run_stage1, run_stage2
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.builders import small_runs, tiny

STEPS = 2
FOLDER = Path(tempfile.mkdtemp())
ROOTS = [str(Path(__file__).resolve().parents[2])]
QUICK = {"max_steps": STEPS, "logging_steps": 1000, "save_strategy": "no", "use_cpu": False, "bf16": True}


class Phase(TrainerCallback):
    """Names the events of optimizer steps."""

    def __init__(self, sim: Waits) -> None:
        self.sim = sim

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.sim.phase = "step"

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.sim.phase = "after step"


def equal_to_cpu(on_device: Tensor, on_cpu: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(on_device.detach().cpu(), on_cpu.detach(), atol=atol, rtol=1e-4)


def unit_rows(rows: int, width: int = 24) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)), dim=-1)


def on_both(compute: Callable[[str], Tensor]) -> None:
    with_gpu = compute("cuda")
    assert isinstance(with_gpu, DeviceTensor), "the result is not on the GPU"
    equal_to_cpu(with_gpu, compute("cpu"))


def encode() -> None:
    torch.manual_seed(0)
    tiny.save(FOLDER / "model")
    processor = AutoProcessor.from_pretrained(FOLDER / "model")
    cpu = LLM2CLIPModel.from_pretrained(FOLDER / "model")
    gpu = LLM2CLIPModel.from_pretrained(FOLDER / "model").to("cuda")
    equal_to_cpu(gpu.encode_text(tiny.CAPTIONS, processor), cpu.encode_text(tiny.CAPTIONS, processor))
    equal_to_cpu(gpu.encode_image(tiny.IMAGES, processor), cpu.encode_image(tiny.IMAGES, processor))
    inputs = processor(text=tiny.CAPTIONS[:2], images=tiny.IMAGES, return_tensors="pt", padding=True)
    losses = [m(**{k: x.to(m.device) for k, x in inputs.items()}, return_loss=True).loss for m in (gpu, cpu)]
    for loss in losses:
        loss.backward()
    equal_to_cpu(*losses)
    for (name, x), y in zip(gpu.named_parameters(), cpu.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if x.grad is not None and y.grad is not None:
            equal_to_cpu(x.grad, y.grad)


def losses() -> None:
    images, texts, ids = unit_rows(20), unit_rows(21)[:20], torch.arange(20)

    def gradient(device: str, loss: Callable[..., Tensor], *rest: Any) -> Tensor:
        x = images.to(device, copy=True).requires_grad_()
        loss(x, texts.to(device), 10.0, *(r.to(device) if isinstance(r, Tensor) else r for r in rest)).backward()
        assert x.grad is not None
        return x.grad

    on_both(lambda device: gradient(device, clip_loss))
    on_both(lambda device: gradient(device, clip_loss, ids, ids[:, None]))
    on_both(lambda device: gradient(device, sigmoid_loss, -10.0))


def wrong_device() -> None:
    on_gpu, on_cpu, ids = unit_rows(20).to("cuda"), unit_rows(20), torch.arange(20)
    refuses("same device", lambda: on_gpu @ on_cpu.T)
    refuses("same device", lambda: on_gpu + on_cpu)
    message = "needs caption_ids and image_caption_ids on cuda:0"
    refuses(message, lambda: clip_loss(on_gpu, on_gpu, 10.0, ids, ids[:, None]))


def refuses(message: str, compute: Callable[[], Any]) -> None:
    try:
        compute()
    except (RuntimeError, ValueError) as error:
        if message not in str(error):
            raise
    else:
        raise AssertionError("tensors of two devices were taken")


def closed_form() -> None:
    pairs = unit_rows(40, 8), unit_rows(41, 6)[:40]

    def apply(device: str) -> Tensor:
        return llm2clip.closed_form_alignment(*(x.to(device) for x in pairs), width=4).embed_images(
            pairs[0].to(device)
        )

    on_both(apply)


def best() -> None:
    on_both(lambda device: top_k(unit_rows(20).to(device), unit_rows(50).to(device), 5)[0])


def stage1(**changes: Any) -> Callable[[], None]:
    def run() -> None:
        llm = small_runs.save_llm(FOLDER / "llm")
        fields = small_runs.stage1_fields(FOLDER / f"text{len(changes)}", llm) | QUICK | changes
        run_stage1.run(build_config(Stage1Recipe, fields))

    return run


def cache() -> None:
    config = embed.EmbedConfig(
        text_model_name_or_path=str(FOLDER / "text0"),
        output_dir=str(FOLDER / "cache"),
        sources=[small_runs.concepts(), small_runs.concepts("validation", max_samples=40)],
        shard_size=64,
    )
    embed.run(config)


def stage2(**changes: Any) -> Callable[[], None]:
    def run() -> None:
        vision, out = small_runs.save_vision_tower(FOLDER / "vision"), Path(tempfile.mkdtemp(dir=FOLDER))
        fields = small_runs.stage2_fields(out, vision, str(FOLDER / "text0"), str(FOLDER / "cache"))
        fields |= QUICK | changes
        del fields["eval_sources"]
        if "lora_rank" in fields:
            del fields["embedding_cache"]
        run_stage2.run(build_config(Stage2Recipe, fields))

    return run


CASES: dict[str, Callable[[], None]] = {
    "wrong device": wrong_device,
    "losses": losses,
    "encode": encode,
    "closed form": closed_form,
    "top_k": best,
    "stage 1": stage1(),
    "stage 1 in chunks": stage1(tower_chunk_size=3),
    "embed": cache,
    "stage 2": stage2(),
    "stage 2, shared captions": stage2(shared_captions="positive"),
    "stage 2, sigmoid": stage2(loss="sigmoid"),
    "stage 2 in chunks": stage2(tower_chunk_size=4),
    "stage 2, frozen": stage2(freeze_vision="all"),
    "stage 2, LoRA": stage2(lora_rank=4),
}


def main() -> None:
    # They ask for the type of a weight, which on this device is a subclass.
    for module in [module for module in sys.modules.values() if hasattr(module, "is_readable")]:
        module.is_readable = lambda weight: not weight.is_meta and weight.is_floating_point()
    digest = identity._digest_all
    identity._digest_all = lambda weights: digest({name: weight.cpu() for name, weight in weights.items()})
    init = Trainer.__init__
    for name, case in CASES.items():
        with simulated_cuda(roots=ROOTS) as sim:

            def with_phase(trainer: Trainer, *args: Any, sim: Waits = sim, **kwargs: Any) -> None:
                init(trainer, *args, **kwargs)
                trainer.add_callback(Phase(sim))

            Trainer.__init__ = with_phase
            error = ""
            try:
                case()
            except Exception:
                error = traceback.format_exc()[-3000:]
        steps = collections.Counter(event.kind for event in sim.events if event.phase == "step")
        outcome = {"case": name, "error": error, "operations": sum(sim.ops.values())}
        print(json.dumps({**outcome, "per_step": {kind: n / STEPS for kind, n in steps.items()}}), flush=True)
        if name in sys.argv[1:]:
            print(sim.table(), file=sys.stderr)


if __name__ == "__main__":
    main()
