"""CLIP_benchmark evaluates a model folder, by its functions and by its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature

from llm2clip.evaluation import clip_benchmark, retrieval_metrics
from llm2clip.evaluation.clip_benchmark import load_clip
from modeling_llm2clip import LLM2CLIPModel
from tests.golden import load_golden
from tests.modeling_llm2clip import tiny

CONCEPTS = Path(__file__).parents[3] / "examples" / "data" / "concepts" / "test.parquet"
PICTURES = 32
KS = [1, 5, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Image.Image, list[str]]]:
    """Pictures with unique captions, because CLIP_benchmark breaks ties arbitrarily; half are greyscale."""
    table = datasets.Dataset.from_parquet(str(CONCEPTS), keep_in_memory=True)
    first = {caption.lower(): row for row, caption in reversed(list(enumerate(table["caption"])))}
    table = table.select(sorted(first.values())[:PICTURES])
    modes = ["RGB", "LA"] * (PICTURES // 2)
    return [
        (row["image"].convert(mode), [row["caption"], row["keywords"]]) for row, mode in zip(table, modes, strict=True)
    ]


class Pictures(torch.utils.data.Dataset[Any]):
    """A data set with the attributes that CLIP_benchmark reads."""

    def __init__(self, rows: list[tuple[Image.Image, Any]], transform: Any) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image, target = self.rows[index]
        return self.transform(image), target


def embeddings(folder: Path, images: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    model, processor = LLM2CLIPModel.from_pretrained(folder).eval(), tiny.processor()
    return model.encode_image(images, processor), model.encode_text(texts, processor)


def test_retrieval_equals_our_metrics(folder: Path, pairs: list[tuple[Image.Image, list[str]]]) -> None:
    rows = [(image.convert("RGB"), captions) for image, captions in pairs]
    model, transform, tokenizer = load_clip(str(folder), "", None, "cpu")
    loader = DataLoader(
        Pictures(rows, transform),
        batch_size=8,
        collate_fn=lambda batch: (torch.stack([image for image, _ in batch]), [captions for _, captions in batch]),
    )
    found = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=KS)
    images, texts = embeddings(
        folder, [image for image, _ in rows], [text for _, captions in rows for text in captions]
    )
    owners = torch.arange(PICTURES).repeat_interleave(2)
    expected = retrieval_metrics(images, texts, torch.stack([torch.arange(2 * PICTURES), owners], dim=1), ks=KS)
    assert 0 < expected["text_to_image_recall@10"] < 1
    for k in KS:
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(expected[f"text_to_image_recall@{k}"])
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(expected[f"image_to_text_recall@{k}"])


@pytest.mark.parametrize("amp", [False, True])
def test_zero_shot_logits_are_cosines(folder: Path, pairs: list[tuple[Image.Image, list[str]]], amp: bool) -> None:
    names = [captions[0] for _, captions in pairs]
    model, transform, tokenizer = load_clip(str(folder))
    pictures = Pictures([(image, index) for index, (image, _) in enumerate(pairs)], transform)
    loader = DataLoader(pictures, batch_size=8)
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, names, ["a drawing of {c}"], "cpu", amp
    )
    logits, targets = zeroshot_classification.run_classification(model, classifier, loader, "cpu", amp)
    assert targets.tolist() == list(range(PICTURES))
    # White where the pictures are transparent, as the data sets of this package are read.
    upright = [clip_benchmark.decode_image(image, "picture") for image, _ in pairs]
    images, texts = embeddings(folder, upright, [f"a drawing of {name}" for name in names])
    torch.testing.assert_close(logits, 100 * images @ texts.t(), atol=3 if amp else 1e-3, rtol=0)


def test_logit_scale_is_that_of_the_model(folder: Path) -> None:
    model, *_ = load_clip(str(folder))
    assert model.logit_scale is model.model.logit_scale
    assert not model.model.training


def test_the_command_knows_the_model_type(
    folder: Path,
    pairs: list[tuple[Image.Image, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run the real command on local data in the layout of Flickr30k, without captioning metrics, which need Java."""
    captioning = "clip_benchmark.metrics.captioning"
    monkeypatch.setitem(sys.modules, captioning, ModuleType(captioning))
    lines = ["image,caption"]
    for index, (image, captions) in enumerate(pairs):
        image.convert("RGB").save(tmp_path / f"{index}.jpg")
        lines += [f"{index}.jpg,{caption}" for caption in captions]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    output = tmp_path / "result.json"
    options = {
        "--model_type": "llm2clip",
        "--model": folder,
        "--pretrained": "",
        "--dataset": "flickr30k",
        "--dataset_root": tmp_path,
        "--annotation_file": tmp_path / "captions.txt",
        "--recall_k": 5,
        "--num_workers": 0,
        "--output": output,
    }
    arguments = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", "--no_amp", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clip_benchmark.main()
    found = json.loads(output.read_text())["metrics"]
    images = [Image.open(tmp_path / f"{index}.jpg") for index in range(PICTURES)]
    rows = embeddings(folder, images, [text for _, captions in pairs for text in captions])
    owners = torch.arange(PICTURES).repeat_interleave(2)
    expected = retrieval_metrics(*rows, torch.stack([torch.arange(2 * PICTURES), owners], dim=1), ks=[5])
    assert found["image_retrieval_recall@5"] == pytest.approx(expected["text_to_image_recall@5"])
    assert found["text_retrieval_recall@5"] == pytest.approx(expected["image_to_text_recall@5"])


