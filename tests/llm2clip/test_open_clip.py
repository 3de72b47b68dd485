"""Code written for open_clip runs on our models: CLIP_benchmark finds our integers with its own loader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.models import open_clip as their_loader
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from llm2clip import Benchmark, BenchmarkImages, RetrievalData, evaluate, load_encoder, open_clip
from tests.builders import tiny
from tests.builders.small_runs import CONCEPTS

from .encoders.models import register_open_clip, save_transformers

PICTURES, CLASSES = 32, 6


@pytest.fixture(scope="module", params=["llm2clip", "open_clip"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    if request.param == "llm2clip":
        tiny.save(folder)
        return str(folder)
    name, weights = register_open_clip(folder)
    return f"open_clip:{name}/{weights}"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Image.Image, list[str]]]:
    """Pictures with unique captions, because CLIP_benchmark breaks ties arbitrarily; half are transparent."""
    table = datasets.Dataset.from_parquet(f"{CONCEPTS}/test.parquet", keep_in_memory=True)
    first = {caption.lower(): row for row, caption in reversed(list(enumerate(table["caption"])))}
    table = table.select(sorted(first.values())[:PICTURES])
    modes = ["RGB", "LA"] * (PICTURES // 2)
    return [
        (row["image"].convert(mode), [row["caption"], row["keywords"]]) for row, mode in zip(table, modes, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_classification_by_its_functions_has_our_logits_and_integers(
    model: str, pairs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(their_loader, "open_clip", open_clip)
    names = [captions[0] for _, captions in pairs[:CLASSES]]
    opened, transform, tokenizer = their_loader.load_open_clip(model, "")
    for number, (image, _) in enumerate(pairs):
        folder = tmp_path / "test" / names[(number * number) % CLASSES].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    for name in names:
        (tmp_path / "test" / name.replace(" ", "_")).mkdir(exist_ok=True)
    rows = ImageFolder(tmp_path / "test", transform, allow_empty=True, loader=Image.open)
    ordered, templates = sorted(names), ["a photo of a {c}.", "{c}"]
    assert [name.replace("_", " ") for name in rows.classes] == ordered
    classifier = zeroshot_classification.zero_shot_classifier(opened, tokenizer, ordered, templates, "cpu", amp=False)
    loader = DataLoader(rows, batch_size=8)
    logits, labels = zeroshot_classification.run_classification(opened, classifier, loader, "cpu", amp=False)
    encoder = load_encoder(model)
    images = encoder.encode_image([path for path, _ in rows.samples])
    texts = encoder.encode_text([template.replace("{c}", name) for name in ordered for template in templates])
    classes = torch.nn.functional.normalize(texts.view(CLASSES, 2, -1).mean(dim=1), dim=-1)
    torch.testing.assert_close(logits.float(), 100 * images @ classes.t(), atol=1e-3, rtol=0)
    (tmp_path / "templates.txt").write_text("\n".join(templates))
    options = {"templates": str(tmp_path / "templates.txt"), "data": str(tmp_path), "num_workers": 0}
    [ours] = evaluate(encoder, "imagefolder", **options)
    # The rest of its `evaluate`, which fails on NumPy 2.4.
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    assert ours.counts["tied_images"] == 0
    assert ours.scores["top1"] * PICTURES == pytest.approx(int(hits[:, 0].sum()))
    assert ours.scores["top5"] * PICTURES == pytest.approx(int(hits.sum()))
    assert 0 < ours.scores["top1"] < ours.scores["top5"]
    assert ours.scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(dim=1)))


def test_retrieval_by_its_command_has_our_integers(
    model: str, pairs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local data in the layout of Flickr30k, without captioning metrics, which need Java."""
    monkeypatch.setattr(their_loader, "open_clip", open_clip)
    captioning = "clip_benchmark.metrics.captioning"
    monkeypatch.setitem(sys.modules, captioning, ModuleType(captioning))
    lines = ["image,caption"]
    for index, (image, captions) in enumerate(pairs):
        image.convert("RGB").save(tmp_path / f"{index}.jpg")
        lines += [f"{index}.jpg,{caption}" for caption in captions]
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("\n".join(lines))
    output = tmp_path / "result.json"
    data = ["--dataset", "flickr30k", "--dataset_root", str(tmp_path), "--num_workers", "0", "--output", str(output)]
    settings = ["--no_amp", "--recall_k", "1", "5", "10"]
    arguments = ["eval", *settings, "--model_type", "open_clip", "--model", model, "--pretrained", "", *data]
    from clip_benchmark import cli

    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cli.main()
    found = json.loads(output.read_text())["metrics"]
    images = BenchmarkImages([tmp_path / f"{index}.jpg" for index in range(len(pairs))])
    same = RetrievalData.from_captions(images, [captions for _, captions in pairs])
    benchmark = Benchmark(name="same", title="Same", read=lambda _: same, protocol="retrieval")
    [ours] = evaluate(model, benchmark, data=str(tmp_path), num_workers=0)
    assert ours.counts["tied_text_queries"] == ours.counts["tied_image_queries"] == 0
    assert 0 < ours.scores["text_to_image_recall@1"] < ours.scores["text_to_image_recall@10"] < 1
    for k in (1, 5, 10):
        for theirs, side, queries in (("image", "text_to_image", 2 * PICTURES), ("text", "image_to_text", PICTURES)):
            expected = round(queries * found[f"{theirs}_retrieval_recall@{k}"])
            assert queries * ours.scores[f"{side}_recall@{k}"] == pytest.approx(expected)


