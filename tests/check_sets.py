"""`make check-sets`: what the copies of benchmarks on the Hub hold, beside what was published. Needs the network.

For each set of `sets.yaml` that has a copy on the Hub, in use (`hub`) or not (`candidate`), it finds the whole commit,
fetches the test files, reads them, and compares the counts with the published ones. Captions and labels are compared
with those of the published files, if these lie in a folder:

    make check-sets ARGS="--data DIR --megabytes 1000 flickr30k coco-salesforce"

A candidate whose captions and labels are the same can become the `hub` of its row.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks import SETS, all_benchmarks
from llm2clip.evaluation.benchmarks.hub_files import unpack
from llm2clip.evaluation.benchmarks.rows import Row, read_rows
from llm2clip.evaluation.data import ClassificationData, RetrievalData
from llm2clip.evaluation.reading import read_json, read_json_lines
from llm2clip.files.atomic import digest_json


def salesforce(path: Path, first: int | None = None) -> list[list[str]]:
    """The captions of each image in a file of Salesforce: `[{"image": path, "caption": [texts]}]`."""
    return [row["caption"][:first] for row in read_json(path)]


def karpathy(path: Path) -> list[list[str]]:
    """The first five raw sentences of each image of the split `test` of Karpathy's file."""
    rows = [row for row in read_json(path)["images"] if row["split"] == "test"]
    return [[sentence["raw"] for sentence in row["sentences"]][:5] for row in rows]


def annotations(path: Path) -> list[list[str]]:
    """The first five captions of each image in an annotation file of COCO."""
    content = read_json(path)
    captions: dict[int, list[str]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return [texts[:5] for texts in captions.values()]


def descriptions(path: Path) -> list[list[str]]:
    """The description of each image of the split `test` of DOCCI."""
    return [[row["description"]] for row in read_json_lines(path) if row["split"] == "test"]


# Published files of captions of the sets whose copies on the Hub are read.
PUBLISHED: dict[str, tuple[str, Callable[[Path], list[list[str]]]]] = {
    "flickr30k": ("flickr30k_test.json", salesforce),
    "coco-salesforce": ("coco_karpathy_test.json", lambda path: salesforce(path, 5)),
    "coco-salesforce-all": ("coco_karpathy_test.json", salesforce),
    "coco-karpathy": ("dataset_coco.json", karpathy),
    "coco-val2017": ("captions_val2017.json", annotations),
    "docci": ("docci_descriptions.jsonlines", descriptions),
}
# Published labels of CIFAR: the file, the bytes of a row, and the place of the label in it.
LABELS = {"cifar10": ("test_batch.bin", 3073, 0), "cifar100": ("test.bin", 3074, 1)}


def content_of(data: Any) -> Any:
    """What is compared of some data, whatever the order of its images; None if that is neither captions nor labels."""
    if isinstance(data, RetrievalData):
        captions: list[list[str]] = [[] for _ in range(len(data.images))]
        for text, owner in zip(data.texts, data.owners.tolist(), strict=True):
            captions[owner].append(text)
        return sorted(captions)
    if isinstance(data, ClassificationData):
        return sorted(Counter(data.classnames[label] for label in data.labels.tolist()).items())
    return None


def published_content(name: str, benchmark: Benchmark, data: Path) -> Any:
    """The same of the published files below a folder; None if they are not there."""
    if name in LABELS:
        file, size, place = LABELS[name]
        names = benchmark.read.__self__.names  # type: ignore[attr-defined]
        found = next(data.rglob(file), None)
        labels = None if found is None else found.read_bytes()[place::size]
        return labels and sorted(Counter(names[label] for label in labels).items())
    if name in PUBLISHED:
        file, read = PUBLISHED[name]
        found = next(data.rglob(file), None)
        return None if found is None else sorted(read(found))
    folder = benchmark.find(data) if benchmark.hub is None else None
    return None if folder is None else content_of(benchmark.load(folder))


def compared(found: Any, published: Any) -> str:
    """Say whether two contents are equal, and if not, how they differ."""
    if found is None or published is None:
        return "not compared" if found is None else f"{digest_json(found)}; the published files are not below --data"
    if found == published:
        return f"{digest_json(found)}, as published"
    if len(found) != len(published):
        return f"{len(found):,} images or classes instead of {len(published):,}"
    pairs = [(one, other) for one, other in zip(found, published, strict=True) if one != other]
    if all(sorted(map(str.strip, one)) == sorted(map(str.strip, other)) for one, other in pairs if _are_texts(one)):
        return f"{len(pairs):,} differ in the order of captions or in outer blanks alone, as {pairs[0]}"
    return f"{len(pairs):,} differ, as {pairs[0]}"


def _are_texts(value: Any) -> bool:
    return all(isinstance(text, str) for text in value)


def whole_revision(repo: str, known: str | None) -> str:
    """Find the commit of a data set that begins with some digits, or the newest if none are known."""
    commits = [commit.commit_id for commit in HfApi().list_repo_commits(repo, repo_type="dataset")]
    matches = [commit for commit in commits if commit.startswith(known or commits[0])]
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} of {len(commits)} commits of {repo} begin with {known}.")
    return matches[0]


def check(name: str, row: Row, data: Path, megabytes: int) -> list[str]:
    """Check the copy of a set; returns lines to print."""
    copy = row.hub or row.candidate
    assert copy is not None
    known = copy.revision if row.hub else row.candidate and row.candidate.short_revision
    revision = whole_revision(copy.repo, known)
    lines = [f"{name}: {copy.repo} at {revision}"]
    info = HfApi().list_repo_tree(copy.repo, recursive=True, revision=revision, repo_type="dataset")
    sizes = {entry.path: entry.size for entry in info if hasattr(entry, "size")}
    size = sum(size for path, size in sizes.items() if any(fnmatch(path, pattern) for pattern in copy.files)) / 1e6
    lines.append(f"    size: {size:,.0f} MB")
    if size > megabytes:
        return [*lines, f"    not fetched: larger than --megabytes {megabytes:,}"]
    folder = Path(snapshot_download(copy.repo, repo_type="dataset", revision=revision, allow_patterns=[*copy.files]))
    if copy.unpack:
        folder = unpack(copy.repo, revision, copy.files, folder)
    layout = row.read if row.hub else row.candidate and row.candidate.read
    if layout is None:
        return [*lines, f"    files: {', '.join(sorted(path.name for path in folder.iterdir()))}"]
    benchmark = all_benchmarks()[name]
    found = layout.read(folder)
    lines.append(f"    counts: {'; '.join(benchmark.differences(found.counts())) or 'as published'}")
    return [*lines, f"    content: {compared(content_of(found), published_content(name, benchmark, data))}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make check-sets", description=__doc__)
    parser.add_argument("sets", nargs="*", help="names of sets; by default all that have a copy on the Hub")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the published files")
    parser.add_argument("--megabytes", type=int, default=1000, help="largest copy that is fetched")
    given = parser.parse_args()
    text = resources.files("llm2clip.evaluation").joinpath(SETS).read_text(encoding="utf-8")
    rows = {name: row for name, row in read_rows(text, SETS).items() if row.hub or row.candidate}
    for name in given.sets or rows:
        try:
            lines = check(name, rows[name], given.data, given.megabytes)
        except (KeyError, OSError, ValueError) as error:
            lines = [f"{name}: {type(error).__name__}: {error}"]
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
