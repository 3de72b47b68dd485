"""What a conversion prints: what was recognised, and what became of every tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llm2clip.convert.joint_plan import JointPlan


def print_report(plan: JointPlan) -> None:
    """Print a plan; the blocks of a tower share a line."""
    print(f"recognised: {plan.recognised}")
    print(f"renamed ({len(plan.renames)}):")
    for theirs, ours in _collapsed(plan.renames):
        print(f"  {theirs}" if theirs == ours else f"  {theirs} -> {ours}")
    for title, lines in (("dropped", plan.dropped), ("new, at random values", plan.new)):
        if lines:
            print(f"{title} ({len(lines)}):")
            for name, reason in _collapsed(lines):
                print(f"  {name}: {reason}")
    print("missing: none")
    for note in plan.notes:
        print(f"note: {note}")


def _collapsed(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """`blocks.0.x`, `blocks.1.x`, ... as one line `blocks.{0-11}.x`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for left, right in pairs:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", left)
        number = numbers[0] if numbers else None
        key = tuple(re.sub(rf"(?<=\.){number}(?=\.)", "{}", text) if number else text for text in (left, right))
        groups.setdefault((key[0], key[1]), []).append(int(number) if number else -1)
    lines = []
    for (left, right), found in groups.items():
        if found[0] < 0:
            lines.append((left, right))
            continue
        span = str(found[0]) if len(found) == 1 else f"{{{min(found)}-{max(found)}}}"
        lines.append((left.replace("{}", span), right.replace("{}", span)))
    return lines
