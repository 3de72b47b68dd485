"""Every set on the Hub is measured by its name alone, from a loopback Hub with samples in the layout of its copy."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llm2clip import cli
from llm2clip.encoders import Encoder
from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation.benchmark import BenchmarkError, HubFiles
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks, hub_files
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.hub_files import cached, obtain, require_files
from llm2clip.evaluation.evaluate import evaluate
from llm2clip.evaluation.graded_data import eccv_caption
from tests.builders import tiny
from tests.llm2clip.evaluation.benchmarks import parquet_samples
from tests.llm2clip.evaluation.benchmarks.classification_samples import tar_of, webdataset
from tests.llm2clip.evaluation.benchmarks.samples import picture, write
from tests.loopback_hub import TOKEN, File, LoopbackHub, Repo

Files = dict[str, Any]
FIVE = ["a dog", " a cat", "two dogs", "a red bus", "dogs"]
ON_HUB = {name: benchmark for name, benchmark in all_benchmarks().items() if benchmark.hub is not None}


def captioned(*captions: list[str]) -> Files:
    """Tars of images with captions, each a tar."""
    tars = [
        {f"s{number:07d}.jpg": picture(50 * number), f"s{number:07d}.txt": "\n".join(texts).encode()}
        for number, texts in enumerate(captions)
    ]
    files = {f"test/{number}.tar": tar_of(members) for number, members in enumerate(tars)}
    return files | {"test/nshards.txt": str(len(tars)), "dataset_type.txt": "retrieval\n", "train/0.tar": b"not this"}


def classified() -> Files:
    """Tars of images with labels, for the test and for probes."""
    members = {}
    for number in range(9):
        members[f"s{number:07d}.webp"] = picture(25 * number, "webp")
        members[f"s{number:07d}.cls"] = str(number % 3).encode()
    files = webdataset(members) | webdataset(members, split="train")
    return files | {"zeroshot_classification_templates.txt": "a {c}\n"}


def v2(variant: str) -> Files:
    """The folders of ImageNet-V2, three of a thousand."""
    return {f"imagenetv2-{variant}-format-val/{label}/1.jpeg": picture(20 * label) for label in (0, 2, 10)}


# Two images that are queries of ECCV Caption, with captions that are.
JUDGED = eccv_caption().Metrics()
CORPUS: dict[int, list[int]] = {
    image: ids
    for image, ids in JUDGED.coco_gts["i2t"].items()
    if image in JUDGED.eccv_gts["i2t"] and not JUDGED.eccv_gts["t2i"].keys().isdisjoint(ids)
}
CORPUS = dict(list(CORPUS.items())[:2])
COCO = {
    "data/test-00000-of-00001.parquet": parquet_samples.coco(dict.fromkeys(CORPUS, FIVE), CORPUS),
}
CIFAR = {"cifar10": "label", "cifar100": "fine_label"}
FILES: dict[str, Files] = {
    "flickr30k": captioned(FIVE, ["a café", "a dog", "x", "y", "z"]),
    "coco-salesforce": captioned([*FIVE, "a sixth"], FIVE),
    "coco-salesforce-all": captioned([*FIVE, "a sixth"], FIVE),
    "coco-val2017": captioned(FIVE, [*FIVE, "a sixth", "a seventh"]),
    **dict.fromkeys(("coco-karpathy", "cra", "eccv-caption", "cxc-eccv"), COCO),
    "docci": {"data/test-00000-of-00001.parquet": parquet_samples.docci({"test_1": "A dog.", "test_0": "A cat."})},
    "winoground": {
        "data/test-00000-of-00001.parquet": parquet_samples.winoground([("a b", "b a"), ("c d", "d c")], ["x", "y"])
    },
    "mmvp-vlm": {
        "Questions.csv": "Question ID,Type,Statement\n1,Text,one\n2,Text,two\n3,Text,three\n4,Text,four\n",
        **{f"MLLM_VLM Images/Text/{number}.jpg": picture(40 * number) for number in range(1, 5)},
    },
    "imagenet-v2": v2("matched-frequency"),
    "imagenet-v2-threshold": v2("threshold0.7"),
    "imagenet-v2-top": v2("top-images"),
    **{
        name: {
            f"plain_text/{split}-00000-of-00001.parquet": parquet_samples.cifar(
                [0, 100, 200, 250], [0, 1, 0, 1], label
            )
            for split in ("test", "train")
        }
        for name, label in CIFAR.items()
    },
    **dict.fromkeys(("food101", "pets", "caltech101"), classified()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return load_encoder(str(folder))


@pytest.fixture
def hub(
    hub: LoopbackHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> LoopbackHub:
    """The loopback Hub, in a folder without data."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path_factory.mktemp("assets")))
    monkeypatch.chdir(tmp_path)
    return hub


