"""Images of every kind are decoded to upright RGB, or refused by their key."""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError, decode_image
from tests.llm2clip.data.conftest import png
from tests.pictures import encode, noise


def test_all_types_of_image_values_decode_to_the_same_pixels(tmp_path: Path) -> None:
    data, file = png(7), tmp_path / "a.png"
    file.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    records = [{"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": str(file)}]
    for value in (data, bytearray(data), str(file), file, file.as_uri(), Image.open(file), *records):
        image = decode_image(value, "key")
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def _header_bomb() -> bytes:
    data = bytearray(png(1))
    data[16:24] = (200_000).to_bytes(4, "big") * 2  # width and height in the PNG header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "zero bytes"),
        (b"this is not an image", "does not recognize its format"),
        (encode(noise(), "JPEG")[:300], "[Tt]runcated"),
        ({"bytes": None, "path": None}, "missing"),
        ("/no/such/file.png", "'/no/such/file.png' does not exist"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (_header_bomb(), "200000 x 200000 pixels|DecompressionBomb"),
        (encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "no defined white point"),
        (3.5, "TypeError"),
    ],
)
def test_errors_for_damaged_images_name_the_key(value: Any, reason: str) -> None:
    with pytest.raises(DamagedImageError, match=f"image 'row-9' cannot be used: .*({reason})") as caught:
        decode_image(value, "row-9")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.key, again.reason) == (str(caught.value), "row-9", caught.value.reason)


def test_max_pixels_is_checked_before_decoding() -> None:
    data = png(1, (50, 40))
    assert decode_image(data, "k", max_pixels=2000).size == (50, 40)
    with pytest.raises(DamagedImageError, match=r"50 x 40 pixels exceed max_pixels \(1,999\)"):
        decode_image(data[:60], "k", max_pixels=1999)  # decoding these bytes would raise another error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DamagedImageError, match="exceed max_pixels"):
            decode_image(Image.new("1", (10_000, 10_000)), "k")


def test_transparency_is_composited_on_white() -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for encoded in (encode(image), encode(image, "WEBP", lossless=True), encode(image.quantize())):
        assert [decode_image(encoded, "k").getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert decode_image(encode(Image.new("LA", (1, 1), (0, 128))), "k").getpixel((0, 0)) == (127, 127, 127)
    keyed = encode(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
    assert decode_image(keyed, "k").getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_are_converted_to_rgb_with_their_values() -> None:
    def first(image: Image.Image, kind: str = "PNG") -> Any:
        return decode_image(encode(image, kind), "k").getpixel((0, 0))

    palette = noise().quantize(16)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(palette), "k")), np.asarray(palette.convert("RGB")))
    assert first(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert first(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF") == (255, 0, 0)
    assert first(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    sixteen = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert [decode_image(encode(sixteen), "k").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_exif_orientation_is_applied() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(noise(), "PNG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(np.asarray(decode_image(data, "k")), np.asarray(expected))


def test_servers_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(request: Any, timeout: float | None) -> Any:
        raise TimeoutError(f"timed out after {timeout}")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DamagedImageError, match="timed out after 60"):
        decode_image("http://127.0.0.1/a.png", "k")


@pytest.mark.parametrize("block", [b"not a TIFF file", b"II*\x00\xff\xff"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_an_image_with_broken_exif_is_upright(kind: str, block: bytes) -> None:
    # With the beginning of a TIFF file whose tags are missing, Pillow fails elsewhere.
    data = encode(noise(), kind, exif=b"Exif\x00\x00" + block)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(data, "k")), expected)
