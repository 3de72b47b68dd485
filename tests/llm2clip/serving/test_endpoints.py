"""The endpoints give what the encoder gives, in OpenAI's form, and say what is wrong with a request."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import openai
import pytest
import torch

from llm2clip.encoders import Encoder, load_encoder
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.search_index import SearchIndex
from llm2clip.serving.limits import Limits
from llm2clip.serving.serve import open_index
from tests.builders import tiny
from tests.damaged.images import BadImage, write
from tests.llm2clip.serving.conftest import Serve, data_url, png, serving
from tests.modeling_llm2clip.awkward_images import picture

TEXTS = ["a small dog", "zwei Kinder spielen Fußball", "a red bus " * 40, "<|eot_id|> \x00\n"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def embeddings(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]])


@pytest.fixture(scope="module")
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official:
        yield official


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_openais_client_gets_the_embeddings_of_the_encoder(
    form: Any, official: openai.OpenAI, encoder: Encoder
) -> None:
    options = {} if form is None else {"encoding_format": form}
    answer = official.embeddings.create(model="tiny", input=TEXTS, user="me", **options)
    rows: Any = [row.embedding for row in answer.data]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_allclose(np.array(rows), encoder.encode_text(TEXTS), **CLOSE)
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    assert answer.usage.prompt_tokens == int(encoder.text_lengths(TEXTS)[0].sum())
    assert answer.model == "tiny"


def test_dimensions_cut_the_embeddings_which_have_length_1_again(official: openai.OpenAI, encoder: Encoder) -> None:
    answer = official.embeddings.create(model="tiny", input="a dog", dimensions=5, encoding_format="float")
    row = encoder.encode_text("a dog")[0, :5].numpy()
    np.testing.assert_allclose(answer.data[0].embedding, row / np.linalg.norm(row), **CLOSE)


def test_the_model_is_listed_by_its_name_and_not_by_its_folder(official: openai.OpenAI, client: httpx.Client) -> None:
    (model,) = official.models.list().data
    assert model.id == official.models.retrieve("tiny").id == "tiny"
    assert client.get("/v1/models").json()["data"][0]["dimensions"] == 24
    with pytest.raises(openai.NotFoundError, match=r"no such model here; there is 'tiny'"):
        official.embeddings.create(model="text-embedding-3-small", input="a dog")


def test_images_of_every_form_are_mixed_with_texts_in_their_order(client: httpx.Client, encoder: Encoder) -> None:
    pictures = [picture(40 + side, 50) for side in range(3)]
    urls = [data_url(png(one)) for one in pictures]
    items = [
        {"image": urls[0]},
        "a dog",
        {"type": "image_url", "image_url": {"url": urls[1]}},
        {"text": "a cat"},
        {"image": urls[2].partition(",")[2]},
        {"type": "text", "text": "a bus"},
    ]
    rows = embeddings(client.post("/v1/embeddings", json={"input": items}))
    np.testing.assert_allclose(rows[::2], encoder.encode_image(pictures), **CLOSE)
    np.testing.assert_allclose(rows[1::2], encoder.encode_text(["a dog", "a cat", "a bus"]), **CLOSE)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": urls[1]}}]}]
    row = embeddings(client.post("/v1/embeddings", json={"messages": messages}))
    np.testing.assert_allclose(row, encoder.encode_image(pictures[1]), **CLOSE)
    row = embeddings(client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": "a dog"}]}))
    np.testing.assert_allclose(row, encoder.encode_text("a dog"), **CLOSE)
    several = [messages, [{"role": "user", "content": "a dog"}]]
    rows = embeddings(client.post("/v1/embeddings", json={"messages": several}))
    np.testing.assert_allclose(rows[:1], encoder.encode_image(pictures[1]), **CLOSE)
    np.testing.assert_allclose(rows[1:], encoder.encode_text("a dog"), **CLOSE)


TWO_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
BAD = {
    "no JSON": (b"{nope", "The body is not JSON: expecting property name .*, at character 1"),
    "deep": (b"[" * 200_000, "parsing the body"),
    "long number": (b'{"input": "a", "dimensions": ' + b"9" * 5000 + b"}", "parsing the body"),
    "half a character": (b'{"input": "\\ud800"}', "not valid Unicode"),
    "nothing": ({}, "Exactly one of input and messages"),
    "both": ({"input": "a", "messages": []}, "Exactly one of input and messages"),
    "token ids": ({"input": [1, 2, 3]}, "token ids"),
    "null in a list": ({"input": ["a", None]}, r"input\[1\] has to be a text"),
    "another object": ({"input": {"video": "x"}}, "has to be a text"),
    "image as text": ({"input": "data:image/png;base64,AAAA"}, "send it as"),
    "empty": ({"input": ""}, "input is empty"),
    "white space": ({"input": ["a cat", " \n"]}, r"input\[1\] is empty"),
    "empty message": ({"messages": [{"content": ""}]}, r"messages\[0\].content is empty"),
    "dimensions true": ({"input": "a", "dimensions": True}, "dimensions: Input should be a valid integer"),
    "message of two parts": ({"messages": [{"content": TWO_PARTS}]}, "messages has to be one message"),
    "no message": ({"messages": []}, "messages has to be one message"),
    "conversation of two messages": (
        {"messages": [[{"content": "a"}], [{"content": "a"}, {"content": "b"}]]}, r"messages\[1\] has to be one mess",
    ),
    "empty message among others": (
        {"messages": [[{"content": "a"}], [{"content": ""}]]}, r"messages\[1\]\[0\].content is empty",
    ),
    "URL": ({"input": {"image": "http://127.0.0.1:1/a.png"}}, "URLs are not fetched"),
    "file URL": ({"input": {"image": "file:///etc/passwd"}}, "URLs are not fetched"),
    "path": ({"input": {"image": "/etc/passwd"}}, "cannot be used|is not base64"),
    "data without base64": ({"input": {"image": "data:image/svg+xml,<svg/>"}}, "has to be data:image"),
    "no image": ({"input": {"image": "AAAA"}}, "does not recognize its format"),
    "empty image": ({"input": {"image": ""}}, "it is empty"),
    "narrow image": ({"input": {"image": data_url(png(picture(2000, 1)))}}, "too narrow"),
    "dimensions 25": ({"input": "a", "dimensions": 25}, "dimensions is 25, but embeddings of .* have 24"),
    "unknown field": ({"input": "a", "task": "retrieval"}, "task: Extra inputs"),
}  # fmt: skip
IMAGE = {"image": data_url(png(picture(160, 160)))}
TOO_LARGE = {
    "long text": ({"input": "x" * 32_769}, "32,769 characters, but at most 32,768"),
    "many texts": ({"input": ["x"] * 2049}, "2,049 items, but at most 2,048"),
    "many messages": ({"messages": [[{"content": "x"}]] * 2049}, "2,049 items, but at most 2,048"),
    "many tokens": ({"input": ["a red bus " * 200] * 2}, r"[\d,]+ tokens, but at most 1,000 .*max_request_tokens"),
    "still more": ({"input": ["a red bus " * 200] * 100}, r"at least [\d,]+ tokens, .*max_request_tokens"),
    "many values": (b'{"input": [' + b"1," * 10_000 + b"1]}", r"10,000 commas, .* 1,000 tokens .*max_request_tokens"),
    "large image": ({"input": {"image": data_url(png(picture(200, 200)))}}, r"40,000 pixels, .* 30,000 .*max_pixels"),
    "many pixels": ({"input": [IMAGE, "a", IMAGE]}, r"51,200 pixels, .* 50,000 .*max_request_pixels"),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict(encoder: Encoder) -> Iterator[httpx.Client]:
    limits = Limits(max_request_tokens=1000, max_pixels=30_000, max_request_pixels=50_000)
    with serving(encoder, limits=limits) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_with_the_reason(case: str, strict: httpx.Client) -> None:
    body, reason = BAD[case]
    options: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = strict.post("/v1/embeddings", headers={"Content-Type": "application/json"}, **options)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(reason, error["message"])
    assert embeddings(strict.post("/v1/embeddings", json={"input": "a"})).shape == (1, 24)


@pytest.mark.parametrize("case", TOO_LARGE)
def test_request_beyond_its_limit_is_refused_with_limit_and_amount(case: str, strict: httpx.Client) -> None:
    body, reason = TOO_LARGE[case]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = strict.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413, answer.text
    assert re.search(reason, answer.json()["error"]["message"])
    assert embeddings(strict.post("/v1/embeddings", json={"input": [IMAGE, "a"]})).shape == (2, 24)


def test_other_paths_methods_and_content_types_are_errors_in_the_same_form(client: httpx.Client) -> None:
    answers = [
        client.get("/docs"),
        client.get("/v1/embeddings"),
        # What a page of another site can send without asking.
        client.post("/v1/embeddings", content=b'{"input": "a"}', headers={"Content-Type": "text/plain"}),
        client.post("/v1/embeddings", content=b'{"input": "a"}'),
        client.post("/search", json={"query": "a"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 404]
    assert all(set(answer.json()["error"]) == {"message", "type", "param", "code"} for answer in answers)


@pytest.mark.filterwarnings("ignore:::PIL.TiffImagePlugin")
def test_broken_and_hostile_images_are_refused_and_good_ones_embedded(
    serve: Serve, encoder: Encoder, tmp_path: Path
) -> None:
    client = serve(encoder)
    images: list[BadImage] = write(tmp_path / "images")
    assert len(images) > 250
    for image in images:
        answer = client.post("/v1/embeddings", json={"input": {"image": data_url(image.content)}})
        expected = {"image": (200,), "refused": (400,), "either": (200, 400)}[image.outcome]
        assert answer.status_code in expected, (image.name, answer.text)
    assert client.get("/health").json() == {"status": "ok"}


def test_half_a_model_refuses_the_other_half(serve: Serve, encoder: Encoder, tmp_path: Path) -> None:
    tiny.text_model().save_pretrained(tmp_path / "tower")
    tiny.processor(28).tokenizer.save_pretrained(tmp_path / "tower")
    client = serve(load_encoder(str(tmp_path / "tower")))
    assert client.get("/v1/models").json()["data"][0]["inputs"] == ["text"]
    answer = client.post("/v1/embeddings", json={"input": {"image": data_url(png(picture()))}})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "tower does not embed images.")
    assert embeddings(client.post("/v1/embeddings", json={"input": "a dog"})).shape == (1, tiny.HIDDEN)


@pytest.fixture(scope="module")
def index(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("served")
    (folder / "images").mkdir()
    for side in range(6):
        picture(30 + 9 * side, 40).save(folder / "images" / f"{side}.png")
    config = IndexConfig(folder=str(folder / "images"), model=str(saved_model), output_dir=str(folder / "index"))
    run(config)
    return str(folder / "index")


def test_search_finds_what_the_index_finds(serve: Serve, encoder: Encoder, index: str) -> None:
    client = serve(encoder, open_index(index, encoder))
    for query, rows in (
        ("a small dog", encoder.encode_text("a small dog")),
        ({"image": data_url(png(picture(48, 40)))}, encoder.encode_image(picture(48, 40))),
    ):
        (near,) = SearchIndex.open(index, encoder=encoder).search(rows.numpy(), 3)
        results = client.post("/search", json={"query": query, "k": 3}).json()["results"]
        assert [entry["key"] for entry in results] == [result.key for result in near]
        np.testing.assert_allclose([entry["score"] for entry in results], [result.score for result in near], **CLOSE)
    assert results[0]["key"] == "2.png"
    assert "path" not in results[0]
    answer = client.post("/search", json={"query": "a", "where": "key = '3.png'"}).json()["results"]
    assert [entry["key"] for entry in answer] == ["3.png"]


def test_search_shows_metadata_columns(serve: Serve, encoder: Encoder, saved_model: Path, tmp_path: Path) -> None:
    images = [{"bytes": png(picture(30 + 9 * side, 40)), "path": None} for side in range(3)]
    table = datasets.Dataset.from_dict({"image": images, "artist": ["A", "B", None], "year": [1900, 1950, 2000]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    place = {"model": str(saved_model), "output_dir": str(tmp_path / "index")}
    run(IndexConfig(folder=str(tmp_path / "data.parquet"), metadata_columns=["artist", "year"], **place))
    client = serve(encoder, open_index(str(tmp_path / "index"), encoder))
    found = client.post("/search", json={"query": "a", "where": "year > 1900"}).json()["results"]
    shown = {"1": {"artist": "B", "year": 1950}, "2": {"artist": None, "year": 2000}}
    assert {entry["key"]: entry["metadata"] for entry in found} == shown


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": ["a", "b"]}, "one text or one image"),
        ({"query": "a", "k": 10**6}, "less than or equal to 1000"),
        ({"query": "a", "where": "nonsense = 3"}, "nonsense"),
    ],
)
def test_bad_search_is_refused_with_the_reason(
    body: dict[str, Any], reason: str, serve: Serve, encoder: Encoder, index: str
) -> None:
    answer = serve(encoder, open_index(index, encoder)).post("/search", json=body)
    assert (answer.status_code, reason in answer.json()["error"]["message"]) == (400, True), answer.text


def test_an_index_that_is_moved_while_it_is_served_is_no_mistake_of_the_client_who_learns_no_path(
    serve: Serve, encoder: Encoder, index: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(index, tmp_path / "index"))
    client = serve(encoder, open_index(str(copied), encoder))
    copied.rename(tmp_path / "moved")
    answer = client.post("/search", json={"query": "a", "where": "key = '3.png'"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "The server failed.")
    assert client.get("/health").status_code == 200


def test_index_of_another_model_is_refused(index: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was made by .*llm2clip-tiny"):
        open_index(index, load_encoder(str(tmp_path / "other")))


def test_truncated_embeddings_are_served_and_want_an_index_of_their_width(
    serve: Serve, saved_model: Path, index: str
) -> None:
    encoder = load_encoder(str(saved_model), truncate_dim=5)
    inputs = ["a small dog", {"image": data_url(png(picture(48, 40)))}]
    rows = embeddings(serve(encoder).post("/v1/embeddings", json={"input": inputs}))
    wanted = np.concatenate([encoder.encode_text("a small dog"), encoder.encode_image(picture(48, 40))])
    np.testing.assert_allclose(rows, wanted, **CLOSE)
    with pytest.raises(ValueError, match=r"have 5 values, .* have 24; .* add --truncate-dim 24"):
        open_index(index, encoder)


def test_metrics_count_requests_inputs_tokens_and_cut_texts_without_labels_of_clients(
    serve: Serve, encoder: Encoder
) -> None:
    client, texts = serve(encoder), ["a small dog", "a dog " * 100]
    client.get("/what/a/client/chose")
    answer = client.post("/v1/embeddings", json={"input": texts})
    np.testing.assert_allclose(embeddings(answer), encoder.encode_text(texts), **CLOSE)
    page = client.get("/metrics").text
    assert 'llm2clip_requests_total{path="other",status="404"}' in page
    assert "a/client/chose" not in page
    assert 'llm2clip_inputs_total{kind="text"} 2.0' in page
    assert f"llm2clip_tokens_total {encoder.text_lengths(texts)[0].sum():.1f}" in page
    assert "llm2clip_truncated_texts_total 1.0" in page
    assert "llm2clip_waiting 0.0" in page
