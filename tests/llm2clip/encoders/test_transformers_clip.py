"""Models of transformers: features, lengths, identity, and what is refused; test_families.py has their embeddings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from torch.nn.functional import normalize
from transformers import AutoProcessor, BertConfig, BertModel

from llm2clip.data import decode_image
from llm2clip.encoders.load import TransformersEncoder, load_encoder
from llm2clip.encoders.patches import patch_embeddings
from modeling_llm2clip import with_pillow
from tests.loopback_hub import TOKEN, LoopbackHub

from .models import IMAGES, LENGTH, TEXTS, save_transformers, stacked

Opened = tuple[Any, Any, TransformersEncoder]


@pytest.fixture(scope="module", params=["chinese_clip", "clip", "siglip", "siglip2"])
def opened(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_transformers(request.param, folder)
    encoder = load_encoder(str(folder))
    assert isinstance(encoder, TransformersEncoder)
    return model, AutoProcessor.from_pretrained(folder), encoder


@torch.no_grad()
def test_images_are_those_of_a_direct_call(opened: Opened) -> None:
    model, processor, encoder = opened
    upright = [decode_image(image) for image in IMAGES]
    inputs = with_pillow(processor.image_processor)(upright, return_tensors="pt")
    output = model.get_image_features(**inputs).pooler_output
    # A worker process has a copy without the model.
    worker: Any = pickle.loads(pickle.dumps(encoder))
    assert worker.model is None
    found = stacked(worker, IMAGES)
    torch.testing.assert_close(encoder.forward_images(found), normalize(output, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.image_features(found), output, atol=1e-5, rtol=1e-5)
    pooled = model.vision_model(**inputs).pooler_output
    torch.testing.assert_close(encoder.forward_features(found), pooled, atol=1e-5, rtol=1e-5)


def test_lengths_are_counted_before_texts_are_cut(opened: Opened) -> None:
    lengths, cut = opened[2].text_lengths(TEXTS)
    assert lengths.tolist() == [len(text.encode()) + 2 for text in TEXTS]
    assert cut.tolist() == [length > LENGTH for length in lengths.tolist()]


def test_pixels_of_any_size_are_normalised(opened: Opened) -> None:
    _, processor, encoder = opened
    image = IMAGES[0].crop((0, 0, 28, 28))
    settings = processor.image_processor.to_dict()
    scaled = torch.tensor(list(image.tobytes())).view(28, 28, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    torch.testing.assert_close(encoder.prepare_pixels(image)["pixel_values"], (scaled - mean) / std)
    pixels = encoder.prepare_pixels(IMAGES[0])["pixel_values"][None]
    assert pixels.shape == (1, 3, 30, 40)
    patches = encoder.forward_patches({"pixel_values": pixels})
    torch.testing.assert_close(patches, patch_embeddings(encoder.model, pixels, values_only=True))


def test_the_fingerprint_depends_on_weights_and_preprocessing(tmp_path: Path) -> None:
    model = save_transformers("clip", tmp_path)
    encoder = load_encoder(str(tmp_path))
    expected = {"library": encoder.library, "name": str(tmp_path), "dtype": "float32"}
    assert encoder.identity() == {**expected, "fingerprint": encoder.fingerprint()}
    assert encoder.fingerprint() == load_encoder(str(tmp_path)).fingerprint()
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    other = TransformersEncoder("a", model, processor, torch.device("cpu"))
    model.text_projection.weight.data[3, 4] += 1
    model.save_pretrained(tmp_path)
    changed = load_encoder(str(tmp_path))
    assert len({encoder.fingerprint(), other.fingerprint(), changed.fingerprint()}) == 3


@pytest.mark.parametrize("subfolder", ["0_CLIPModel", ""])
def test_a_clip_of_sentence_transformers_is_that_of_transformers_in_its_subfolder(
    subfolder: str, tmp_path: Path, hub: LoopbackHub
) -> None:
    save_transformers("clip", tmp_path / "st" / subfolder)
    modules = [{"idx": 0, "name": "0", "path": subfolder, "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    encoder, expected = load_encoder(str(tmp_path / "st")), load_encoder(str(tmp_path / "st" / subfolder))
    assert encoder.encode_text(TEXTS).equal(expected.encode_text(TEXTS))
    assert encoder.encode_image(IMAGES).equal(expected.encode_image(IMAGES))
    assert encoder.fingerprint() == expected.fingerprint()
    api = HfApi(token=TOKEN)
    api.create_repo("tester/st")
    api.upload_folder(repo_id="tester/st", folder_path=tmp_path / "st")
    published = load_encoder("tester/st")
    assert published.encode_text(TEXTS).equal(expected.encode_text(TEXTS))
    assert published.commit == api.model_info("tester/st").sha


def test_other_models_and_random_weights_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertModel has no get_text"):
        load_encoder(str(tmp_path / "bert"))
    model = save_transformers("clip", tmp_path / "clip")
    state = {name: value for name, value in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path / "clip", state_dict=state)
    with pytest.raises(ValueError, match=r"visual_projection\.weight would be initialized randomly"):
        load_encoder(str(tmp_path / "clip"))
