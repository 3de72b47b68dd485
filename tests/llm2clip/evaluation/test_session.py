"""A session computes what is not stored, whatever was interrupted before and however many processes share the work."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llm2clip.encoders.load import load_encoder
from llm2clip.evaluation import row_store
from llm2clip.evaluation.benchmarks.data import BenchmarkImages
from llm2clip.evaluation.session import Session
from llm2clip.utils.embeddings import NonFiniteError
from llm2clip.utils.processes import leave_process_group
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError
from tests.processes import run_ranks

from ..encoders.models import save_transformers

TEXTS = ["a small dog", "", "a red bus", "a small dog", "two children"]


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (20, 24 + number, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(*numbers: int) -> BenchmarkImages:
    return BenchmarkImages([picture(number) for number in numbers], [f"picture {number}" for number in numbers])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_transformers("clip", folder)
    return folder


class Counted:
    """Counts the images and texts that an encoder embeds, and can be killed."""

    def __init__(self, encoder: Any, monkeypatch: pytest.MonkeyPatch, kill_after: int | None = None) -> None:
        self.images, self.texts = 0, 0
        forward, embed = encoder.forward_images, encoder.encode_text

        def forward_images(inputs: dict[str, Tensor]) -> Tensor:
            if kill_after is not None and self.images >= kill_after:
                raise KeyboardInterrupt
            self.images += len(inputs["pixel_values"])
            return forward(inputs)

        def encode_text(texts: list[str]) -> Tensor:
            self.texts += len(texts)
            return embed(texts)

        monkeypatch.setattr(encoder, "forward_images", forward_images)
        monkeypatch.setattr(encoder, "encode_text", encode_text)


def session(model: Path, store: Path | None, **options: Any) -> Session:
    return Session(load_encoder(str(model)), store, batch_size=2, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_those_of_the_encoder_stored_or_not(model: Path, tmp_path: Path, num_workers: int) -> None:
    images = pictures(0, 1, 2, 1, 3)
    encoder = load_encoder(str(model))
    rows = [encoder.prepare(images.decode(row, row_image), "image") for row in range(5)]
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    for store in (None, tmp_path, tmp_path):
        found = session(model, store, num_workers=num_workers)
        torch.testing.assert_close(found.embed_images(images), encoder.forward_images(inputs), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            found.embed_features(images), encoder.forward_features(inputs), atol=1e-5, rtol=1e-5
        )
        projected = encoder.forward_features(inputs, projected=True)
        torch.testing.assert_close(found.embed_features(images, projected=True), projected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.embed_texts(TEXTS), encoder.encode_text(TEXTS), atol=1e-6, rtol=0)
        assert found.text_lengths(TEXTS)[0].equal(encoder.text_lengths(TEXTS)[0])
        assert found.embed_texts([]).shape == (0, encoder.width)


def row_image(value: Any, key: str, max_pixels: int) -> Any:
    return Image.open(io.BytesIO(value))


def test_rows_from_the_store_are_equal_bit_for_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(0, 1, 2, 1)
    first = session(model, tmp_path)
    fresh = first.embed_images(images), first.embed_texts(TEXTS)
    again = session(model, tmp_path)
    counted = Counted(again.encoder, monkeypatch)
    assert again.embed_images(images).equal(fresh[0])
    assert again.embed_texts(TEXTS).equal(fresh[1])
    assert (counted.images, counted.texts) == (0, 0)


@pytest.mark.parametrize("stored", [False, True])
def test_sets_share_images_and_texts_by_content(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    found = session(model, tmp_path if stored else None)
    counted = Counted(found.encoder, monkeypatch)
    one = found.embed_images(pictures(0, 1, 2))
    two = found.embed_images(pictures(3, 2, 0, 3))
    assert counted.images == 4
    assert two[[2, 1]].equal(one[[0, 2]])
    found.embed_texts(TEXTS)
    assert counted.texts == 4
    found.embed_texts([*TEXTS, "new"])
    assert counted.texts == 5


def test_a_killed_evaluation_goes_on_whatever_was_evaluated_since(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "SHARD_SIZE", 4)
    images = pictures(*range(10))
    expected = session(model, None).embed_images(images)
    killed = session(model, tmp_path)
    Counted(killed.encoder, monkeypatch, kill_after=6)
    with pytest.raises(KeyboardInterrupt):
        killed.embed_images(images)
    session(model, tmp_path).embed_images(pictures(20, 21))
    resumed = session(model, tmp_path)
    counted = Counted(resumed.encoder, monkeypatch)
    assert resumed.embed_images(images).equal(expected)
    assert counted.images == 6


# Above 2**24, float32 has no odd numbers.
LARGE = 2**24 + 1


def count(positions: Any) -> Any:
    """Two counts of an image: its position, and a number that float32 cannot hold."""
    for position in positions:
        yield torch.tensor([position, LARGE + position])


def counts_of(one: Session, images: BenchmarkImages) -> Tensor:
    return one.count_in_images("positions", [], images.content_keys(), 2, count, "Counting")


def test_counts_are_exact_and_stored(model: Path, tmp_path: Path) -> None:
    images = pictures(*range(5))
    expected = torch.tensor([[row, LARGE + row] for row in range(5)])
    for store in (None, tmp_path, tmp_path):
        assert counts_of(session(model, store), images).equal(expected)
    # Found by content, whatever the position is now.
    assert counts_of(session(model, tmp_path), pictures(4, 1)).equal(expected[[4, 1]])


def test_texts_come_in_parts_and_are_computed_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session(model, None).embed_texts(TEXTS)
    found = session(model, tmp_path)
    counted = Counted(found.encoder, monkeypatch)
    parts = found.embed_text_parts(TEXTS, 2)
    first = next(parts)
    assert counted.texts == 4
    assert [len(part) for part in (first, *parts)] == [2, 2, 1]
    whole = torch.cat([*found.embed_text_parts(TEXTS, 2)])
    assert whole.equal(found.embed_texts(TEXTS))
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
    monkeypatch.setattr("llm2clip.evaluation.session.TEXTS", 2)
    lengths, is_cut = found.text_lengths(TEXTS)
    assert (lengths.tolist(), is_cut.tolist()) == tuple(value.tolist() for value in found.encoder.text_lengths(TEXTS))


def test_another_model_has_its_own_rows(model: Path, tmp_path: Path) -> None:
    images = pictures(0, 1)
    before = session(model, tmp_path / "store").embed_images(images)
    changed = load_encoder(str(model))
    changed.model.visual_projection.weight.data[0] += 1
    changed.model.save_pretrained(tmp_path / "model")
    changed.tokenizer.save_pretrained(tmp_path / "model")
    changed.transform.image_processor.save_pretrained(tmp_path / "model")
    after = session(tmp_path / "model", tmp_path / "store").embed_images(images)
    assert not after.allclose(before, atol=1e-3)
    assert session(model, tmp_path / "store").embed_images(images).equal(before)


def test_the_text_format_changes_every_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = session(model, tmp_path)
    dotted = session(model, tmp_path, text_format=lambda text: text.replace("dog", "bus"))
    plain.embed_texts(["a small dog", "a red bus"])
    counted = Counted(dotted.encoder, monkeypatch)
    found = dotted.embed_texts(["a small dog", "a red bus"])
    assert counted.texts == 1
    torch.testing.assert_close(found, plain.embed_texts(["a small bus", "a red bus"]), atol=1e-6, rtol=0)
    assert dotted.text_lengths(["a dogdog"])[0].equal(plain.text_lengths(["a busbus"])[0])


def test_broken_images_and_embeddings_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = session(model, None)
    damaged = BenchmarkImages([picture(0), picture(1)[:60]], ["good", "cut short"])
    with pytest.raises(DamagedImageError, match="The image 'cut short' cannot be used"):
        found.embed_images(damaged)
    forward = found.encoder.forward_images

    def broken(inputs: dict[str, Tensor]) -> Tensor:
        rows = forward(inputs)
        rows[-1] = float("nan")
        return rows

    monkeypatch.setattr(found.encoder, "forward_images", broken)
    with pytest.raises(NonFiniteError, match="of 1 of 2 images are NaN or infinite: picture 1"):
        found.embed_images(pictures(0, 1))


@pytest.mark.slow
def test_two_processes_get_the_rows_of_one(model: Path, tmp_path: Path) -> None:
    run_ranks(["-m", "tests.llm2clip.evaluation.test_session", str(model), str(tmp_path)], 2)
    images = pictures(*range(7))
    one = session(model, None)
    expected = {"images": one.embed_images(images), "texts": one.embed_texts(TEXTS)}
    expected["features"] = one.embed_features(pictures(0))
    for rank in range(2):
        for kind in ("memory", "stored", "again"):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)
            for name, rows in expected.items():
                torch.testing.assert_close(found[name], rows, atol=1e-6, rtol=0)
            assert found["counts"].equal(torch.tensor([[row, LARGE + row] for row in range(7)]))
            assert found["computed"] == {"memory": [3, 4][rank], "stored": [4, 3][rank], "again": 0}[kind]


def main(model: Path, folder: Path) -> None:
    """Embed in memory, into a store, and from it, and save what this process gets."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for kind, store in (("memory", None), ("stored", folder / "store"), ("again", folder / "store")):
            one = session(model, store)
            counted = Counted(one.encoder, monkeypatch)
            rows = {"images": one.embed_images(pictures(*range(7))), "texts": one.embed_texts(TEXTS)}
            rows["features"] = one.embed_features(pictures(0))  # one row for two processes
            rows["counts"] = counts_of(one, pictures(*range(7)))
            rank = torch.distributed.get_rank()
            torch.save({**rows, "computed": counted.images}, folder / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_process_group()
