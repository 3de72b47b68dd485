"""ProCLIP's mean over 11 sets of classification, each by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks import cifar, imagenet, webdataset
from llm2clip.evaluation.data import ClassificationData, SeveralSets

NAMES = (
    *("food101", "cifar10", "cifar100", "sun397", "cars", "fgvc-aircraft", "dtd", "pets", "caltech101", "flowers"),
    "imagenet-1k",
)
_KNOWN = {member.name: member for member in (*cifar.BENCHMARKS, *imagenet.BENCHMARKS, *webdataset.BENCHMARKS)}
SETS = tuple(_KNOWN[name] for name in NAMES)


def read(folder: Path, with_train: bool = False) -> SeveralSets:
    """Read the test images of all sets, each in its folder, and for probes the train images."""
    readers: dict[str, Callable[[Path], ClassificationData]] = {
        member.name: member.read_train if with_train and member.read_train else member.read for member in SETS
    }
    return SeveralSets({member.name: readers[member.name](folder / member.folder) for member in SETS})


def _in_folder(member: Benchmark, needs: Sequence[str | tuple[str, ...]]) -> list[tuple[str, ...]]:
    forms = [(need,) if isinstance(need, str) else need for need in needs]
    return [tuple(f"{member.folder}/{form.removeprefix('./')}" for form in alternatives) for alternatives in forms]


BENCHMARKS = [
    Benchmark(
        name="proclip-11",
        title="Mean of 11 sets",
        folder=".",
        needs=tuple(need for member in SETS for need in _in_folder(member, member.needs)),
        files=f"the files of {', '.join(NAMES)}, each in its folder.",
        counts={"sets": 11}
        | {f"{member.name} {name}": count for member in SETS for name, count in member.counts.items()},
        license="of each set",
        source="that of each set",
        read=read,
        protocol="mean-of-sets",
        note="ProCLIP's mean: top-1, of Aircraft, Pets, Caltech and Flowers the mean per class.",
        read_train=partial(read, with_train=True),
        train_needs=tuple(need for member in SETS for need in _in_folder(member, member.train_needs)),
    )
]
