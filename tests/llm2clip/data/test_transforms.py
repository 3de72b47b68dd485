from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, SiglipImageProcessor, ViTImageProcessor

from llm2clip.data import DamagedImageError, EvalTransform, TrainTransform, decode_image
from llm2clip.data.transforms import decode_tensor
from tests.golden import load_golden
from tests.pictures import encode, noise

from .conftest import SIZE

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]


def _photo(width: int, height: int, number: int = 0, **options: Any) -> bytes:
    return encode(PHOTOS[number].resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=90, **options)


@pytest.mark.parametrize("image_processor", [CLIPImageProcessor(), CLIPImageProcessorPil(do_center_crop=False)])
def test_too_narrow_image_raises_before_resizing(image_processor: Any) -> None:
    strip = Image.new("RGB", (3000, 1))
    with pytest.raises(DamagedImageError, match=r"image 'row-9' .* 3000 x 1 pixels .* would be 224 x 672000"):
        EvalTransform(image_processor)(strip, "row-9")
    # Not for crops of limited aspect ratio, nor for a processor that resizes to a square.
    assert TrainTransform(CLIPImageProcessor())(strip, 0).shape == (3, 224, 224)
    assert EvalTransform(ViTImageProcessor())(strip).shape == (3, 224, 224)


def test_the_image_processor_is_called() -> None:
    other = SiglipImageProcessor(size={"height": 32, "width": 48})
    for image_processor in (other, CLIPImageProcessor(), CLIPImageProcessorPil(size={"shortest_edge": 300})):
        expected = torch.as_tensor(image_processor(noise(), return_tensors="pt")["pixel_values"][0])
        torch.testing.assert_close(EvalTransform(image_processor)(noise()), expected)
    with pytest.raises(ValueError, match=r"the image processor is a SiglipImageProcessor.*use exact"):
        EvalTransform(other, "fast")
    with pytest.raises(ValueError, match="exact, fast, not 'quick'"):
        EvalTransform(CLIPImageProcessor(), "quick")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CLIPImageProcessor, CLIPImageProcessorPil])
@pytest.mark.parametrize("size", [(500, 374), (741, 1002), (1500, 998)])
def test_fast_backend_is_within_two_grey_levels_on_photographs(kind: Any, size: tuple[int, int]) -> None:
    image_processor = kind(size={"shortest_edge": 336}, crop_size=336)
    exact, fast = EvalTransform(image_processor), EvalTransform(image_processor, "fast")
    grey_level = 1 / 255 / min(image_processor.image_std)
    for options in ({}, {"number": 1}, {"subsampling": 0}, {"progressive": True}):
        data = _photo(*size, **options)
        difference = (exact(exact.decode(data, "k")) - fast(fast.decode(data, "k"))).abs()
        assert difference.max() <= 2.01 * grey_level
        assert difference.mean() <= 0.1 * grey_level
    training = TrainTransform(image_processor, scale=(0.5, 1.0))
    slow, quick = (training(transform.decode(_photo(*size), "k"), 3) for transform in (exact, fast))
    assert (slow - quick).abs().max() <= 2.01 * grey_level


def test_decode_tensor_equals_decode_image_for_formats_modes_and_errors() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [_photo(80, 60), _photo(80, 60, exif=exif), encode(noise(), "JPEG", exif=b"Exif\x00\x00not a TIFF file")]
    images += [encode(PHOTOS[0].convert(mode), "JPEG") for mode in ("L", "CMYK")]
    for data in (*images, encode(noise()), encode(noise().quantize(16)), PHOTOS[0]):
        pixels = decode_tensor(data, "k")
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(decode_image(data, "k")))
    for data in (b"no image", _photo(80, 60)[:900], _photo(80, 60)[:-700], None):
        with pytest.raises(DamagedImageError, match="image 'row-9' cannot be used"):
            decode_tensor(data, "row-9")
    with pytest.raises(DamagedImageError, match=r"80 x 60 pixels exceed max_pixels \(4,799\)"):
        decode_tensor(_photo(80, 60), "k", max_pixels=4799)


def test_crop_depends_only_on_the_seed(image_processor: CLIPImageProcessorPil) -> None:
    transform = TrainTransform(image_processor, scale=(0.3, 1.0))
    state = torch.get_rng_state()
    first = transform(noise(), 5)
    torch.rand(3)
    assert torch.equal(first, transform(noise(), 5))
    assert not torch.equal(first, transform(noise(), 6))
    torch.set_rng_state(state)
    transform(noise(), 5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, pickle.loads(pickle.dumps(transform))(noise(), 5))


def test_crop_has_the_published_scale_and_ratio(image_processor: CLIPImageProcessorPil) -> None:
    image = noise(90, 120)
    torch.manual_seed(11)
    top, left, height, width = RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    crop = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    torch.testing.assert_close(TrainTransform(image_processor)(image, 11), (expected - mean) / std)


def test_a_processor_without_a_fixed_size_cannot_train() -> None:
    with pytest.raises(ValueError, match="no fixed size"):
        TrainTransform(CLIPImageProcessorPil(do_center_crop=False))
    with pytest.raises(ValueError, match="crop scale"):
        TrainTransform(CLIPImageProcessorPil(), scale=(0.0, 1.0))
    siglip = SiglipImageProcessor(size={"height": 32, "width": 48})
    assert TrainTransform(siglip)(noise(), 0).shape == (3, 32, 48)


# The original rounds the offset of the centre crop half to even, as torchvision does; CLIPImageProcessor rounds down.
MOVED_CROPS = {"rgb_odd_56x59": (2, 0), "rgb_wide_211x37": (0, 132)}


@pytest.mark.parametrize("name", ["preprocess_a", "preprocess_b"])
def test_pixels_equal_the_original(name: str) -> None:
    """With Pillow's resizing; where the crop is at another place, the picture around it is compared at that place."""
    golden = load_golden(name)
    assert golden.meta["cases"]
    for case in golden.meta["cases"]:
        tag, size = case["tag"], case["size"]
        mean, std = (case.get(key, golden.meta[key]) for key in ("mean", "std"))
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=mean, image_std=std
        )
        image = Image.fromarray(golden[f"in/{tag}/image"].numpy(), case["mode"])
        if tag in MOVED_CROPS:
            top, left = MOVED_CROPS[tag]
            resized = F.resize(image, [size], InterpolationMode.BICUBIC)
            image = F.crop(resized, top, left, size, size)
        if case.get("is_train"):  # the sampled crop is the whole image
            width, height = image.size
            pixels = TrainTransform(processor, (1, 1), (width / height, width / height))(image, 0)
        else:
            pixels = EvalTransform(processor)(decode_image(image, tag))
        levels = golden[f"out/{tag}/levels"] if name == "preprocess_b" else golden[f"out/{tag}/levels_every_4th"]
        step = size // levels.shape[1]
        expected = (levels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(pixels[:, ::step, ::step], expected, atol=2e-6, rtol=0, msg=lambda m, t=tag: t + m)
