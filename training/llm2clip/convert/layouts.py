"""How checkpoints name their tensors, as tables that are read in both directions.

A layout is a list of rules. A rule maps one tensor, or one group of tensors that together hold the same numbers (a
fused `qkv` and its three parts), to this package's names. `{n}` stands for the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One line of a layout.

    Args:
        theirs: Name or names in the checkpoint, `{n}` for the block.
        ours: Name or names here. Several names on a side are slices of one tensor along its first axis, in order.
        theirs_parts: Relative sizes of those slices in the checkpoint; equal by default.
        transpose: Whether the checkpoint holds the transposed matrix.
        leading_axes: Axes of size 1 that the checkpoint's tensor has before ours; negative where ours has more.
        alias: Whether it is an older name, which is read but not written.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    theirs_parts: tuple[int, ...] = ()
    transpose: bool = False
    leading_axes: int = 0
    alias: bool = False

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.transpose:
            tensors = [tensor.t() for tensor in tensors]
        tensors = [_with_leading_axes(tensor, -self.leading_axes) for tensor in tensors]
        return _regroup(tensors, (1,) * len(self.ours))

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        tensors = _regroup(tensors, self.theirs_parts or (1,) * len(self.theirs))
        tensors = [_with_leading_axes(tensor, self.leading_axes) for tensor in tensors]
        if self.transpose:
            tensors = [tensor.t().contiguous() for tensor in tensors]
        return tensors


def _with_leading_axes(tensor: Tensor, count: int) -> Tensor:
    if count >= 0:
        return tensor[(None,) * count]
    return tensor.reshape(tensor.shape[-count:])


def _regroup(tensors: list[Tensor], parts: tuple[int, ...]) -> list[Tensor]:
    if len(tensors) == len(parts):
        return [tensor.contiguous() for tensor in tensors]
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    unit, rest = divmod(whole.shape[0], sum(parts))
    if rest:
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} does not divide into {sum(parts)} equal parts.")
    return [part.clone() for part in whole.split([unit * part for part in parts])]


@dataclass
class Renamed:
    """What became of a checkpoint's tensors."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """Rules, and the tensors that are left out with the reason."""

    rules: tuple[Rule, ...]
    dropped: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.rules + other.rules, self.dropped + other.dropped)

    def under(self, theirs: str, ours: str = "") -> Layout:
        """The same layout below a prefix on either side."""
        rules = tuple(
            Rule(
                tuple(theirs + name for name in rule.theirs),
                tuple(ours + name for name in rule.ours),
                rule.theirs_parts,
                rule.transpose,
                rule.leading_axes,
                rule.alias,
            )
            for rule in self.rules
        )
        return Layout(rules, tuple((re.escape(theirs) + pattern, reason) for pattern, reason in self.dropped))

    def rename(self, state: Mapping[str, Tensor]) -> Renamed:
        """Give a checkpoint's tensors this package's names.

        Tensors that no rule knows, or whose group is incomplete, are listed in `unknown`.
        """
        result = Renamed()
        lookup = {name: rule for rule in self.rules for name in rule.theirs}
        done: set[str] = set()
        for name in state:
            if name in done:
                continue
            reason = next((reason for pattern, reason in self.dropped if re.fullmatch(pattern, name)), None)
            if reason is not None:
                result.dropped.append((name, reason))
                continue
            template, block = _template(name)
            rule = lookup.get(template)
            group = [part.replace("{n}", block) for part in rule.theirs] if rule else []
            if rule is None or any(part not in state for part in group):
                result.unknown.append(name)
                continue
            done.update(group)
            targets = [part.replace("{n}", block) for part in rule.ours]
            result.tensors.update(zip(targets, rule.to_ours([state[part] for part in group]), strict=True))
            result.renames.append((" + ".join(group), " + ".join(targets)))
        return result

    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: this package's tensors under the checkpoint's names.

        Raises:
            ValueError: A tensor has no name in the checkpoint's layout.
        """
        lookup = {name: rule for rule in self.rules if not rule.alias for name in rule.ours}
        result: dict[str, Tensor] = {}
        done: set[str] = set()
        for name in state:
            if name in done:
                continue
            template, block = _template(name)
            rule = lookup.get(template)
            group = [part.replace("{n}", block) for part in rule.ours] if rule else []
            if rule is None or any(part not in state for part in group):
                raise ValueError(f"the tensor {name!r} has no name in the original's layout.")
            done.update(group)
            targets = [part.replace("{n}", block) for part in rule.theirs]
            result.update(zip(targets, rule.to_theirs([state[part] for part in group]), strict=True))
        return result


def _template(name: str) -> tuple[str, str]:
    """`blocks.7.norm1.weight` -> (`blocks.{n}.norm1.weight`, `7`); the number of a block is the one after its list."""
    match = re.search(r"(?<=\b(?:blocks|layers)\.)\d+(?=\.)", name)
    if match is None:
        # `transformer.resblocks`, `text_adaptor` and `adaptor` are lists under other names.
        match = re.search(r"(?<=resblocks\.)\d+(?=\.)|(?<=adaptor\.)[0-3](?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{n}}{name[match.end() :]}", match[0]


def linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a module with a weight and a bias."""
    return tuple(Rule((f"{theirs}.{kind}",), (f"{ours}.{kind}",)) for kind in ("weight", "bias"))


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(rule for theirs, ours in pairs for rule in linear(theirs, ours))


