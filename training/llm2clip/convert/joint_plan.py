"""A conversion that is ready to be written: config, weights, and what became of every tensor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from llm2clip.convert.resize import resize_tower
from modeling_llm2clip import LLM2CLIPModel

TOWER, HEAD, ADAPTER_PART, SCALE_PART = "vision_model.", "visual_projection.", "text_adapter.", "logit_scale"


@dataclass
class JointPlan:
    """A conversion that is ready to be written.

    Attributes:
        recognised: What the checkpoint is, in words.
        config: Config of the model that is written.
        model_class: Its class.
        vision_config: Config of its vision tower.
        tensors: The weights under its names.
        renames: `(theirs, ours)`.
        dropped: `(theirs, reason)`.
        new: Parts that the checkpoint does not hold, with the reason; they start at random values.
        notes: What else the user should know.
        text_model: The LLM's repo or folder.
        text_model_revision: Its revision.
    """

    recognised: str
    config: PretrainedConfig
    model_class: Any
    vision_config: PretrainedConfig
    tensors: dict[str, Tensor]
    renames: list[tuple[str, str]]
    dropped: list[tuple[str, str]]
    new: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_model: str | None = None
    text_model_revision: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that load what was written and no more."""
        joint = self.model_class is LLM2CLIPModel
        return {"text_model": False} if joint and self.config.text_model_name_or_path is not None else {}

    def skeleton(self) -> PreTrainedModel:
        """The model without weights."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config), **self.loading)

    def build(self, seed: int) -> PreTrainedModel:
        """The model with its weights; what is new is drawn with `seed`."""
        model = self.skeleton()
        model.load_state_dict(self.tensors, strict=False, assign=True)
        dtype = next(iter(self.tensors.values())).dtype
        torch.manual_seed(seed)
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if any(parameter.is_meta for parameter in own.values()):
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
                module.to(dtype)
        if hasattr(model, "logit_scale"):
            model.logit_scale.data = model.logit_scale.data.float()
        return model

    def drop(self, part: str, reason: str) -> None:
        """Leave out the tensors whose name of ours begins with `part`."""
        for theirs, ours in self.renames:
            if ours.startswith(part):
                self.dropped.append((theirs, reason))
        self.renames = [(theirs, ours) for theirs, ours in self.renames if not ours.startswith(part)]
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(part)}

    def reset_heads(self) -> None:
        """Leave out the trained projection and adapter."""
        for part in (HEAD, ADAPTER_PART):
            if any(name.startswith(part) for name in self.tensors):
                self.drop(part, "reset on request")
                self.new.append((part, "reset on request"))

    def fit_image_size(self, image_size: int | None) -> None:
        """Resize what depends on the image size; None keeps the config's."""
        config = self.vision_config
        target = image_size or config.image_size
        bare = not any(name.startswith(TOWER) for name in self.tensors)
        state = {TOWER + name: tensor for name, tensor in self.tensors.items()} if bare else self.tensors
        resized = resize_tower(state, target, config.patch_size)
        changed = [name for name in resized if resized[name] is not state[name]]
        if changed:
            was = f"{tuple(state[changed[0]].shape)} to {tuple(resized[changed[0]].shape)}"
            self.notes.append(f"resized for images of {target} x {target}: {', '.join(changed)}, from {was}.")
        config.image_size = target
        self.tensors = {name.removeprefix(TOWER) if bare else name: tensor for name, tensor in resized.items()}

    def to_one_dtype(self) -> None:
        """The widest floating-point type of the weights, so that none loses digits."""
        floats = [tensor.dtype for name, tensor in self.tensors.items() if name != SCALE_PART]
        dtype = floats[0]
        for other in floats:
            dtype = torch.promote_types(dtype, other)
        self.tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        if SCALE_PART in self.tensors:
            self.tensors[SCALE_PART] = self.tensors[SCALE_PART].float().reshape(())

    def check(self) -> None:
        """Compare the weights with the model that the config describes.

        Raises:
            ValueError: Weights are missing, have no place, have another shape or are not finite.
        """
        if self.model_class is AutoModel:
            with torch.device("meta"):
                self.model_class = type(AutoModel.from_config(self.config))
        expected = {name: tuple(tensor.shape) for name, tensor in self.skeleton().state_dict().items()}
        new = tuple(part for part, _ in self.new)
        missing = [name for name in expected if name not in self.tensors and not (new and name.startswith(new))]
        if missing:
            raise ValueError(
                f"recognised as {self.recognised}, but {len(missing)} tensors are missing: "
                f"{listed(missing, expected)}. The checkpoint is incomplete."
            )
        unknown = [name for name in self.tensors if name not in expected]
        if unknown:
            raise ValueError(
                f"recognised as {self.recognised}, but {len(unknown)} tensors have no place in it: {listed(unknown)}."
            )
        wrong = [name for name, tensor in self.tensors.items() if tuple(tensor.shape) != expected[name]]
        if wrong:
            shapes = "; ".join(
                f"{name} is {tuple(self.tensors[name].shape)}, not {expected[name]}" for name in wrong[:3]
            )
            raise ValueError(
                f"recognised as {self.recognised}, but {len(wrong)} tensors have other shapes than its config says: "
                f"{shapes}. The weights are of mixed models, or --model-config is another model's."
            )
        spoilt = [name for name, tensor in self.tensors.items() if not tensor.isfinite().all()]
        if spoilt:
            raise ValueError(
                f"{len(spoilt)} tensors hold NaN or infinity: {listed(spoilt)}. The checkpoint is spoilt."
            )


def listed(names: list[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """The first few of some tensors' names, with their shapes where these are given."""
    shown = [f"{name} {tuple(shapes[name])}" if shapes else name for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


__all__ = ["ADAPTER_PART", "HEAD", "SCALE_PART", "TOWER", "JointPlan", "listed"]
