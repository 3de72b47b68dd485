"""One model goes through every door: each gives the embeddings that its parts give when they are called one by one.

The model has what the quickstart's has: features of class token and patches, standardized with the statistics of its
training set, centred embeddings of an encoder like E5 (prompt, mean over the tokens, unit length), a gated head.
Processes without this package get the same: `make compat` has such a model too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPImageProcessor

from llm2clip import cli
from llm2clip.command_line.settings import build_config
from llm2clip.demo.gallery import Gallery
from llm2clip.encoders import embed
from llm2clip.search.folder_items import FolderImages
from llm2clip.trainers import run_stage2
from llm2clip.trainers.joint_model import make_model
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import embedding_models, small_runs
from tests.builders.embedding_models import OTHER_LANGUAGES

CAPTIONS = ["a small dog", "two children play football, seen from a green park", *OTHER_LANGUAGES]
CLOSE = {"atol": 1e-5, "rtol": 0}
NUM_PICTURES = 6


@dataclass(frozen=True)
class Known:
    """The built model, pictures and captions, and what has to come out at every door.

    Attributes:
        folder: The folder for the Hub.
        pictures: Files, in the order of `image`; their folder has the captions too.
        text: Embeddings of `CAPTIONS` `(captions, 24)`.
        image: Embeddings of the pictures `(pictures, 24)`.
        scale: What multiplies their cosines.
    """

    folder: Path
    pictures: list[Path]
    text: Tensor
    image: Tensor
    scale: float

    @property
    def logits(self) -> Tensor:
        return self.scale * self.image @ self.text.T


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("doors")
    encoder = embedding_models.save(folder / "text", "multilingual-e5-small")
    text, cache = str(folder / "text"), str(folder / "cache")
    fields = {"text_model_name_or_path": text, "output_dir": cache, "prompt_prefix": "query: "}
    embed.run(build_config(embed.EmbedConfig, fields | {"sources": [small_runs.concepts()]}))
    fields = small_runs.stage2_fields(folder / "trained", small_runs.save_dinov2_tower(folder / "vision"), text, cache)
    new = {"vision_pooling": "cls_mean", "visual_head": "gated"}
    config = build_config(Stage2Recipe, {**fields, **new, "eval_sources": {}})
    # A model with all that an image and a caption can go through.
    settings = {"projection_dim": 24, "standardize_vision": True, "center_text": True, **new}
    model, processor = make_model(config, **settings)
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(model.config.vision_width, generator=generator)
    center = torch.rand(model.config.text_config.hidden_size, generator=generator) / 10
    statistics = {"visual_standardization.mean": spread - 0.5, "visual_standardization.std": spread + 0.5}
    for name, values in (statistics | {"text_adapter.center": center}).items():
        model.get_buffer(name).copy_(values)
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    fields |= {"model_name_or_path": str(folder / "start"), "eval_sources": {}, "max_steps": 3, "save_strategy": "no"}
    fields |= dict.fromkeys(("vision_model_name_or_path", "text_model_name_or_path"), "") | {"projection_dim": None}
    run_stage2.run(build_config(Stage2Recipe, {**fields, "freeze_vision": "all", "feature_dropout": 0.2}))
    assert cli.main(["build", str(folder / "trained"), str(folder / "built")]) == 0
    rows = datasets.load_dataset("parquet", data_files=f"{small_runs.CONCEPTS}/test.parquet", split="train")
    rows = rows.select(range(NUM_PICTURES))
    pictures = [folder / "pictures" / f"{number}.png" for number in range(NUM_PICTURES)]
    pictures[0].parent.mkdir()
    for path, image in zip(pictures, rows["image"], strict=True):
        image.save(path)
    lines = [json.dumps({"file_name": path.name, "caption": CAPTIONS[i % 5]}) for i, path in enumerate(pictures)]
    (pictures[0].parent / "metadata.jsonl").write_text("\n".join(lines))
    model = LLM2CLIPModel.from_pretrained(folder / "trained").eval()
    embeds = encoder.encode([f"query: {caption}" for caption in CAPTIONS], convert_to_tensor=True)
    return Known(folder / "built", pictures, *by_hand(model, embeds, pictures), model.logit_scale.exp().item())


def by_hand(model: LLM2CLIPModel, llm_embeds: Tensor, pictures: list[Path]) -> tuple[Tensor, Tensor]:
    """The embeddings of captions and pictures, by the parts of the trained model."""
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = image_processor([Image.open(path).convert("RGB") for path in pictures], return_tensors="pt")
    adapter, statistics = model.text_adapter, model.visual_standardization
    with torch.no_grad():
        states = model.vision_model(**pixels).last_hidden_state
        features = torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=-1)
        image = model.visual_projection((features - statistics.mean) / statistics.std)
        text = adapter(llm_embeds)
    assert statistics.std.min() > 0
    assert not statistics.std.eq(1).any()
    assert adapter.center.abs().max() > 0.01
    assert model.config.visual_head == "gated"
    return F.normalize(text, dim=-1), F.normalize(image, dim=-1)


def test_the_built_folder_gives_what_its_parts_give(known: Known) -> None:
    model, processor = LLM2CLIPModel.from_pretrained(known.folder).eval(), AutoProcessor.from_pretrained(known.folder)
    images = [Image.open(path) for path in known.pictures]
    torch.testing.assert_close(model.encode_text(CAPTIONS, processor), known.text, **CLOSE)
    torch.testing.assert_close(model.encode_image(images, processor), known.image, **CLOSE)
    assert torch.pdist(known.text).min() > 0.01, "captions of other languages are all the same to the model"
    assert torch.pdist(known.image).min() > 0.01


def test_evaluate_measures_them(known: Known, tmp_path: Path) -> None:
    data, output = str(known.pictures[0].parent), tmp_path / "results"
    arguments = ["--benchmark", data, "--split", "train", "--output", str(output), "--num-workers", "0"]
    assert cli.main(["evaluate", str(known.folder), *arguments]) == 0
    (file,) = output.glob("*.json")
    found = json.loads(file.read_text())["ranks"]
    # The last picture has the first caption too.
    own = torch.arange(NUM_PICTURES) % len(CAPTIONS)
    right = own[:, None] == torch.arange(len(CAPTIONS))
    for name, logits, matches in (("image_to_text", known.logits, right), ("text_to_image", known.logits.T, right.T)):
        # The rank of the best right answer.
        ranks = [1 + int((row > row[match].max()).sum()) for row, match in zip(logits, matches, strict=True)]
        assert found[f"{name}_mean_rank"] == pytest.approx(sum(ranks) / len(ranks)), name


def test_an_index_is_searched_by_them(known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, folder = str(tmp_path / "index"), str(known.pictures[0].parent)
    fields = ["--model", str(known.folder), "--output-dir", index, "--stored-dtype", "float32", "--num-workers", "0"]
    assert cli.main(["index", folder, *fields]) == 0
    capsys.readouterr()
    assert cli.main(["search", index, *CAPTIONS, "--json"]) == 0
    for caption, query, cosines in zip(
        CAPTIONS, json.loads(capsys.readouterr().out)["queries"], known.text @ known.image.T, strict=True
    ):
        best = cosines.sort(descending=True)
        assert [found["path"] for found in query["results"]] == [str(known.pictures[i]) for i in best.indices], caption
        assert [found["score"] for found in query["results"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_demo_shows_them(known: Known, tmp_path: Path) -> None:
    gallery = Gallery.open(str(known.folder), FolderImages(known.pictures[0].parent), tmp_path)
    picture = Image.open(known.pictures[2]).convert("RGB")
    for caption, cosines in zip(CAPTIONS, known.text @ known.image.T, strict=True):
        scores = [shown.score for shown in gallery.search(caption)]
        assert scores == pytest.approx(cosines.sort(descending=True).values.tolist(), abs=1e-5), caption
    probabilities = gallery.classify(picture, CAPTIONS)
    assert list(probabilities.values()) == pytest.approx(known.logits[2].softmax(dim=-1).tolist(), abs=1e-5)
