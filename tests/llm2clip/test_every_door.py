"""One model goes through every door: each gives the embeddings that its parts give when they are called one by one.

The model has what the quickstart's has: features of class token and patches, standardized with the statistics of its
training set, centred embeddings of an encoder like E5 (prompt, mean over the tokens, unit length), a gated head.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import onnxruntime
import pytest
import torch
from gradio_client import handle_file
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPImageProcessor

from llm2clip import cli
from llm2clip.demo.gallery import Gallery
from llm2clip.encoders import embed
from llm2clip.search.folder_items import FolderImages
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel
from tests.compatibility import check
from tests.examples.server import open_page, serving
from tests.forks import run_code
from tests.llm2clip import embedding_models, tiny
from tests.llm2clip.embedding_models import OTHER_LANGUAGES
from tests.llm2clip.hub.conftest import REPO
from tests.loopback_hub import LoopbackHub
from tests.stranger import HIDE

CAPTIONS = ["a small dog", "two children play football, seen from a green park", *OTHER_LANGUAGES]
CLOSE = {"atol": 1e-5, "rtol": 0}
NUM_PICTURES = 6
CONSUMER = """
import json
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline
repo, output, pictures, captions = sys.argv[1:3] + [json.loads(value) for value in sys.argv[3:]]
images = [Image.open(picture) for picture in pictures]
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
found = {"logits": model(**processor(text=captions, images=images, return_tensors="pt")).logits_per_image}
classify = pipeline("zero-shot-image-classification", model=repo, trust_remote_code=True)
answers = classify(images, candidate_labels=captions, hypothesis_template="{}")
scores = [{row["label"]: row["score"] for row in answer} for answer in answers]
found["scores"] = torch.tensor([[row[caption] for caption in captions] for row in scores])
features = pipeline("image-feature-extraction", model=repo, trust_remote_code=True)
found["image"] = torch.nn.functional.normalize(torch.tensor(features(images, pool=True))[:, 0], dim=-1)
states = pipeline("feature-extraction", model=repo, trust_remote_code=True)
found["states"] = torch.tensor(states(captions[0]))
encoder = SentenceTransformer(repo, trust_remote_code=True, device="cpu")
found["st_text"] = torch.tensor(encoder.encode(captions))
found["st_image"] = torch.tensor(encoder.encode(images))
assert not {"modeling_llm2clip", "llm2clip"} & set(sys.modules)
save_file({key: value.detach().contiguous() for key, value in found.items()}, output)
"""


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
    embed.run(build_config(embed.EmbedConfig, fields | {"sources": [tiny.concepts()]}))
    fields = tiny.stage2_fields(folder / "trained", tiny.save_dinov2_tower(folder / "vision"), text, cache)
    fields |= {"freeze_vision": "all", "vision_pooling": "cls_mean", "standardize_features": True, "eval_sources": {}}
    fields |= {"visual_head": "gated", "feature_dropout": 0.2, "max_steps": 3, "save_strategy": "no"}
    # The check of other versions bounds logits, whose rounding grows with the scale.
    fields |= {"logit_scale_init_value": 0.0}
    run_stage2.run(build_config(Stage2Recipe, fields))
    assert cli.main(["build", str(folder / "trained"), str(folder / "built")]) == 0
    rows = datasets.load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/test.parquet", split="train")
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


def push_by_command(hub: LoopbackHub, folder: Path, home: Path) -> str:
    """Push a folder with the command, in a process of its own; returns what it prints."""
    environment = {**os.environ, **hub.environment(home / "publisher")}
    command = [sys.executable, "-m", "llm2clip", "push", str(folder), REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def consume(hub: LoopbackHub, pictures: Sequence[Path], captions: Sequence[str], home: Path) -> dict[str, Tensor]:
    """What a process without this package and without a token gets from the pushed model.

    Returns:
        `logits` and `scores` `(pictures, captions)`, of AutoModel and the zero-shot pipeline; `image`, of the pipeline
        of image features, `st_image` and `st_text`, of SentenceTransformer; `states`, of the first caption's tokens.
    """
    environment = {**os.environ, **hub.environment(home / "consumer", token=None)}
    output = home / "found.safetensors"
    inputs = json.dumps([str(picture) for picture in pictures]), json.dumps(captions)
    command = [sys.executable, "-I", "-c", HIDE + CONSUMER, REPO, str(output), *inputs]
    done = run_code(command, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


@pytest.mark.slow  # test_remote_code.py and test_sentence_transformers.py are strangers to the same model
def test_a_stranger_gets_them_from_the_hub(hub: LoopbackHub, known: Known, tmp_path: Path) -> None:
    assert f"repo: {hub.url}/{REPO}" in push_by_command(hub, known.folder, tmp_path)
    found = consume(hub, known.pictures, CAPTIONS, tmp_path)
    torch.testing.assert_close(found["logits"], known.logits, atol=2e-4, rtol=0)
    torch.testing.assert_close(found["scores"], known.logits.softmax(dim=-1), **CLOSE)
    for name, expected in (("image", known.image), ("st_image", known.image), ("st_text", known.text)):
        torch.testing.assert_close(found[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    model, processor = LLM2CLIPModel.from_pretrained(known.folder).eval(), AutoProcessor.from_pretrained(known.folder)
    with torch.inference_mode():
        states = model.get_text_features(**processor(text=CAPTIONS[:1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found["states"], states, **CLOSE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The check's bounds are for one thread, with which `make compat` runs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_check_of_other_versions_accepts_the_folder(known: Known, tmp_path: Path) -> None:
    """As `make compat` runs it: exact logits with sdpa, processor, pipelines, 16 bits, offloading."""
    model = LLM2CLIPModel.from_pretrained(known.folder, attn_implementation="sdpa").eval()
    inputs = AutoProcessor.from_pretrained(known.folder)(
        text=check.CAPTIONS, images=check.pictures(28), return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**inputs)
    tensors = {f"in/{name}": value for name, value in inputs.items()}
    tensors |= {"logits": output.logits_per_image, "image_embeds": output.image_embeds}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "expected.safetensors")
    (tmp_path / "model").symlink_to(known.folder)
    assert check.check_case(tmp_path)["sdpa"] == 0


@pytest.mark.slow  # test_export_onnx.py
def test_the_onnx_graphs_give_them(known: Known, tmp_path: Path) -> None:
    assert cli.main(["export-onnx", str(known.folder), "--output-dir", str(tmp_path / "onnx")]) == 0
    processor = AutoProcessor.from_pretrained(known.folder)
    inputs = dict(processor(text=CAPTIONS, images=[Image.open(path) for path in known.pictures], return_tensors="np"))
    for part, expected in (("text", known.text), ("vision", known.image)):
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{part}_model.onnx"))
        fed = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
        torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), expected, **CLOSE)


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
    fields = ["--model", str(known.folder), "--output-dir", index, "--dtype", "float32", "--num-workers", "0"]
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


@pytest.mark.slow
def test_the_served_demo_answers_with_them(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("demo", "--model", known.folder, "--data", known.pictures[0].parent, "--split", "train")
    with serving("-m", "llm2clip", *arguments, folder=tmp_path) as address:
        page = open_page(address, tmp_path, monkeypatch)
        for caption, cosines in zip(CAPTIONS, known.text @ known.image.T, strict=True):
            found = page.predict(caption, api_name="/search")["value"]
            best = cosines.sort(descending=True).values.tolist()
            assert [entry["caption"].split()[0] for entry in found] == [f"{score:.2f}" for score in best]
        labels = "\n".join(CAPTIONS)
        picture = handle_file(str(known.pictures[2]))
        found = page.predict(picture, labels, "{}", api_name="/classify")["confidences"]
    expected = dict(zip(CAPTIONS, known.logits[2].softmax(dim=-1).tolist(), strict=True))
    assert {entry["label"]: entry["confidence"] for entry in found} == pytest.approx(expected, abs=1e-4)