def unchanged(names: Iterable[str]) -> Layout:
    """The layout that keeps the names."""
    return Layout(_same(*{_template(name)[0] for name in names}))


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule((name,), (name,)) for name in names)


ROTARY = ((r"(?:.*\.)?rope\.freqs_(?:cos|sin)", "rotary tables follow from the config"),)

_EVA_COMMON = (
    *_same("cls_token", "pos_embed"),
    *_rules(
        *((name, name) for name in ("patch_embed.proj", "norm", "blocks.{n}.norm1", "blocks.{n}.norm2")),
        ("blocks.{n}.attn.proj", "blocks.{n}.attn.proj"),
    ),
)
_EVA_BIASES = tuple(
    Rule((f"blocks.{{n}}.attn.{letter}_bias",), (f"blocks.{{n}}.attn.{letter}_proj.bias",)) for letter in "qv"
)
# EVA02, as this code base of the original saves it; `q_bias` and `v_bias` are BAAI's names.
EVA02 = Layout(
    (
        *_EVA_COMMON,
        *_rules(
            *((f"blocks.{{n}}.attn.{name}",) * 2 for name in ("q_proj", "k_proj", "v_proj", "inner_attn_ln")),
            *((f"blocks.{{n}}.mlp.{name}",) * 2 for name in ("w1", "w2", "w3", "ffn_ln")),
        ),
        *(Rule(rule.theirs, rule.ours, alias=True) for rule in _EVA_BIASES),
    ),
    ROTARY,
)
# The other towers of EVA-CLIP: EVA01 and EVA02-CLIP-bigE.
EVA = Layout(
    (
        *_EVA_COMMON,
        *_EVA_BIASES,
        Rule(
            ("blocks.{n}.attn.qkv.weight",),
            tuple(f"blocks.{{n}}.attn.{letter}_proj.weight" for letter in "qkv"),
        ),
        *_same("blocks.{n}.gamma_1", "blocks.{n}.gamma_2"),
        *_rules(*((f"blocks.{{n}}.mlp.{name}",) * 2 for name in ("fc1", "fc2"))),
    ),
    ROTARY,
)
TIMM_EVA02 = Layout(
    (
        *_EVA_COMMON,
        *_rules(
            *((f"blocks.{{n}}.attn.{name}",) * 2 for name in ("q_proj", "k_proj", "v_proj")),
            ("blocks.{n}.attn.norm", "blocks.{n}.attn.inner_attn_ln"),
            ("blocks.{n}.mlp.fc1_g", "blocks.{n}.mlp.w1"),
            ("blocks.{n}.mlp.fc1_x", "blocks.{n}.mlp.w2"),
            ("blocks.{n}.mlp.fc2", "blocks.{n}.mlp.w3"),
            ("blocks.{n}.mlp.norm", "blocks.{n}.mlp.ffn_ln"),
        ),
    )
)
# The class of Microsoft's EVA02 repos on the Hub.
HUB_EVA02 = Layout(
    (
        Rule(("embeddings.class_embedding",), ("cls_token",), leading_axes=-2),
        Rule(("embeddings.position_embedding.weight",), ("pos_embed",), leading_axes=-1),
        *_rules(
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("post_layernorm", "norm"),
            ("encoder.layers.{n}.layer_norm1", "blocks.{n}.norm1"),
            ("encoder.layers.{n}.layer_norm2", "blocks.{n}.norm2"),
            *(
                (f"encoder.layers.{{n}}.self_attn.{name}", f"blocks.{{n}}.attn.{name}")
                for name in ("q_proj", "k_proj", "v_proj", "inner_attn_ln")
            ),
            ("encoder.layers.{n}.self_attn.out_proj", "blocks.{n}.attn.proj"),
            ("encoder.layers.{n}.mlp.fc1", "blocks.{n}.mlp.w1"),
            ("encoder.layers.{n}.mlp.fc2", "blocks.{n}.mlp.w2"),
            ("encoder.layers.{n}.mlp.fc3", "blocks.{n}.mlp.w3"),
            ("encoder.layers.{n}.mlp.ffn_ln", "blocks.{n}.mlp.ffn_ln"),
        ),
    ),
    (*ROTARY, (r"embeddings\.position_ids", "a counter")),
)
OPENAI = Layout(
    (
        Rule(("conv1.weight",), ("embeddings.patch_embedding.weight",)),
        Rule(("class_embedding",), ("embeddings.class_embedding",)),
        Rule(("positional_embedding",), ("embeddings.position_embedding.weight",)),
        *_rules(
            ("ln_pre", "pre_layrnorm"),
            ("ln_post", "post_layernorm"),
            ("transformer.resblocks.{n}.ln_1", "encoder.layers.{n}.layer_norm1"),
            ("transformer.resblocks.{n}.ln_2", "encoder.layers.{n}.layer_norm2"),
            ("transformer.resblocks.{n}.attn.out_proj", "encoder.layers.{n}.self_attn.out_proj"),
            ("transformer.resblocks.{n}.mlp.c_fc", "encoder.layers.{n}.mlp.fc1"),
            ("transformer.resblocks.{n}.mlp.c_proj", "encoder.layers.{n}.mlp.fc2"),
        ),
        *(
            Rule(
                (f"transformer.resblocks.{{n}}.attn.in_proj_{kind}",),
                tuple(f"encoder.layers.{{n}}.self_attn.{letter}_proj.{kind}" for letter in "qkv"),
            )
            for kind in ("weight", "bias")
        ),
    )
)
# timm's ViT with an attention pooling head, which the original wraps for SigLIP 2.
TIMM_SIGLIP = Layout(
    (
        Rule(("pos_embed",), ("embeddings.position_embedding.weight",), leading_axes=1),
        *_rules(
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("norm", "post_layernorm"),
            ("blocks.{n}.norm1", "encoder.layers.{n}.layer_norm1"),
            ("blocks.{n}.norm2", "encoder.layers.{n}.layer_norm2"),
            ("blocks.{n}.attn.proj", "encoder.layers.{n}.self_attn.out_proj"),
            ("blocks.{n}.mlp.fc1", "encoder.layers.{n}.mlp.fc1"),
            ("blocks.{n}.mlp.fc2", "encoder.layers.{n}.mlp.fc2"),
            ("attn_pool.proj", "head.attention.out_proj"),
            ("attn_pool.norm", "head.layernorm"),
            ("attn_pool.mlp.fc1", "head.mlp.fc1"),
            ("attn_pool.mlp.fc2", "head.mlp.fc2"),
        ),
        *(
            Rule(
                (f"blocks.{{n}}.attn.qkv.{kind}",),
                tuple(f"encoder.layers.{{n}}.self_attn.{letter}_proj.{kind}" for letter in "qkv"),
            )
            for kind in ("weight", "bias")
        ),
        Rule(("attn_pool.latent",), ("head.probe",)),
        *(
            Rule((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), (f"head.attention.in_proj_{kind}",), (1, 2))
            for kind in ("weight", "bias")
        ),
    )
)

_ADAPTER_BLOCKS = (("{n}.ln", "blocks.{n}.norm"), ("{n}.fn.0", "blocks.{n}.fc1"), ("{n}.fn.3", "blocks.{n}.fc2"))
ADAPTER = Layout(_rules(*_ADAPTER_BLOCKS, ("4", "norm"), ("5", "proj")))
SCALE = Layout(_same("logit_scale"))

__all__ = [
    "ADAPTER",
    "EVA",
    "EVA02",
    "HUB_EVA02",
    "OPENAI",
    "SCALE",
    "TIMM_EVA02",
    "TIMM_SIGLIP",
    "Layout",
    "Renamed",
    "Rule",
    "linear",
    "unchanged",
]