def publish(hub: LoopbackHub, name: str) -> HubFiles:
    """Put the sample of a set onto the Hub, in the repo and at the commit of its row."""
    of_set = ON_HUB[name].hub
    assert of_set is not None
    files = {
        path: content if isinstance(content, bytes) else content.encode() for path, content in FILES[name].items()
    }
    if of_set.unpack:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        files = {of_set.files[0]: stream.getvalue()}
    repo = Repo(of_set.repo, "dataset", gated=of_set.gated)
    repo.commits[of_set.revision] = {path: File(content, lfs=len(content) > 300) for path, content in files.items()}
    hub.repos["dataset", of_set.repo] = repo
    return of_set


def measure(model: Encoder, name: str, **settings: Any) -> Any:
    [result] = evaluate(model, name, allow_counts=True, num_workers=0, download=True, **settings)
    return result


def test_every_set_on_the_hub_has_a_sample() -> None:
    assert set(FILES) == set(ON_HUB)


@pytest.mark.parametrize("name", [*ON_HUB, "cifar10-probe-sgd", "pets-probe-sgd"])
def test_a_set_is_measured_by_its_name_and_as_from_files(
    name: str, hub: LoopbackHub, model: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_set = name.partition("-probe-")[0]
    row = publish(hub, of_set)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Of ImageNet, one prompt for each of the thousand classes is enough.
    settings = {"templates": "paper"} if name.startswith("imagenet") else {}
    by_name = measure(model, name, **settings)
    assert by_name.data["repo"] == row.repo
    assert by_name.data["revision"] == row.revision
    # Equal files have one blob in the cache: the second is asked for, and not fetched again.
    fetched = [path for method, path, _ in hub.requests if method in ("GET", "HEAD") and "/resolve/" in path]
    assert any("train" in path for path in fetched) == ("probe" in name)
    for path, content in FILES[of_set].items():
        write(tmp_path / "mine" / ON_HUB[of_set].folder / path, content)
    asked = len(hub.requests)
    from_files = measure(model, name, data=str(tmp_path / "mine"), **settings)
    assert len(hub.requests) == asked
    assert from_files.scores == by_name.scores
    assert from_files.counts == by_name.counts
    assert from_files.data["checksum"] == by_name.data["checksum"]
    # Without a network, what was fetched is read.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [benchmark] = choose_benchmarks([name], tmp_path)
    assert data_checksum(benchmark.load(obtain(benchmark, tmp_path))) == by_name.data["checksum"]
    assert len(hub.requests) == asked


def test_license_and_size_are_told_before_a_set_is_fetched(
    hub: LoopbackHub, model: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    publish(hub, "flickr30k")
    with caplog.at_level("INFO", "llm2clip"):
        measure(model, "flickr30k")
    assert (
        "flickr30k from the Hub: clip-benchmark/wds_flickr30k at f8af3ce, about 146 MB. License: Flickr30k terms"
        in (caplog.text)
    )


def test_counts_of_a_fetched_set_are_checked(hub: LoopbackHub, model: Encoder) -> None:
    publish(hub, "flickr30k")
    with pytest.raises(BenchmarkError, match=r"Flickr30k in .* has 2 images instead of 1,000, 10 texts instead of"):
        evaluate(model, "flickr30k", num_workers=0)


def test_other_train_images_are_told_by_the_result_of_a_probe(hub: LoopbackHub, model: Encoder) -> None:
    publish(hub, "pets")
    assert "VTAB" not in str(measure(model, "pets").differences)
    assert measure(model, "pets-probe-sgd").differences[0] == "train images are VTAB's 90 %"


def offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def gone(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.repos["dataset", "clip-benchmark/wds_flickr30k"]


def changed(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["dataset", "clip-benchmark/wds_flickr30k"] = Repo("clip-benchmark/wds_flickr30k", "dataset")


def gated(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["dataset", "clip-benchmark/wds_flickr30k"].gated = True


def emptied(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = hub.repos["dataset", "clip-benchmark/wds_flickr30k"].commits
    [revision] = [sha for sha, files in commits.items() if files]
    commits[revision] = {"test/0.tar": commits[revision]["test/0.tar"]}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (offline, r"cannot be reached .*about 146 MB\. .*hf download clip-benchmark/wds_flickr30k --repo-type dataset "
                  r"--revision f8af3ceee1b944bf761340682621dfafd23974d2 --include 'test/\*' .*-dir DATA/wds_fl"),
        (gone, "there is no .*/datasets/clip-benchmark/wds_flickr30k, or it is not for you"),
        (changed, "has no commit f8af3ceee1b944bf761340682621dfafd23974d2 any more: get the set elsewhere"),
        (gated, "is gated: accept its terms on .*/datasets/clip-benchmark/wds_flickr30k, then `hf auth login`"),
        (emptied, r"lacks test/nshards\.txt, dataset_type\.txt, of Flickr30k"),
    ],
)  # fmt: skip
def test_what_cannot_be_fetched_is_one_error_that_says_what_to_do(
    break_it: Callable[..., None], message: str, hub: LoopbackHub, model: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "flickr30k")
    break_it(hub, monkeypatch)
    with pytest.raises(BenchmarkError, match=message):
        measure(model, "flickr30k")


def test_a_large_set_is_fetched_only_if_that_is_asked_for(hub: LoopbackHub, tmp_path: Path) -> None:
    publish(hub, "docci")
    benchmarks = choose_benchmarks(["docci"], tmp_path)
    with pytest.raises(BenchmarkError, match=r"about 2\.6 GB.*License: CC BY 4\.0: --download fetches what is larger"):
        require_files(benchmarks, tmp_path)
    assert not hub.requests
    require_files(benchmarks, tmp_path, download=True)
    obtain(benchmarks[0], tmp_path)
    # What is here already needs no word.
    require_files(benchmarks, tmp_path)


def test_what_is_missing_is_told_before_anything_is_fetched(hub: LoopbackHub, model: Encoder) -> None:
    publish(hub, "flickr30k")
    with pytest.raises(
        BenchmarkError, match=r"urban1k lacks caption/1\.txt, image in data/Urban1k\. \(Source: .*Urban1k"
    ):
        evaluate(model, ["flickr30k", "urban1k"], num_workers=0)
    assert not hub.requests
    with pytest.raises(BenchmarkError, match="--data nowhere is no folder"):
        evaluate(model, "flickr30k", num_workers=0, data="nowhere")


def test_an_interrupted_download_and_archive_are_completed(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "imagenet-v2")
    benchmark = ON_HUB["imagenet-v2"]

    def cut(archive: Path, folder: Path, **options: Any) -> None:
        write(folder / "imagenetv2-matched-frequency-format-val/0/1.jpeg", b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(hub_files.shutil, "unpack_archive", cut)
        with pytest.raises(OSError, match="disk is full"):
            obtain(benchmark, tmp_path)
    assert cached(benchmark) is not None
    data = benchmark.load(obtain(benchmark, tmp_path))
    assert data.labels.tolist() == [0, 2, 10]
    assert data.images.images[0].read_bytes() == picture(0)


def test_a_mean_takes_each_set_from_where_it_is(hub: LoopbackHub, tmp_path: Path) -> None:
    benchmark = all_benchmarks()["proclip-11"]
    known = {member.name: member for member in benchmark.members}
    two = replace(benchmark, sets={name: known[name] for name in ("pets", "cars")})  # type: ignore[call-arg]
    publish(hub, "pets")
    for path, content in classified().items():
        write(tmp_path / "wds_cars" / path, content)
    require_files([two], tmp_path)
    data = two.load(obtain(two, tmp_path))
    assert data.counts() == {"sets": 2, "pets images": 9, "pets classes": 3, "cars images": 9, "cars classes": 3}
    shutil.rmtree(tmp_path / "wds_cars")
    with pytest.raises(BenchmarkError, match=r"cars lacks test/nshards\.txt"):
        require_files([two], tmp_path)


OWN = """
mine:
  title: Mine
  protocol: retrieval
  counts: {images: 2, texts: 2}
  license: mine
  source: here
  folder: mine
  hub: {repo: tester/mine, revision: "%s", files: ["*.parquet"], megabytes: 1}
  read: {layout: parquet, files: "*.parquet", image: image, texts: description}
"""


def test_a_users_own_set_is_a_yaml_file(
    hub: LoopbackHub, model: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = Repo("tester/mine", "dataset")
    files = {"test.parquet": File(parquet_samples.docci({"a": "a dog", "b": "a cat"}), lfs=True)}
    revision = repo.commit("main", files, "data")
    hub.repos["dataset", "tester/mine"] = repo
    (tmp_path / "mine.yaml").write_text(OWN % revision)
    [result] = evaluate(model, "mine.yaml", num_workers=0)
    assert (result.benchmark, result.counts["images"], result.differences) == ("mine", 2, [])
    assert cli.main(["evaluate", "--list", "--benchmark", "mine.yaml"]) == 0
    assert f"on the Hub: tester/mine at {revision[:7]}, about 1 MB" in capsys.readouterr().out
    assert cli.main(["check-data", "--benchmark", "mine.yaml", "--num-workers", "0"]) == 0
