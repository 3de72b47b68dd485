"""Rules that rename and regroup the tensors of a checkpoint, applied in both directions.

A layout is a list of rules. A rule maps one tensor, or one group of tensors with the same content (a fused `qkv` and
its three parts), to the names of this package. `{n}` stands for the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A mapping between names in the checkpoint and names in this package.

    Several names on one side are slices of one tensor along its first axis.

    Args:
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
        if self.transpose:
            tensors = [tensor.t() for tensor in tensors]
        tensors = [_with_leading_axes(tensor, -self.leading_axes) for tensor in tensors]
        return _regroup(tensors, (1,) * len(self.ours))

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        tensors = _regroup(tensors, self.theirs_parts or (1,) * len(self.theirs))
        tensors = [_with_leading_axes(tensor, self.leading_axes) for tensor in tensors]
        return [tensor.t().contiguous() for tensor in tensors] if self.transpose else tensors


def _with_leading_axes(tensor: Tensor, count: int) -> Tensor:
    return tensor[(None,) * count] if count >= 0 else tensor.reshape(tensor.shape[-count:])


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
            replace(rule, theirs=tuple(theirs + n for n in rule.theirs), ours=tuple(ours + n for n in rule.ours))
            for rule in self.rules
        )
        return Layout(rules, tuple((re.escape(theirs) + pattern, reason) for pattern, reason in self.dropped))

    def rename(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename the tensors of a checkpoint to the names of this package.

        Tensors without a rule, or whose group is incomplete, are listed in `unknown`.
        """
        # The first pattern that matches gives the reason.
        patterns = self.dropped[::-1]
        dropped = {name: reason for name in state for pattern, reason in patterns if re.fullmatch(pattern, name)}
        result = Renamed(dropped=list(dropped.items()))
        lookup = {name: (rule.theirs, rule.ours, rule.to_ours) for rule in self.rules for name in rule.theirs}
        for group, tensors in _renamed(state, [name for name in state if name not in dropped], lookup):
            if tensors:
                result.tensors.update(tensors)
                result.renames.append((" + ".join(group), " + ".join(tensors)))
            else:
                result.unknown += group
        return result

    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of this package to the names of the checkpoint.

        Raises:
            ValueError: A tensor has no name in this layout.
        """
        rules = [rule for rule in self.rules if not rule.alias]
        lookup = {name: (rule.ours, rule.theirs, rule.to_theirs) for rule in rules for name in rule.ours}
        result: dict[str, Tensor] = {}
        for group, tensors in _renamed(state, state, lookup):
            if not tensors:
                raise ValueError(f"the tensor {group[0]!r} has no name in the layout of the original.")
            result.update(tensors)
        return result


def _renamed(
    state: Mapping[str, Tensor], names: Iterable[str], lookup: Mapping[str, tuple[Any, Any, Any]]
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Yield each group of names with its renamed tensors, or a single name without tensors if no rule applies."""
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        template, block = template_of(name)
        sources, targets, convert = lookup.get(template, ((), (), None))
        group = [source.replace("{n}", block) for source in sources]
        if not group or any(source not in state for source in group):
            yield [name], {}
            continue
        done.update(group)
        tensors = convert([state[source] for source in group])
        yield group, dict(zip((target.replace("{n}", block) for target in targets), tensors, strict=True))


# The names of lists of blocks, such as `transformer.resblocks`, `text_adaptor` and `adaptor`.
BLOCK = re.compile(r"(?:(?<=\b(?:blocks|layers)\.)|(?<=resblocks\.))\d+(?=\.)|(?<=adaptor\.)[0-3](?=\.)")


def template_of(name: str) -> tuple[str, str]:
    """Replace the number of the block: `blocks.7.norm1.weight` -> (`blocks.{n}.norm1.weight`, `7`)."""
    match = BLOCK.search(name)
    return (BLOCK.sub("{n}", name, count=1), match[0]) if match else (name, "")


def linears(theirs: str, ours: str = "") -> tuple[Rule, ...]:
    """Return the rules of modules with a weight and a bias.

    Args:
        theirs: Names in the checkpoint, separated by spaces.
        ours: Names in this package; by default the same.
    """
    pairs = zip(theirs.split(), (ours or theirs).split(), strict=True)
    return tuple(
        Rule((f"{left}.{kind}",), (f"{right}.{kind}",)) for left, right in pairs for kind in ("weight", "bias")
    )


def unchanged(names: Iterable[str]) -> Layout:
    """Return a layout that keeps all names."""
    return Layout(same(*{template_of(name)[0] for name in names}))


def same(*names: str) -> tuple[Rule, ...]:
    """Return the rules of tensors that keep their names."""
    return tuple(Rule((name,), (name,)) for name in names)