def test_unsupported_models_and_revisions_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pretrained \('laion400m_e32'\) is a revision on the Hub, but .* is a folder"
    ):
        load_clip(str(folder), "laion400m_e32")
    with pytest.raises(ValueError, match=r"model_cache_dir \(cache\) is not supported; set HF_HUB_CACHE"):
        load_clip(str(folder), "", "cache")
    tiny.text_model().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is not an LLM2CLIP model: it contains a text tower"):
        load_clip(str(tmp_path / "text"))
    tiny.joint_model(vision=tiny.other_vision_config("siglip2_vision_model")).save_pretrained(tmp_path / "naflex")
    tiny.naflex_processor().save_pretrained(tmp_path / "naflex")
    with pytest.raises(
        ValueError, match="needs pixel_values, pixel_attention_mask, spatial_shapes, but CLIP_benchmark"
    ):
        load_clip(str(tmp_path / "naflex"))


def test_zero_shot_averaging_equals_the_original() -> None:
    """The mean over prompt templates with our model; the fixture's adapter is one matrix."""
    golden = load_golden("zero_shot_a")
    projection, classes = golden["in/text_projection"], golden["in/class_template_embeddings"]
    config = tiny.joint_config(
        text=tiny.text_config(), projection_dim=projection.shape[1], adapter_num_layers=0, adapter_normalize=False
    )
    model = LLM2CLIPModel(config, text_model=False).eval()
    model.config.text_config.decoder_config.hidden_size = len(projection)
    model.text_adapter.norm = torch.nn.Identity()
    model.text_adapter.proj = torch.nn.Linear(*projection.shape, bias=False)
    model.text_adapter.proj.weight.data = projection.T.contiguous()
    model.encode_text = lambda tokens: model.get_text_features(**tokens).pooler_output
    classifier = zeroshot_classification.zero_shot_classifier(
        model,
        lambda texts: BatchFeature({"llm_embeds": torch.stack([classes[tuple(map(int, t.split()))] for t in texts])}),
        [str(name) for name in range(len(classes))],
        [f"{{c}} {template}" for template in range(classes.shape[1])],
        "cpu",
        amp=False,
    )
    golden.close(classifier, "out/classifier")
    logits = 100 * torch.nn.functional.normalize(golden["in/images"], dim=-1) @ classifier
    hits = logits.topk(5).indices == golden["in/target"][:, None]
    assert hits[:, 0].double().mean() == pytest.approx(golden.meta["metrics"]["top1"])
    assert hits.any(dim=1).double().mean() == pytest.approx(golden.meta["metrics"]["top5"])
