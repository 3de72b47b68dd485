"""The prompt in the tokenizer, and the processor."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llm2clip.models.prompting import with_prompt
from modeling_llm2clip import LLM2CLIPProcessor, with_pillow
from tests.builders import tiny

LONG = "several boats are tied to a wooden pier while the sun sets behind them " * 8


def expected_ids(text: str) -> list[int]:
    plain = tiny.plain_tokenizer()
    pieces = [plain(part, add_special_tokens=False)["input_ids"] for part in (tiny.PREFIX, text, tiny.SUFFIX)]
    return [plain.bos_token_id, *chain.from_iterable(pieces)]


def test_tokenizer_and_processor_give_equal_ids_before_and_after_saving(tmp_path: Path) -> None:
    processor = tiny.processor()
    processor.save_pretrained(tmp_path)
    text = "a small brown dog"
    expected = expected_ids(text)
    assert processor.tokenizer(text)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected
    assert processor(text=[text], return_tensors="pt")["input_ids"][0].tolist() == expected
    assert AutoProcessor.from_pretrained(tmp_path)(text=[text])["input_ids"][0] == expected
    # Special tokens in captions are plain text; that of the prompt remains special.
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("hi <|eot_id|> there")["input_ids"]
        assert (ids.count(424), ids[-1]) == (1, 424)


def test_truncation_shortens_only_the_caption() -> None:
    tokenizer, _ = with_prompt(tiny.plain_tokenizer(), tiny.PREFIX, tiny.SUFFIX, max_length=20)
    whole = expected_ids(LONG)
    assert tokenizer(LONG, truncation=True)["input_ids"] == [*whole[:19], whole[-1]]
    with pytest.raises(ValueError, match="max_length 6 leaves none for captions"):
        with_prompt(tiny.plain_tokenizer(), tiny.PREFIX, tiny.SUFFIX, max_length=6)


def test_truncated_captions_are_counted_in_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers_logging.get_logger("modeling_llm2clip"), "propagate", True)
    processor, model = tiny.processor(), tiny.joint_model()
    processor(text=["a dog", LONG, LONG], return_tensors="pt")
    processor(text=["a dog", LONG], text_kwargs={"max_length": 32}, common_kwargs={"return_tensors": "pt"})
    for cut in ("2 of 3 captions were cut at 64", "1 of 2 captions were cut at 32"):
        assert cut in caplog.text
    caplog.clear()
    processor(text=["a dog", "a cat"], return_tensors="pt")
    whole = processor(text=["a dog", LONG], truncation=False, return_tensors="pt")
    assert whole["input_ids"].shape[1] > 64
    assert "cut" not in caplog.text
    transformers_logging.warning_once.cache_clear()
    for _ in range(3):
        model.encode_text(["a dog", LONG], processor)
    assert caplog.text.count("captions longer than 64 tokens are cut") == 1


def test_columns_of_datasets_are_lists() -> None:
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"caption": ["a dog", "a cat"], "image": tiny.IMAGES}, features)
    processor = tiny.processor()
    batch = processor(text=table["caption"], images=table["image"], return_tensors="pt")
    expected = processor(text=list(table["caption"]), images=list(table["image"]), return_tensors="pt")
    assert all(batch[name].equal(expected[name]) for name in expected)
    assert tiny.joint_model().encode_image(table["image"], processor).shape == (2, 24)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a dog", "  \n"], ValueError, "caption 1 is empty"),
        ([Image.new("RGB", (4, 4))], TypeError, "item 0 is a PIL.Image.Image"),
        (Image.new("RGB", (4, 4)), TypeError, "images go to images="),
        ([], ValueError, "list of captions is empty"),
    ],
    ids=["blank", "images", "image", "none"],
)
def test_invalid_captions_raise_an_error_that_names_them(texts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.processor()(text=texts)
    with pytest.raises(FileNotFoundError, match="if it is a caption, pass it to text="):
        tiny.processor()("a dog")
    with pytest.raises(FileNotFoundError, match=r"no/such.jpg.* pass it to encode_text"):
        tiny.joint_model().encode_image(["no/such.jpg"], tiny.processor())


def test_outer_white_space_of_captions_never_reaches_the_model(tmp_path: Path) -> None:
    """The tokenizer strips what str.strip() does, also after a reload."""
    spaces = "".join(filter(str.isspace, map(chr, range(0x3001))))
    processor = tiny.processor()
    processor.save_pretrained(tmp_path)
    for text in ("a small brown dog", "two  blanks\n\nand  lines"):
        expected = expected_ids(text)
        for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            for space in [spaces, *spaces]:
                assert tokenizer(f"{space}{text}{space}")["input_ids"] == expected, repr(space)


def test_tokenizers_with_white_space_tokens_leave_stripping_to_the_processor() -> None:
    """Such tokens split a caption before normalization, so that a normalizer would strip inner white space too."""
    plain = tiny.plain_tokenizer()
    plain.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer, _ = with_prompt(plain)
    ids = tokenizer("a dog \n\n a cat")["input_ids"]
    assert ids[1:] == plain("a dog \n\n a cat", add_special_tokens=False)["input_ids"]
    processor = LLM2CLIPProcessor(tiny.processor().image_processor, tokenizer)
    assert processor(text=["a dog\n\n"])["input_ids"][0] == tokenizer("a dog")["input_ids"]


def test_images_are_resized_as_in_the_original(tmp_path: Path) -> None:
    """With Pillow, bicubic and antialiased; torchvision, which transformers 5 prefers, differs in most pixels."""
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    settings = tiny.processor().image_processor.to_dict()
    steps = [v2.Resize(28, v2.InterpolationMode.BICUBIC), v2.CenterCrop(28), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(settings["image_mean"], settings["image_std"])]
    expected = v2.Compose(steps)(image)[None]
    tiny.processor().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path), with_pillow(AutoImageProcessor.from_pretrained(tmp_path))
    for processor in (tiny.processor(), *loaded):
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    # transformers 4.57 resizes with Pillow under this name, and with torchvision under that with the suffix Fast.
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "CLIPImageProcessor"
