"""`llm2clip merge`: weights between two models, and what cannot be merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import llm2clip
from llm2clip.files.manifests import damage
from llm2clip.hub.cards.card import read_card
from llm2clip.hub.licenses import TERMS
from llm2clip.hub.merge import interpolate
from llm2clip.models.towers import open_text_tower, save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.builders import small_runs as stages
from tests.builders import tiny


def changed(model: Any, seed: int = 1) -> Any:
    """Add noise to the weights of a model, except those of a joint model's LLM."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("text_model."):
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def save_changed(source: Path, folder: Path, **options: Any) -> Path:
    """Save a joint model with other weights but the same LLM."""
    model = changed(LLM2CLIPModel.from_pretrained(source, **options))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two joint models that refer to one LLM."""
    tiny.save_apart(tmp_path)
    return tmp_path / "clip", save_changed(tmp_path / "clip", tmp_path / "tuned", text_model=False)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return ((1 - alpha) * first.double() + alpha * second.double()).to(second.dtype)


def assert_between(
    found: Path,
    first: dict[str, Tensor],
    second: Path,
    alpha: float,
    mixed: Callable[[str], bool] = lambda name: not name.startswith("text_model."),
) -> None:
    """Check that the mixed weights lie between those of two models, and that the others are those of the second."""
    two = weights(second)
    for name, weight in weights(found).items():
        assert weight.equal(between(first[name], two[name], alpha) if mixed(name) else two[name]), name


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that two models have the same weights, bit for bit."""
    assert actual.keys() == expected.keys()
    assert not [name for name, weight in expected.items() if weight_bits(actual[name]) != weight_bits(weight)]


