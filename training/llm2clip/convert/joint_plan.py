"""The plan of a conversion: config, weights, and what happens to every tensor of the checkpoint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from llm2clip.convert.checkpoint import compare_tensors
from llm2clip.convert.renaming import template_of
from llm2clip.convert.resize import resize_tower
from modeling_llm2clip import LLM2CLIPModel

TOWER, HEAD, ADAPTER_PART, SCALE_PART = "vision_model.", "visual_projection.", "text_adapter.", "logit_scale"
# Statistics of the training set, which belong to the towers and not to the head and the adapter, in float32.
STATISTICS = ("visual_standardization.mean", "visual_standardization.std", "text_adapter.center")


@dataclass
class JointPlan:
    """The plan of a conversion.

    Attributes:
        recognized: Description of the checkpoint.
        config: Config of the model to write.
        model_class: Class of the model to write.
        tensors: Weights by their names in that model.
        renames: `(theirs, ours)`.
        dropped: `(theirs, reason)`.
        new: Parts that the checkpoint lacks, with the reason; they are initialized randomly.
        notes: Further lines for the report.
    """

    recognized: str
    config: PretrainedConfig
    model_class: Any
    tensors: dict[str, Tensor]
    renames: list[tuple[str, str]]
    dropped: list[tuple[str, str]]
    new: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def vision_config(self) -> Any:
        """Config of the vision tower, which may be the whole model."""
        return getattr(self.config, "vision_config", self.config)

    @property
    def text_model(self) -> str | None:
        """Repo or folder of the LLM."""
        return getattr(self.config, "text_model_name_or_path", None)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that load the written folder without an external LLM."""
        return {"text_model": False} if self.model_class is LLM2CLIPModel and self.text_model is not None else {}

    def skeleton(self) -> PreTrainedModel:
        """Instantiate the model without weights."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config), **self.loading)

    def build(self, seed: int) -> PreTrainedModel:
        """Instantiate the model with its weights; `seed` determines the new parts."""
        model = self.skeleton()
        model.load_state_dict(self.tensors, strict=False, assign=True)
        dtype = next(iter(self.tensors.values())).dtype
        torch.manual_seed(seed)
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
                module.to(dtype)
        if hasattr(model, "logit_scale"):
            model.logit_scale.data = model.logit_scale.data.float()
        return model

    def drop(self, part: str, reason: str) -> None:
        """Drop the tensors whose name in this package starts with `part`, except statistics."""
        gone = {name for name in self.tensors if name.startswith(part) and name not in STATISTICS}
        self.dropped += [(theirs, reason) for theirs, ours in self.renames if ours in gone]
        self.renames = [(theirs, ours) for theirs, ours in self.renames if ours not in gone]
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in gone}

    def reset_heads(self) -> None:
        """Replace the trained projection and adapter with new ones."""
        for part in (HEAD, ADAPTER_PART):
            if any(name.startswith(part) for name in self.tensors):
                self.drop(part, "reset on request")
                self.new.append((part, "reset on request"))

    def fit_image_size(self, image_size: int | None) -> None:
        """Resize the tensors that depend on the image size; None keeps that of the config."""
        config = self.vision_config
        config.image_size = image_size or config.image_size
        resized = resize_tower(self.tensors, config.image_size, config.patch_size)
        for name, tensor in resized.items():
            was, now = tuple(self.tensors[name].shape), tuple(tensor.shape)
            self.notes.append(f"resized to images of {config.image_size} px: {name}, from {was} to {now}.")
        self.tensors = {**self.tensors, **resized}

    def to_one_dtype(self) -> None:
        """Convert all weights to the widest of their floating-point types, so that none loses precision."""
        floats = [tensor.dtype for name, tensor in self.tensors.items() if name not in (SCALE_PART, *STATISTICS)]
        dtype = functools.reduce(torch.promote_types, floats)
        self.tensors = {
            name: tensor.float() if name in STATISTICS else tensor.to(dtype) for name, tensor in self.tensors.items()
        }
        if SCALE_PART in self.tensors:
            self.tensors[SCALE_PART] = self.tensors[SCALE_PART].float().reshape(())

    def check(self) -> None:
        """Compare the weights with those that the config requires.

        Raises:
            ValueError: Weights are missing, unexpected, of another shape or not finite, or too few for the layers.
        """
        layers = getattr(self.vision_config, "num_hidden_layers", 0)
        if layers > len(self.tensors):
            raise ValueError(f"the config has {layers:,} layers, but the weights have {len(self.tensors)} tensors.")
        if self.model_class is AutoModel:
            with torch.device("meta"):
                self.model_class = type(AutoModel.from_config(self.config))
        expected, actual = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (self.skeleton().state_dict(), self.tensors)
        )
        compare_tensors(self.recognized, expected, actual, tuple(part for part, _ in self.new))
        if bad := [name for name, tensor in self.tensors.items() if not tensor.isfinite().all()]:
            shown = ", ".join(bad[:4])
            raise ValueError(f"{len(bad)} tensors contain NaN or infinity: {shown}. The checkpoint is damaged.")


def print_report(plan: JointPlan) -> None:
    """Print what a checkpoint was recognized as and what happens to each tensor, with one line for all blocks."""
    print(f"recognized: {plan.recognized}")
    print(f"renamed ({len(plan.renames)}):")
    for theirs, ours in _of_blocks(plan.renames):
        print(f"  {theirs}" if theirs == ours else f"  {theirs} -> {ours}")
    for title, lines in (("dropped", plan.dropped), ("new, randomly initialized", plan.new)):
        if lines:
            print(f"{title} ({len(lines)}):")
            for name, reason in _of_blocks(lines):
                print(f"  {name}: {reason}")
    print("missing: none")
    for note in plan.notes:
        print(f"note: {note}")


def _of_blocks(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Give the names of all blocks one line, `blocks.{n}.x`."""
    return list(dict.fromkeys((template_of(left)[0], template_of(right)[0]) for left, right in pairs))
