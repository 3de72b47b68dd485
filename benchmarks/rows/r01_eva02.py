"""R1: the EVA02 vision tower, which stage 2 trains."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

# timm's name and the arguments that differ from its defaults
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "B/16-224": ("eva02_base_patch16_clip_224", {}),
    "L/14-336, 4 layers": ("eva02_large_patch14_clip_336", {"depth": 4}),
}
# One weight of each kind, in the first block: its gradient has passed through all blocks
GRADIENTS = (
    "pos_embed",
    "patch_embed.proj.weight",
    *(f"blocks.0.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "inner_attn_ln", "proj")),
    *(f"blocks.0.mlp.{name}.weight" for name in ("w1", "w2", "ffn_ln", "w3")),
)


def _timm_model(tower: str) -> Any:
    import timm
    import torch

    name, changes = TOWERS[tower]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **changes)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from llm2clip.convert.layouts import TIMM_EVA02

    return TIMM_EVA02.rename(state).tensors


def _our_model(tower: str) -> Any:
    from modeling_llm2clip import EVA02VisionConfig, EVA02VisionModel

    peer = _timm_model(tower)
    attention = peer.blocks[0].attn
    config = EVA02VisionConfig(
        hidden_size=peer.embed_dim,
        intermediate_size=peer.blocks[0].mlp.fc2.in_features,
        num_hidden_layers=len(peer.blocks),
        num_attention_heads=attention.num_heads,
        image_size=peer.patch_embed.img_size[0],
        patch_size=peer.patch_embed.patch_size[0],
        rope_grid_size=16,
    )
    model = EVA02VisionModel(config)
    model.load_state_dict(_renamed(peer.state_dict()))
    return model


def _placed(model: nn.Module, batch: int, device: str, size: int) -> tuple[nn.Module, Tensor]:
    """Move a model and its images to the device; a GPU computes in bfloat16, as usual."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model.to(device, dtype), images.to(device, dtype)


def _tower(ours: bool, tower: str, batch: int, training: bool, device: str) -> Work:
    import torch

    built = _our_model(tower) if ours else _timm_model(tower)
    model, images = _placed(built, batch, device, int(tower.partition("-")[2][:3]))
    model.train(training)

    def pooled() -> Tensor:
        return model(images).pooler_output if ours else model(images)

    def forward() -> Outcome:
        with torch.inference_mode():
            return Outcome({"pooled": pooled()})

    def forward_backward() -> Outcome:
        model.zero_grad()
        output = pooled()
        output.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = gradients if ours else _renamed(gradients)
        return Outcome({"pooled": output, **{name: gradients[name] for name in GRADIENTS}})

    return forward_backward if training else forward


def contests(device: str) -> list[Contest]:
    contests_of_row = []
    sizes = {"B/16-224": (4, 0.97), "L/14-336, 4 layers": (2, 1.00)}
    if device != "cpu":
        sizes = {tower: (128, goal) for tower, (_, goal) in sizes.items()}
    for tower, (batch, time) in sizes.items():
        for training in (False, True):
            sized = {"tower": tower, "batch": batch, "training": training, "device": device}
            contestants = {
                "ours": Contestant(partial(_tower, True, **sized)),
                "timm Eva": Contestant(partial(_tower, False, **sized)),
            }
            goals = (Goal("timm Eva", "cpu", 0.95 if training else time),)
            tolerance = dict.fromkeys(["pooled", *(GRADIENTS if training else ())], 1e-5)
            if device != "cpu":
                tolerance = dict.fromkeys(tolerance, 3e-2)
            work = "forward and backward" if training else "forward"
            rounds = 3 if training else 5
            contests_of_row.append(Contest(f"{tower}, batch {batch}, {work}", contestants, goals, tolerance, rounds))
    return contests_of_row


SHORTFALL = (
    "matrix products alone are four fifths of timm's time in training; three runs of B/16 on an AMD EPYC gave 0.96, "
    "0.97 and 1.02."
)
ROW = Row("R1", "EVA02", contests, ("cpu", "cuda"), shortfall=SHORTFALL)
