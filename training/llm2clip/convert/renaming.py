"""Rules that rename and regroup the tensors of a checkpoint, applied in both directions.

A layout is a list of rules. A rule maps one tensor, or one group of tensors with the same content (a fused `qkv` and
its three parts), to the names of this package. `{n}` stands for the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A mapping between names in the checkpoint and names in this package.

    Args:
        theirs: Name or names in the checkpoint, with `{n}` for the number of the block.
        ours: Name or names in this package. Several names on one side are slices of one tensor along its first axis.
        theirs_parts: Relative sizes of the slices in the checkpoint; equal by default.
        transpose: Whether the checkpoint contains the transposed matrix.
        leading_axes: Number of leading axes of size 1 that only the checkpoint's tensor has; negative if only ours has
            them.
        alias: Whether this is an older name, which is read but never written.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    theirs_parts: tuple[int, ...] = ()
    transpose: bool = False
    leading_axes: int = 0
    alias: bool = False

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        """Convert the tensors of `theirs` to those of `ours`."""
        if self.transpose:
            tensors = [tensor.t() for tensor in tensors]
        tensors = [_with_leading_axes(tensor, -self.leading_axes) for tensor in tensors]
        return _regroup(tensors, (1,) * len(self.ours))

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        """Convert the tensors of `ours` to those of `theirs`."""
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
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} cannot be split into {sum(parts)} equal parts.")
    return [part.clone() for part in whole.split([unit * part for part in parts])]


@dataclass
class Renamed:
    """Result of renaming a checkpoint: its tensors, and what happened to each of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """Rules, and patterns of the tensors that are dropped, each with the reason."""

    rules: tuple[Rule, ...]
    dropped: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.rules + other.rules, self.dropped + other.dropped)

    def under(self, theirs: str, ours: str = "") -> Layout:
        """Put a prefix before all names of the checkpoint, and one before ours."""
        rules = tuple(
            replace(
                rule,
                theirs=tuple(theirs + name for name in rule.theirs),
                ours=tuple(ours + name for name in rule.ours),
            )
            for rule in self.rules
        )
        return Layout(rules, tuple((re.escape(theirs) + pattern, reason) for pattern, reason in self.dropped))

    def rename(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename the tensors of a checkpoint to the names of this package.

        Tensors without a rule, or whose group is incomplete, are listed in `unknown`.
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
        """Rename the tensors of this package to the names of the checkpoint.

        Raises:
            ValueError: A tensor has no name in this layout.
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
                raise ValueError(f"the tensor {name!r} has no name in the layout of the original.")
            done.update(group)
            targets = [part.replace("{n}", block) for part in rule.theirs]
            result.update(zip(targets, rule.to_theirs([state[part] for part in group]), strict=True))
        return result


def _template(name: str) -> tuple[str, str]:
    """Replace the number of the block: `blocks.7.norm1.weight` -> (`blocks.{n}.norm1.weight`, `7`)."""
    match = re.search(r"(?<=\b(?:blocks|layers)\.)\d+(?=\.)", name)
    if match is None:
        # Other names of lists of blocks: `transformer.resblocks`, `text_adaptor` and `adaptor`.
        match = re.search(r"(?<=resblocks\.)\d+(?=\.)|(?<=adaptor\.)[0-3](?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{n}}{name[match.end() :]}", match[0]


def linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a module with a weight and a bias."""
    return tuple(Rule((f"{theirs}.{kind}",), (f"{ours}.{kind}",)) for kind in ("weight", "bias"))


def linears(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """The rules of several modules, see [`linear`]."""
    return tuple(rule for theirs, ours in pairs for rule in linear(theirs, ours))


def unchanged(names: Iterable[str]) -> Layout:
    """A layout that keeps all names."""
    return Layout(same(*{_template(name)[0] for name in names}))


def same(*names: str) -> tuple[Rule, ...]:
    """The rules of tensors that keep their names."""
    return tuple(Rule((name,), (name,)) for name in names)
