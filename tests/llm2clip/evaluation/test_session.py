"""A session computes what is not stored, whatever was interrupted before and however many processes share the work."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip.data import decode_image, table_identity
from llm2clip.encoders.images import ImageList
from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation import session as evaluation_session
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, CroppedFiles, FilePart
from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.session import Session
from llm2clip.models.embeddings import NonFiniteError
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.evaluation.benchmarks.samples import picture, write
from tests.llm2clip.evaluation.fake_session import FakeSession
from tests.llm2clip.trainers.stages import interrupt

TEXTS = ["a small dog", "", "a red bus", "a small dog", "two children"]
# Above 2**24, float32 has no odd numbers.
LARGE = 2**24 + 1


def pictures(*numbers: int) -> BenchmarkImages:
    return BenchmarkImages([picture(8 * number) for number in numbers], [f"picture {number}" for number in numbers])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_transformers("clip", folder)
    return folder


def session(model: Path, store: Path | None, **options: Any) -> Session:
    return Session(load_encoder(str(model)), store, **{"batch_size": 2, **options})


def fake(store: Path | None, seed: int = 0) -> FakeSession:
    """A session of made rows, whose `embedded` says what was computed."""
    rows = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(seed))
    images, features = ({picture(8 * number): row for number, row in enumerate(part[:30])} for part in rows[:2])
    texts = dict(zip([*TEXTS, "new"], rows[2], strict=False))
    wide = {content: torch.cat([row, row]) for content, row in features.items()}
    return FakeSession(images, texts, store, features=wide, name=f"fake {seed}")


def count(positions: Any) -> Iterator[Tensor]:
    """Two counts of an image: its position, and a number that float32 cannot hold."""
    for position in positions:
        yield torch.tensor([position, LARGE + position])


def counts_of(one: Session, images: BenchmarkImages) -> Tensor:
    return one.count_in_images("positions", images.content_keys(), count, 2, "Counting")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_those_of_the_encoder_stored_or_not(model: Path, tmp_path: Path, num_workers: int) -> None:
    images = pictures(0, 1, 2, 1, 3)
    encoder = load_encoder(str(model))
    prepared = [encoder.prepare(images.decode(row, decode_image), "image") for row in range(5)]
    inputs = {"pixel_values": torch.stack([one["pixel_values"] for one in prepared])}
    for store in (None, tmp_path, tmp_path):
        found = session(model, store, num_workers=num_workers)
        torch.testing.assert_close(found.embed_images(images), encoder.forward_images(inputs), atol=1e-6, rtol=0)
        features = encoder.forward_features(inputs)
        torch.testing.assert_close(found.embed_images(images, "features"), features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.embed_texts(TEXTS), encoder.encode_text(TEXTS), atol=1e-6, rtol=0)
        assert found.embed_texts([]).shape == (0, encoder.width)


def test_sets_share_images_and_texts_by_content_and_later_runs_find_them(tmp_path: Path) -> None:
    found = fake(tmp_path)
    one, two = found.embed_images(pictures(0, 1, 2)), found.embed_images(pictures(3, 2, 0, 3))
    assert two[[2, 1]].equal(one[[0, 2]])
    texts = found.embed_texts(TEXTS)
    found.embed_texts([*TEXTS, "new"])
    distinct = ["a small dog", "", "a red bus", "two children"]
    assert found.embedded == [3, 1, distinct, ["new"]]
    again = fake(tmp_path)
    assert again.embed_images(pictures(3, 2, 0, 3)).equal(two)
    assert again.embed_texts(TEXTS).equal(texts)
    assert again.embedded == []
    # Another model has its own.
    other = fake(tmp_path, seed=1)
    assert not other.embed_images(pictures(0, 1)).allclose(one[:2], atol=1e-3)
    assert other.embedded == [2]
    assert fake(tmp_path).embed_images(pictures(0, 1)).equal(one[:2])


@pytest.mark.parametrize("stored", [True, False])
def test_the_batch_size_is_that_of_texts_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    texts = [f"a dog {number}" for number in range(7)]
    for batch_size, expected in ((3, [1, 3, 3]), (None, [7])):
        found, batches = session(model, tmp_path / str(batch_size) if stored else None, batch_size=batch_size), []
        encoder: Any = found.encoder
        features = encoder.text_features

        def text_features(tokens: list[Any], features: Any = features, batches: list[int] = batches) -> Tensor:
            batches.append(len(tokens))
            return features(tokens)

        monkeypatch.setattr(encoder, "text_features", text_features)
        found.embed_texts(texts)
        assert sorted(batches) == expected


def test_counts_are_exact_and_stored(tmp_path: Path) -> None:
    images = pictures(*range(5))
    expected = torch.tensor([[row, LARGE + row] for row in range(5)])
    for store in (None, tmp_path, tmp_path):
        assert counts_of(fake(store), images).equal(expected)
    # Found by content, whatever the position is now.
    assert counts_of(fake(tmp_path), pictures(4, 1)).equal(expected[[4, 1]])


def test_killed_counts_go_on_whatever_was_counted_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a segmentation, whose counts take hours."""
    monkeypatch.setattr(evaluation_session, "COUNTED", 2)
    images, counted = pictures(*range(10)), []

    def noted(positions: Any, last: int | None = None) -> Iterator[Tensor]:
        for position, found in zip(positions, count(positions), strict=True):
            counted.append(position)
            yield interrupt() if position == last else found

    def measure(images: BenchmarkImages, last: int | None = None) -> Tensor:
        counting = functools.partial(noted, last=last)
        return fake(tmp_path).count_in_images("positions", images.content_keys(), counting, 2, "Counting")

    with pytest.raises(KeyboardInterrupt):
        measure(images, last=5)
    measure(pictures(20, 21))
    counted.clear()
    assert measure(images).equal(counts_of(fake(None), images))
    assert len(counted) == 6, "four of ten were stored"