def test_rows_are_those_of_the_encoder_and_nothing_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path)
    name, picture = str(tmp_path), Image.effect_noise((40, 30), 80).convert("RGB")
    model, training, preprocess = open_clip.create_model_and_transforms(name, jit=False, cache_dir=None)
    tokenizer, encoder = open_clip.get_tokenizer(name), load_encoder(name)
    texts = tokenizer(["a dog", "a red bus"]).to("cpu")
    assert torch.equal(model.eval().encode_text(texts), encoder.encode_text(["a dog", "a red bus"]))
    assert torch.equal(model.encode_text(tokenizer("a dog"), normalize=True), encoder.encode_text("a dog"))
    rows = model.to("cpu").encode_image(preprocess(picture)[None])
    torch.testing.assert_close(rows, encoder.encode_image([picture]), atol=1e-6, rtol=0)
    assert torch.equal(model.logit_scale, encoder.model.logit_scale)
    with pytest.raises(NotImplementedError, match="no transform of training"):
        training(picture)
    for device in ("meta", torch.float16):
        with pytest.raises(ValueError, match="the model is on cpu and stays there"):
            model.to(device)
    for own, same, other in (("cuda:1", ["cuda", "cuda:1"], "cuda:0"), ("cuda", ["cuda", "cuda:0"], "cpu")):
        monkeypatch.setattr(model.encoder, "device", torch.device(own))
        for device in same:
            assert model.to(device) is model.to(torch.device(device)) is model
        with pytest.raises(ValueError, match=f"the model is on {own} and stays there"):
            model.to(other)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unit length"):
        model.encode_image(preprocess(picture)[None], normalize=False)
    for tokens in (torch.zeros(1, 77, dtype=torch.int64), open_clip.get_tokenizer("another")("a dog")):
        with pytest.raises(ValueError, match="encode_text takes what get_tokenizer"):
            model.encode_text(tokens)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"precision": "amp"}, ValueError, "precision is 'amp'; choose fp32, bf16, fp16"),
        ({"jit": True}, TypeError, "does not support jit"),
        ({"force_image_size": 224, "cache_dir": "here"}, TypeError, "does not support force_image_size, cache_dir"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        open_clip.create_model_and_transforms("no-model", **options)


def test_images_of_several_tensors_are_refused(tmp_path: Path) -> None:
    save_transformers("siglip2", tmp_path)
    with pytest.raises(ValueError, match=r"reads an image as .*pixel_attention_mask.*; open_clip has one tensor"):
        open_clip.create_model_and_transforms(str(tmp_path))