def weight_bits(weight: Tensor) -> bytes:
    return weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_ends_of_the_line_are_the_models_bit_for_bit_and_tied_weights_are_mixed_once() -> None:
    first, second = torch.tensor([1.0, -0.0, 2.0]), torch.tensor([3.0, 0.0, float("inf")])
    for alpha, end in ((0, first), (0.0, first), (1.0, second)):
        model = torch.nn.ParameterDict({"x": second.clone()})
        model["tied"] = model["x"]
        interpolate(model, {"x": first, "tied": first}, alpha)
        assert weight_bits(model["x"].data) == weight_bits(end)
    model["x"].data = second
    interpolate(model, {"x": first, "tied": first}, 0.25)
    assert model["x"][0] == 1.5


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_two_models_are_merged_into_a_folder_for_the_hub(
    alpha: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = pair
    out = tmp_path / "out"
    assert llm2clip.merge_models(first, second, out, alpha) == {"written": str(out), "alpha": alpha}
    one, two = weights(first), weights(second)
    assert weights(out).keys() == one.keys()
    assert_between(out, one, second, alpha)
    if alpha in (0, 1):
        assert_same(weights(out), two if alpha else one)
    assert weight_bits(one["logit_scale"]) != weight_bits(two["logit_scale"])
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.text_model_name_or_path == str(tmp_path / "llm")
    assert model.config.text_model_fingerprint == LLM2CLIPTextModel.from_pretrained(tmp_path / "llm").fingerprint()
    assert model.encode_text(tiny.CAPTIONS, processor).shape == (3, 24)
    assert damage(out) is None
    text = read_card(out)[1]
    assert f"the weights are {1 - alpha:g} × A + {alpha:g} × B" in text
    assert "where A is clip and B is tuned. Both have the same LLM." in text
    assert str(tmp_path) not in text.replace(str(out), "")


def test_gated_heads_and_statistics_are_merged_and_a_bundled_llm_stays(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        model = changed(tiny.joint_model(**tiny.FROZEN_TOWER), 0)
        if name == "b":
            model = changed(LLM2CLIPModel.from_pretrained(tmp_path / "a"))
        buffers = "visual_standardization.mean", "visual_standardization.std", "text_adapter.center"
        for value, buffer in enumerate(buffers):
            model.get_buffer(buffer).fill_(1.0 + value + number)
        model.save_pretrained(tmp_path / name)
        tiny.processor().save_pretrained(tmp_path / name)
    llm2clip.merge_models(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.25)
    assert_between(tmp_path / "out", weights(tmp_path / "a"), tmp_path / "b", 0.25)
    found = weights(tmp_path / "out")
    assert {name.split(".")[0] for name in found} >= {"visual_standardization", "visual_projection", "text_adapter"}
    assert found["text_adapter.center"].unique().tolist() == [3.25]
    assert LLM2CLIPModel.from_pretrained(tmp_path / "out").config.text_model_name_or_path is None


@pytest.mark.parametrize("kind", ["tower", "half"])
def test_of_a_vision_tower_only_the_trunk_is_merged(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    if kind == "tower":
        first = tmp_path / "vision"  # what both were trained from
        tower = {f"vision_model.{name}": weight for name, weight in weights(first).items()}
    else:
        tower = weights(first)
    if kind == "half":
        LLM2CLIPVisionModelWithProjection.from_pretrained(first).save_pretrained(tmp_path / "half")
        first = tmp_path / "half"
    llm2clip.merge_models(first, second, tmp_path / "out", 0.75)
    assert_between(tmp_path / "out", tower, second, 0.75, lambda name: name.startswith("vision_model."))
    assert "Beside the vision tower, everything is that of B." in read_card(tmp_path / "out")[1]


def test_widths_of_the_heads_of_others_are_no_difference_of_vision_towers(tmp_path: Path) -> None:
    """A CLIP tower has the width of its own projection in its config."""
    vision = tiny.other_vision_config("clip_vision_model")
    model = tiny.save(tmp_path / "b", vision=vision)
    model.vision_model.config.projection_dim = 16
    changed(model.vision_model).save_pretrained(tmp_path / "a")
    llm2clip.merge_models(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    tower = {f"vision_model.{name}": weight for name, weight in model.vision_model.state_dict().items()}
    assert_between(tmp_path / "out", tower, tmp_path / "b", 0.5, lambda name: name.startswith("vision_model."))


@pytest.fixture
def towers(tmp_path: Path) -> tuple[str, Path]:
    """A plain LLM, and a text tower that was trained from it."""
    llm = stages.save_llm(tmp_path / "llm-of-tower")
    prompt = {"prompt_prefix": tiny.PREFIX, "prompt_suffix": tiny.SUFFIX, "max_text_length": 64}
    tower, tokenizer = open_text_tower(llm, **prompt)
    save_text_tower(changed(tower), tokenizer, tmp_path / "tower")
    return llm, tmp_path / "tower"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_text_tower_is_merged_with_the_raw_weights_of_its_llm(
    alpha: float, towers: tuple[str, Path], tmp_path: Path
) -> None:
    llm, tower = towers
    llm2clip.merge_models(llm, tower, tmp_path / "out", alpha)
    raw = open_text_tower(llm)[0].state_dict()
    trained = LLM2CLIPTextModel.from_pretrained(tower)
    merged, tokenizer = open_text_tower(str(tmp_path / "out"))
    for name, weight in merged.state_dict().items():
        assert weight.equal(between(raw[name], trained.state_dict()[name], alpha)), name
    assert merged.config.fingerprint == merged.fingerprint()
    assert (merged.config.fingerprint == trained.config.fingerprint) == (alpha == 1)
    assert merged.config.prompt_prefix == tiny.PREFIX
    assert merged.encode(tiny.CAPTIONS, tokenizer).shape == (3, tiny.HIDDEN)


@pytest.mark.usefixtures("unchecked")
def test_a_merge_has_the_license_and_the_notice_of_its_models(towers: tuple[str, Path], tmp_path: Path) -> None:
    llm = Path(towers[0]).rename(tmp_path / "Llama-3.2-1B")
    (towers[1] / "README.md").write_text("---\nlicense: llama3.2\n---\nA tower.\n")
    (towers[1] / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    out = tmp_path / "Llama-out"
    for folder in (out, tmp_path / "Llama-built"):  # and of what is built from it
        if folder == out:
            llm2clip.merge_models(llm, towers[1], out)
        else:
            llm2clip.build_folder(out, folder)
        data, text = read_card(folder)
        assert (data["license"], "**Built with Llama**" in text) == ("llama3.2", True)
        assert (folder / "LICENSE").read_text() == "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"
        assert (folder / "LICENSE-CODE").read_text().lstrip().startswith("Apache License")
        assert (folder / "NOTICE").read_text() == TERMS["llama3.2"].notice + "\n"
    # For models that ask for different ones, the card states none, and a build asks.
    (towers[1] / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nA tower.\n")
    llm2clip.merge_models(llm, towers[1], tmp_path / "both")
    assert "license" not in read_card(tmp_path / "both")[0]
    assert not (tmp_path / "both" / "LICENSE").exists()
    with pytest.raises(
        ValueError, match=r"made from Llama-3\.2-1B \(llama3\.2\) and tower \(cc-by-nc-4\.0\), so that"
    ):
        llm2clip.build_folder(tmp_path / "both", tmp_path / "never")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_model_in_16_bit_and_one_in_32_are_both_ends(alpha: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    half = save_changed(second, tmp_path / "half", text_model=False, dtype=torch.bfloat16)
    llm2clip.merge_models(first, half, tmp_path / "out", alpha)
    expected = weights(half if alpha else first)
    assert_same(weights(tmp_path / "out"), {name: weight.float() for name, weight in expected.items()})


def refused(message: str, first: Any, second: Any, folder: Path, **settings: Any) -> None:
    with pytest.raises((ValueError, FileExistsError), match=message):
        llm2clip.merge_models(first, second, folder / "out", **settings)
    assert not (folder / "out").exists()


DEEP = {"adapter_num_layers": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**DEEP, "projection_dim": 12}, r"heads differ \(projection_dim: 24 and 12\)"),
        ({"vision": tiny.vision_config(num_hidden_layers=3)}, r"vision towers differ \(num_hidden_layers: 2 and 3\)"),
        ({**DEEP, "adapter_normalize": False}, r"heads differ \(adapter_normalize: True and False\)"),
        ({**DEEP, "logit_bias_init_value": -10.0}, r"heads differ \(loss: softmax and sigmoid\)"),
        (DEEP, r"LLMs differ \(fingerprint: 3-\w+ and 3-\w+\)"),
    ],
    ids=["width", "tower", "heads", "loss", "llm"],
)
def test_models_that_do_not_fit_are_refused_by_name(
    fields: dict[str, Any], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tiny.save(tmp_path / "other", **fields)
    both = rf"{pair[0]} and {tmp_path / 'other'} cannot be merged: their "
    refused(both + message, pair[0], tmp_path / "other", tmp_path)


def test_kinds_and_settings_that_do_not_fit_are_refused_by_name(
    pair: tuple[Path, Path], towers: tuple[str, Path], tmp_path: Path
) -> None:
    (first, second), (llm, tower) = pair, towers
    refused(f"{first} is not a text tower.*{tower} is a text tower", first, tower, tmp_path)
    refused(f"{tower} is not an LLM2CLIP model.*{second} is an LLM2CLIP model", tower, second, tmp_path)
    refused(f"{llm} is not an LLM2CLIP model or a text tower.*B gives the result", first, llm, tmp_path)
    refused(r"alpha is 1\.5, but the share of B has to be from 0 \(A\) to 1", first, second, tmp_path, alpha=1.5)
    save_text_tower(tiny.text_model(pooling="last_token"), tiny.processor().tokenizer, tmp_path / "other")
    message = r"other and .*tower cannot be merged: their settings differ \(pooling: last_token and mean\)"
    refused(message, tmp_path / "other", tower, tmp_path)


def test_only_an_earlier_merge_is_replaced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (first, second), out = pair, tmp_path / "out"
    for alpha in (0, 1):
        llm2clip.merge_models(first, second, out, alpha, overwrite=True)
    assert_same(weights(out), weights(second))
    for sources, destination, message, options in (
        ((first, second), out, "add --overwrite to replace it", {}),
        ((out, second), first, "llm2clip merge did not write it", {"overwrite": True}),
        ((first, second), second / "out", "inside the source", {}),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            llm2clip.merge_models(*sources, destination, **options)