@pytest.mark.parametrize("kind", ["files", "archive", "cropped"])
def test_images_whose_rows_are_stored_are_not_read_again_while_their_files_stay(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ImageNet that would be 140 GB in each process of each run."""
    paths = [write(tmp_path / f"{number}.bin", picture(8 * number)) for number in range(3)]
    sizes = [path.stat().st_size for path in paths]
    archive = write(tmp_path / "archive.bin", b"".join(path.read_bytes() for path in paths))

    def images() -> BenchmarkImages:
        if kind == "archive":
            return BenchmarkImages(
                ArchivedImages([FilePart(archive, sum(sizes[:row]), sizes[row]) for row in range(3)])
            )
        return BenchmarkImages(CroppedFiles(paths, 0) if kind == "cropped" else paths)

    hashed: list[Any] = []
    digest = table_identity._digest
    monkeypatch.setattr(table_identity, "_digest", lambda record: hashed.append(record) or digest(record))
    keys = images().content_keys()
    assert keys.tolist() == ImageList(images().images).content_keys().tolist()
    hashed.clear()
    assert images().content_keys().tolist() == keys.tolist()
    assert not hashed
    changed = archive if kind == "archive" else paths[0]
    content = archive.read_bytes() if kind == "archive" else b""
    changed.write_bytes(picture(80)[: sizes[0]].ljust(sizes[0]) + content[sizes[0] :])
    assert (images().content_keys() != keys).any(axis=1).tolist() == [True, False, False]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["images", "features"])
@pytest.mark.parametrize("damaged", [{0, 1}, {2, 3}, {0, 1, 2, 3}])
def test_a_batch_of_damaged_images_is_skipped(
    damaged: set[int], kind: str, stored: bool, model: Path, tmp_path: Path
) -> None:
    """Features before the projection are of another width than embeddings."""
    torn = [b"torn %d" % number if number in damaged else picture(number) for number in range(4)]
    images = BenchmarkImages(torn, [str(number) for number in range(4)])
    found = session(model, tmp_path if stored else None, on_error="skip")
    embeds = found.embed_images(images, kind)
    assert embeds.shape[1] == found.embed_images(pictures(1), kind).shape[1]
    assert {number for number in range(4) if embeds[number].isnan().all()} == damaged


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("stored", [False, True])
def test_broken_embeddings_are_named_and_never_skipped(
    on_error: Any, stored: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = session(model, tmp_path if stored else None, on_error=on_error)
    forward = found.encoder.forward_images

    def broken(inputs: dict[str, Tensor]) -> Tensor:
        rows = forward(inputs)
        rows[-1] = float("nan")
        return rows

    monkeypatch.setattr(found.encoder, "forward_images", broken)
    with pytest.raises(NonFiniteError, match="of 1 of 2 images are NaN or infinite: picture 1"):
        found.embed_images(pictures(0, 1))
