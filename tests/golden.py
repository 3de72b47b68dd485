"""Golden tensors: numbers that the original LLM2CLIP code computed (see tests/fixtures/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "fixtures" / "golden"


@dataclass(frozen=True)
class Golden:
    """One fixture: its JSON and its tensors, keyed `state/...`, `in/...`, `out/...`, `grad/...`."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix/`, without the prefix."""
        return {
            key.removeprefix(f"{prefix}/"): value
            for key, value in self.tensors.items()
            if key.startswith(f"{prefix}/")
        }

    def close(self, actual: torch.Tensor, key: str, kind: str | None = None) -> None:
        """Assert that `actual` equals the tensor `key` at the tolerance which the fixture states."""
        tolerance = self.meta["tolerance"]
        tolerance = tolerance[kind] if kind else tolerance
        torch.testing.assert_close(
            actual.detach(),
            self.tensors[key],
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            check_dtype=False,
            msg=lambda message: f"{self.name} {key}: {message}",
        )


def optimizer_settings(args: dict[str, Any]) -> dict[str, float]:
    """The settings of stage 2's optimizer, from the original's arguments."""
    places = {"visual": "vision", "text": "text"}
    rates = {f"{ours}_learning_rate": args[f"{theirs}_lr"] for theirs, ours in places.items()}
    decays = {"weight_decay": args["wd"], "vision_layer_decay": args["visual_ld"]}
    return {"learning_rate": args["lr"], **rates, **decays}


def load_golden(name: str) -> Golden:
    path = FOLDER / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    return Golden(name, json.loads((FOLDER / f"{name}.json").read_text()), tensors)
