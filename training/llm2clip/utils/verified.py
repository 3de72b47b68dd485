"""What a check of a folder found; `llm2clip verify` adds up those of all folders."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Fault(NamedTuple):
    """A damaged or missing file: its path with what is wrong, and how to fix only that."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what.rstrip('.')}. To fix it: {self.fix}."


@dataclass
class Verified:
    """What was found.

    Attributes:
        counts: What was checked, such as `num_files`.
        faults: What is damaged or missing.
        remarks: What could not be checked, or was not finished.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Verified) -> None:
        """Add what was found in another folder."""
        self.counts += other.counts
        self.faults += other.faults
        self.remarks += other.remarks
