"""A caption is text, nothing, or a refusal, the same at every door; and its embedding is its own."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import datasets
import pytest
import torch

from llm2clip.command_line.logs import CONTROL_CHARACTERS
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.data.rows import CaptionError, captions_of
from llm2clip.encoders import embed_captions
from llm2clip.store import EmbeddingCache
from modeling_llm2clip.tokenization_llm2clip import tokenize_captions
from tests.builders import tiny
from tests.llm2clip.store.encoder import build, embed

EMPTY = ["", " ", "\t \r\n", "\u3000", "\u00a0", "\u2028\u2029", "\x1c\x1d\x1e\x1f", "\x85", None, float("nan")]
NO_TEXT = [0, 1.5, True, b"bytes", {"text": "a dog"}, {1}, object(), 10**400, float("inf")]
# No encoding has them.
HALVES = ["\ud83d", "a \udce9 dog", "\udc00\ud800", "\udbff" * 100]
TEXTS = [
    *("a", "\x00", "a\x00dog", "\x1b[31mred\x1b[0m", "\x7f\x80\x9f", "\ufeffa dog", "\ufffd", "\u202eabc", "a\u200bb"),
    *("é", "e\u0301", "e" + "\u0301" * 500, "ﬃ", "İ", "Å", "\u212b", "👨‍👩‍👧‍👦", "\U0010ffff", "\ue000", "👍" * 5_000),
    *("שלום", "नमस्ते", "안녕", "\u1112\u1161\u11ab", "𠜎", "<s>", "<|endoftext|>", "[MASK]", "<unk>", "{0}", "%s"),
    *("$(id)", "'; DROP TABLE images; --", '"', "\\", "../../etc/passwd", "<script>alert(1)</script>", "null"),
    *("!!python/object/apply:os.system ['id']", "{{ config }}", "true", "1e400", "a" * 100_000, "a " * 20_000),
    *("\n".join("ab" * 1_000), " a dog ", "\na dog\n", "a\n\n\ndog", "a\r\ndog", "\x0ba\x0c"),
]
generator = random.Random(2)
POINTS = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
TEXTS += ["a" + "".join(map(chr, generator.choices(POINTS, k=generator.randint(1, 40)))) for _ in range(40)]
CLEAN = [text.strip() for text in TEXTS]
MODEL, PROCESSOR = tiny.joint_model().eval(), tiny.processor()


@pytest.mark.parametrize("value", [*EMPTY, *NO_TEXT, *HALVES], ids=lambda value: ascii(value)[:12])
def test_what_is_no_text_is_refused_by_its_place(value: object) -> None:
    with pytest.raises(CaptionError, match="row 7") as error:
        captions_of({"caption": value}, "row 7", ["caption"], None)
    assert len(str(error.value).splitlines()) == 1
    assert not CONTROL_CHARACTERS.search(str(error.value))
    for door in (MODEL.encode_text, MODEL.text_model.encode):
        with pytest.raises((TypeError, ValueError), match="1"):
            door(["a dog", value], PROCESSOR.tokenizer)


def test_a_caption_has_the_same_embedding_alone_and_in_a_batch() -> None:
    together = MODEL.encode_text(TEXTS, PROCESSOR)
    torch.testing.assert_close(together, embed_captions(CLEAN, MODEL, PROCESSOR, show_progress_bar=False))
    alone = torch.cat([MODEL.encode_text([text], PROCESSOR) for text in TEXTS[::4]])
    torch.testing.assert_close(together[::4], alone, atol=1e-5, rtol=0)
    # Captions of other tokens have other embeddings, so that a wrong order would be seen.
    ids = tokenize_captions(TEXTS, PROCESSOR.tokenizer, MODEL.config.text_config).ids
    differ = torch.tensor([other != ids[0] for other in ids])
    assert ((together - together[:1]).abs().amax(dim=1) > 0).equal(differ)


def test_they_go_through_tables_and_caches(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"caption": TEXTS}).to_parquet(tmp_path / "texts.parquet")
    for streaming in (False, True):
        found = distinct_captions(CaptionSource(str(tmp_path / "texts.parquet"), streaming=streaming), False)
        assert found == list(dict.fromkeys(CLEAN))
    build(tmp_path / "cache", found)
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache.contains(CLEAN).all()
    torch.testing.assert_close(cache.lookup(found), embed(found), atol=2e-3, rtol=2e-3)
