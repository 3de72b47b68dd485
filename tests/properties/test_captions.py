"""Every text is a caption or refused, and its embedding does not depend on the others of its batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2clip.data.captioned_images import caption_id, clean_caption
from modeling_llm2clip.tokenization_llm2clip import clean_captions, tokenize_captions
from tests.modeling_llm2clip import tiny
from tests.properties.inputs import BROKEN_TEXTS, CAPTIONS, TEXTS, quick

MODEL, TOKENIZER = tiny.joint_model().eval(), tiny.processor().tokenizer
# Repeats, and lengths of which some are cut.
BATCHES = st.lists(CAPTIONS | CAPTIONS.map(lambda text: text * 30), min_size=1, max_size=6).flatmap(
    lambda texts: st.lists(st.sampled_from(texts), min_size=1, max_size=9)
)


@quick(300)
@given(TEXTS)
def test_a_text_is_cleaned_once(text: str) -> None:
    clean = clean_caption(text)
    assert clean == (text.strip() or None)
    if clean is not None:
        assert clean_caption(clean) == clean
        assert clean_captions([text]) == [clean]
        assert caption_id(f"  {clean}\n") == caption_id(clean) >= 0
        clean.encode()


@quick(100)
@given(BROKEN_TEXTS, st.integers(0, 3))
def test_half_a_character_is_refused_by_its_place(text: str, place: int) -> None:
    with pytest.raises(TypeError, match="half a character"):
        clean_caption(text)
    batch = [*["a dog"] * place, text]
    for door in (MODEL.encode_text, MODEL.text_model.encode):
        with pytest.raises(ValueError, match=f"caption {place}, .* half a character"):
            door(batch, TOKENIZER)


@quick(60)
@given(BATCHES)
def test_tokens_do_not_depend_on_the_batch(texts: list[str]) -> None:
    together = tokenize_captions(texts, TOKENIZER, MODEL.config.text_config)
    alone = [tokenize_captions(text, TOKENIZER, MODEL.config.text_config) for text in texts]
    assert together.ids == [tokens.ids[0] for tokens in alone]
    assert together.num_cut == sum(tokens.num_cut for tokens in alone)
    assert max(map(len, together.ids)) <= TOKENIZER.model_max_length


@quick(25)
@given(BATCHES, st.none() | st.integers(1, 3))
def test_a_caption_has_the_same_embedding_alone_and_in_a_batch(texts: list[str], batch_size: int | None) -> None:
    together = MODEL.encode_text(texts, TOKENIZER, batch_size=batch_size)
    alone = torch.cat([MODEL.encode_text([text], TOKENIZER) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    # Captions of other tokens have other embeddings, so that a wrong order would be seen.
    ids = tokenize_captions(texts, TOKENIZER, MODEL.config.text_config).ids
    differ = torch.tensor([other != ids[0] for other in ids])
    assert ((alone - alone[:1]).abs().amax(dim=1) > 0).equal(differ)
