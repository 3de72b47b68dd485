"""Captions as tokens: parity with the original, which tokenizes prompt, instruction and caption as one text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm2clip.data import PairCollator
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.models.prompting import with_prompt
from llm2clip.models.towers import original_prompt
from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.modeling_llm2clip_text import LLM2CLIPTextModel
from modeling_llm2clip.tokenization_llm2clip import tokenize_and_cut
from tests.builders import tiny
from tests.builders.embedding_models import sentence_pieces, word_pieces
from tests.builders.students import save_student
from tests.golden import FOLDER, Golden, load_golden
from tests.modeling_llm2clip.llm2vec import FIXTURES, load_text_model

SEPARATOR = "!@#$%^&*()"
TOKENIZERS = {"llama": "llama_a", "mistral": "mistral_a", "gemma": "gemma_a", "qwen2": "qwen2_a", "phi3": "phi3_a"}
CAPTIONS = [
    "beach",
    "A red bus, seen from above!",
    "42 caf\u00e9s; \u732b",
    '"quoted" text.',
    "two  blanks\nand a row",
]


def plain(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER / f"llm2vec_{name}_hf")


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as that of Llama 2 and Phi-3: a visible blank before every text, or before the first piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        words = pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.pre_tokenizer = words
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=["\n", "B", "1", "\u00e9"], show_progress=False
    )
    # Line by line, because real vocabularies do not merge a line break with the next word.
    corpus = "\n".join([*CAPTIONS, "[INST] a cat [/INST]", "user"])
    backend.train_from_iterator(corpus.splitlines(), trainer)
    backend.pre_tokenizer = None if scheme == "normalizer" else pre_tokenizers.Metaspace(
        prepend_scheme=scheme, split=False
    )  # fmt: skip
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def test_ids_equal_the_original_for_every_prompt_template() -> None:
    """Every template of the original with every text of the fixture and more, in the bare tokenizer."""
    golden = load_golden("prompt_templates_a")
    count = 0
    for row in golden.meta["rows"]:
        model_type = row["config_class"].removesuffix("Config").lower()
        tokenizer = plain(TOKENIZERS[model_type])
        prompt = original_prompt(model_type, row["name_or_path"], row["pooling_mode"])
        prompted, _ = with_prompt(tokenizer, *prompt)
        for text, prepared in zip(golden.meta["texts"], row["vendored"], strict=True):
            # Without a template the original keeps outer white space.
            assert prompt[0] + (text.strip() if any(prompt) else text) + prompt[1] == prepared
            # The original removes the separator before it tokenizes.
            expected = "".join(prepared.split(SEPARATOR))
            expected = expected if any(prompt) else expected.strip()
            if not text:
                continue  # empty captions are refused
            ids = prompted("".join(text.split(SEPARATOR)))["input_ids"]
            assert ids == tokenizer(expected)["input_ids"], (row["name_or_path"], text)
            count += 1
        for text in CAPTIONS:
            assert prompted(text)["input_ids"] == tokenizer(prompt[0] + text + prompt[1])["input_ids"], prompt
            count += 1
    assert count == 30 * 10


@pytest.mark.parametrize("scheme", ["normalizer", "always", "first"])
@pytest.mark.parametrize(
    "prompt",
    [("[INST] ", " [/INST]"), ("", " </s>"), ("<|user|>\n", "<|end|>\n"), ("[INST]  ", "")],
)
def test_ids_equal_the_whole_text_for_sentencepiece(scheme: str, prompt: tuple[str, str], tmp_path: Path) -> None:
    tokenizer = sentencepiece(scheme)
    prompted, _ = with_prompt(tokenizer, *prompt)
    prompted.save_pretrained(tmp_path)
    for caption_tokenizer in (prompted, AutoTokenizer.from_pretrained(tmp_path)):
        for caption in CAPTIONS:
            whole = tokenizer(prompt[0] + caption + prompt[1])["input_ids"]
            assert caption_tokenizer(caption)["input_ids"] == whole, caption


@pytest.mark.parametrize("scheme", ["normalizer", "always"])
def test_outer_white_space_is_stripped_before_sentencepiece_adds_its_own(scheme: str) -> None:
    tokenizer = sentencepiece(scheme)
    prompted, _ = with_prompt(tokenizer)
    expected = tokenizer("a row")["input_ids"]
    assert tokenizer(" a row ")["input_ids"] != expected
    assert prompted(" a row\n")["input_ids"] == prompted("a row")["input_ids"] == expected


def test_an_inseparable_prompt_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece("always")
    prompted, _ = with_prompt(tokenizer, "c", "")
    assert "the prompt 'c', '' and the captions are tokenized separately" in caplog.text
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("c", "at")]
    assert prompted("at")["input_ids"] == [tokenizer.bos_token_id, *pieces[0], *pieces[1]]


def prepare(golden: Golden, folder: Path) -> tuple[LLM2CLIPTextModel, PreTrainedTokenizerFast]:
    model = load_text_model(golden, folder)
    prompt = original_prompt(model.config.decoder_config.model_type, golden.meta["name_or_path"])
    tokenizer, model.config.num_prefix_tokens = with_prompt(plain(golden.name.removeprefix("llm2vec_")), *prompt)
    return model, tokenizer


@pytest.mark.parametrize("name", FIXTURES)
def test_ids_and_pooling_masks_equal_llm2vec(name: str, tmp_path: Path) -> None:
    """With and without instruction, also where the original pools a token of the instruction (the last pair)."""
    golden = load_golden(name)
    model, tokenizer = prepare(golden, tmp_path)
    instructions, captions = zip(*golden.meta["pairs"], strict=True)
    batch, cut = PairCollator(tokenizer, model.config.num_prefix_tokens).tokenize(captions, instructions)
    inputs = golden.group("in/pairs")
    assert not cut
    for ours, theirs in (("attention_mask", "attention_mask"), ("pooling_mask", "embed_mask")):
        assert batch[ours].equal(inputs[theirs].to(batch[ours].dtype)), ours
    real = batch["attention_mask"].bool()
    assert batch["input_ids"][real].equal(inputs["input_ids"][real])


@pytest.mark.parametrize("name", FIXTURES)
def test_encode_equals_llm2vec_from_text_to_embedding(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    model, tokenizer = prepare(golden, tmp_path)
    assert golden.meta["pairs"]
    for row, (instruction, text) in enumerate(golden.meta["pairs"]):
        embedding = model.encode(text, tokenizer, instruction=instruction or None)[0]
        torch.testing.assert_close(embedding, golden["out/pairs/pooled/mean_skip1"][row], **golden.meta["tolerance"])


def test_all_doors_agree_for_a_prompt_that_ends_in_a_space(tmp_path: Path) -> None:
    """`beach` has another number of tokens after a space; every door pools all that follows the prefix."""
    golden = load_golden("llm2vec_mistral_a")
    model, tokenizer = prepare(golden, tmp_path / "golden")
    model.config.prompt_token_ids = tokenizer("")["input_ids"]
    model.save_pretrained(tmp_path / "tower")
    tokenizer.save_pretrained(tmp_path / "tower")
    write_sentence_transformers_files(tmp_path / "tower")
    captions = ["beach", "a small dog"]
    assert len(tokenizer("beach")["input_ids"]) != len(tokenizer("")["input_ids"]) + len(
        plain("mistral_a")("beach", add_special_tokens=False)["input_ids"]
    )
    expected = model.encode(captions, tokenizer)
    batch, _ = PairCollator(tokenizer, model.config.num_prefix_tokens).tokenize(captions, [None, None])
    processor = LLM2CLIPProcessor(tiny.processor().image_processor, tokenizer)
    by_tokenizer = tokenizer(captions, padding=True, return_tensors="pt")
    by_processor = processor(text=captions, return_tensors="pt")
    by_collator = {name: batch[name] for name in ("input_ids", "attention_mask", "pooling_mask")}
    loaded = SentenceTransformer(str(tmp_path / "tower"), trust_remote_code=True, device="cpu")
    with torch.no_grad():
        found = [model(**inputs).pooler_output for inputs in (by_tokenizer, by_processor, by_collator)]
    for rows in (*found, loaded.encode(captions, convert_to_tensor=True)):
        torch.testing.assert_close(rows, expected, **golden.meta["tolerance"])


def test_stage_1_reads_the_texts_of_the_original_step() -> None:
    golden = load_golden("supervised_step_a")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "supervised_step_a_hf")
    collator = PairCollator(*with_prompt(tokenizer, *original_prompt("llama", golden.meta["config"]["_name_or_path"])))
    for side, texts in zip("qdn", zip(*golden.meta["texts"], strict=True), strict=True):
        instructions, captions = zip(*(text.split(SEPARATOR) for text in texts), strict=True)
        batch, _ = collator.tokenize(captions, instructions)
        real = batch["attention_mask"].bool()
        assert batch["attention_mask"].equal(golden[f"in/{side}/attention_mask"])
        assert batch["pooling_mask"].equal(golden[f"in/{side}/embed_mask"].long())
        assert batch["input_ids"][real].equal(golden[f"in/{side}/input_ids"][real])


@pytest.mark.parametrize("scheme", ["bytes", "words", "pieces", "first", "always", "normalizer", "left"])
def test_a_cut_caption_has_the_tokens_of_truncation(scheme: str) -> None:
    """Also where a normalizer puts a space before a text, and without a prompt."""
    makers = {"bytes": tiny.plain_tokenizer, "words": word_pieces, "pieces": sentence_pieces}
    plain = makers.get(scheme, lambda: sentencepiece(scheme))() if scheme != "left" else word_pieces()
    texts = [" ".join(CAPTIONS * count).strip() for count in (1, 2, 9)] + [*CAPTIONS, "e\u0301 " * 40, "x" * 90]
    for prompt in (("", ""), ("query: ", ""), ("an image of ", "!")):
        tokenizer, _ = with_prompt(plain, *prompt, max_length=40)
        if scheme == "left":
            tokenizer.truncation_side = "left"
        for limit in (None, 21):
            ids, is_cut = tokenize_and_cut(tokenizer, texts, limit)
            expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
            whole = [len(row) > (limit or 40) for row in tokenizer(texts)["input_ids"]]
            assert any(whole)
            assert (ids["input_ids"], is_cut) == (expected, whole)
    with pytest.raises(ValueError, match="max_length 2 leaves no room for a caption"):
        tokenize_and_cut(tokenizer, texts, 2)


def in_threads(work: Callable[[int], Any], calls: int) -> list[Any]:
    """The results of calls in eight threads that change places as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(work, range(calls)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("door", ["encode_text", "processor", "query"])
def test_threads_can_share_a_tokenizer(door: str, tmp_path: Path) -> None:
    """Short and over-long captions get what one thread gives them."""
    long = "several boats are tied to a wooden pier while the sun sets behind them " * 8
    inputs = [["a dog", "two cats"], [f"{long} x"], [long, "a bird"]]
    processor = tiny.processor()
    if door == "query":
        student = save_student(tmp_path / "student")
        student.tokenizer.model_max_length = 20

        def run(texts: list[str]) -> Any:
            # As the server does, which counts the tokens of a request before it is embedded.
            return student.tokenize(texts, truncation=len(texts) > 1)
    elif door == "encode_text":
        run = partial(tiny.joint_model().encode_text, processor=processor)
    else:

        def run(texts: list[str]) -> Any:
            return processor(text=texts, return_tensors="pt")["input_ids"]

    expected = [run(texts) for texts in inputs]
    for call, result in enumerate(in_threads(lambda call: run(inputs[call % 3]), 300)):
        torch.testing.assert_close(result, expected[call % 3])
