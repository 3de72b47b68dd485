"""Image files that image decoders often treat differently."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIDE = 28


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Return a picture without symmetry."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    channels = [255 * x, 255 * y, 127 + 127 * np.sin(9 * x + 4 * y * y)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    alpha = np.linspace(0, 255, image.width * image.height).astype(np.uint8)
    image.putalpha(Image.fromarray(alpha.reshape(image.height, image.width)))
    return image


def turned(orientation: int) -> tuple[Image.Image, dict[str, Any]]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(48, 36), {"exif": exif, "quality": 95}


def awkward_images() -> dict[str, bytes]:
    """Return 31 encoded images by file name."""
    plain, alpha = picture(), with_alpha(picture(40, 32))
    sixteen = Image.fromarray((np.asarray(picture(40, 32).convert("L")).astype(np.uint16) << 8) + 77)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    frames = {"save_all": True, "append_images": [Image.new("RGB", plain.size, "red")], "duration": 50}
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "alpha.png": (alpha, {}),
        "alpha.webp": (alpha, {"lossless": True}),
        "alpha_grey.png": (alpha.convert("LA"), {}),
        "animation.gif": (plain.quantize(64), {**frames, "append_images": [plain.rotate(180).quantize(64)]}),
        "animation.webp": (plain, {**frames, "lossless": True}),
        "bitmap.bmp": (picture(40, 32), {}),
        "bits.png": (picture(40, 32).convert("1"), {}),
        "cmyk.jpg": (picture(40, 32).convert("CMYK"), {}),
        "cmyk.tiff": (picture(40, 32).convert("CMYK"), {}),
        "compressed.tiff": (picture(40, 32), {"compression": "tiff_lzw"}),
        "grey.jpg": (plain.convert("L"), {}),
        "keyed.png": (picture(40, 32), {"transparency": picture(40, 32).getpixel((20, 20))}),
        "long.png": (picture(300, 12), {}),
        "narrow.jpg": (picture(12, 300), {}),
        "palette.png": (picture(40, 32).quantize(32), {}),
        "palette_alpha.png": (alpha.quantize(32), {}),
        "plain.png": (plain, {}),
        "progressive.jpg": (picture(64, 50), {"progressive": True}),
        "profile.jpg": (picture(40, 32), {"icc_profile": profile}),
        "single.png": (picture(1, 1), {}),
        "sixteen.png": (sixteen, {}),
        "sixteen.tiff": (sixteen, {}),
        "subsampled.jpg": (picture(41, 33), {"subsampling": 2, "quality": 60}),
        **{f"turned_{orientation}.jpg": turned(orientation) for orientation in range(2, 9)},
        "turned_alpha.png": (alpha, {"exif": turned(6)[1]["exif"]}),
    }
    encoded = {}
    for name, (image, options) in files.items():
        file = io.BytesIO()
        kind = {"jpg": "jpeg"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        image.save(file, kind, **options)
        encoded[name] = file.getvalue()
    return dict(sorted(encoded.items()))


def write(folder: Path) -> list[Path]:
    """Write the files to a folder and return their sorted paths."""
    folder.mkdir(exist_ok=True)
    for name, data in awkward_images().items():
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())
