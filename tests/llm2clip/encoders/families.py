"""Tiny models of the CLIP-like families of transformers, with tokenizers and processors of their own classes."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, BertTokenizer, CLIPTokenizer, XLMRobertaTokenizer

from .models import LENGTH, PATCH, SIZE, TOWER

VISION = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
SQUARE = {"height": SIZE, "width": SIZE}
ASCII = [chr(code) for code in range(33, 127)]
CLIP_TEXT = {**TOWER, "vocab_size": 520, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1}
BERT_TEXT = {**TOWER, "vocab_size": 200, "max_position_embeddings": LENGTH, "pad_token_id": 0}
XLM_TEXT = {**TOWER, "vocab_size": 110, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# RoBERTa numbers tokens after the padding: two rows of its table are never used.
ROBERTA_TEXT = {**XLM_TEXT, "max_position_embeddings": LENGTH + 2}
Built = tuple[Any, Any]


def bert_tokenizer() -> Any:
    """Word pieces of one letter."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ASCII, *(f"##{letter}" for letter in ASCII)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def clip_tokenizer(**fields: Any) -> Any:
    """Bytes, with the end of words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], **fields)


def xlm_tokenizer() -> Any:
    """A unigram model of letters."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *ASCII, "<mask>"]
    return XLMRobertaTokenizer(vocab=[(token, -1 - number / 100) for number, token in enumerate(tokens)])


def _pixels(name: str, **fields: Any) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil")(**fields)


def _clip_pixels() -> Any:
    return _pixels("CLIP", size={"shortest_edge": SIZE}, crop_size=SQUARE)


def _config(model_type: str, text: dict[str, Any], vision: dict[str, Any], **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **{"projection_dim": 24, **fields})


def altclip() -> Built:
    config = _config("altclip", {**ROBERTA_TEXT, "project_dim": 32}, VISION)
    return transformers.AltCLIPModel(config), transformers.AltCLIPProcessor(_clip_pixels(), xlm_tokenizer())


def align() -> Built:
    """Its images are not projected: the tower's width is that of the space."""
    vision = {
        "image_size": SIZE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "kernel_sizes": [3, 3, 5],
        "in_channels": [32, 16, 24], "out_channels": [16, 24, 32], "depthwise_padding": [], "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 6, 6], "hidden_dim": 8,
    }  # fmt: skip
    processor = transformers.AlignProcessor(_pixels("EfficientNet", size=SQUARE), bert_tokenizer())
    return transformers.AlignModel(_config("align", BERT_TEXT, vision, projection_dim=8)), processor


def _blip() -> Built:
    text = {**BERT_TEXT, "encoder_hidden_size": TOWER["hidden_size"], "is_decoder": False}
    processor = transformers.BlipProcessor(_pixels("Blip", size=SQUARE), bert_tokenizer())
    return _config("blip", text, VISION, image_text_hidden_size=24), processor


def blip() -> Built:
    config, processor = _blip()
    return transformers.BlipModel(config), processor


def blip_retrieval() -> Built:
    config, processor = _blip()
    return transformers.BlipForImageTextRetrieval(config), processor


def clipseg() -> Built:
    """Saved with its decoder, as published, and prepared larger than the tower's own size."""
    decoder = {"extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2}
    model = transformers.CLIPSegForImageSegmentation(_config("clipseg", CLIP_TEXT, VISION, **decoder))
    larger = {"height": SIZE + PATCH, "width": SIZE + PATCH}
    return model, transformers.CLIPSegProcessor(_pixels("ViT", size=larger), clip_tokenizer())


def groupvit() -> Built:
    groups = {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 2]}
    config = _config("groupvit", CLIP_TEXT, {**VISION, **groups}, projection_intermediate_dim=16)
    return transformers.GroupViTModel(config), transformers.CLIPProcessor(_clip_pixels(), clip_tokenizer())


def metaclip_2() -> Built:
    config = _config("metaclip_2", {**XLM_TEXT, "max_position_embeddings": LENGTH}, VISION)
    return transformers.MetaClip2Model(config), transformers.CLIPProcessor(_clip_pixels(), xlm_tokenizer())


def tipsv2() -> Built:
    """Its towers are of one width and not projected; a blank is the first letter of every word."""
    vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    text = {**TOWER, "vocab_size": 97, "max_position_embeddings": LENGTH}
    config = AutoConfig.for_model("tipsv2", text_config=text, vision_config=vision)
    letters = {token: number for number, token in enumerate(["<pad>", "<unk>", "▁", *ASCII])}
    words = transformers.Tipsv2Tokenizer(vocab=letters, model_max_length=LENGTH)
    return transformers.Tipsv2Model(config), transformers.Tipsv2Processor(
        transformers.Tipsv2ImageProcessor(size=SQUARE), words
    )


def owlvit() -> Built:
    processor = transformers.OwlViTProcessor(
        _pixels("OwlViT", size=SQUARE, crop_size=SQUARE), clip_tokenizer(pad_token="!")
    )
    return transformers.OwlViTModel(_config("owlvit", CLIP_TEXT, VISION)), processor


def dual_encoder() -> Built:
    """Two towers of one's own, joined by transformers."""
    towers = transformers.ViTConfig(**VISION), transformers.RobertaConfig(**ROBERTA_TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=24)
    processor = transformers.VisionTextDualEncoderProcessor(_pixels("ViT", size=SQUARE), xlm_tokenizer())
    return transformers.VisionTextDualEncoderModel(config), processor


def xclip() -> Built:
    videos = {"num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 48, "mit_num_attention_heads": 4}
    config = _config("xclip", CLIP_TEXT, {**VISION, **videos}, projection_dim=32, prompt_num_attention_heads=4)
    return transformers.XCLIPModel(config), transformers.XCLIPProcessor(_clip_pixels(), clip_tokenizer())


def blip_2() -> Built:
    language = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=200, word_embed_proj_dim=32
    )
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**TOWER, "vocab_size": 200, "encoder_hidden_size": 32},
        text_config=language.to_dict(),
        num_query_tokens=4,
    )
    processor = transformers.Blip2Processor(_pixels("Blip", size=SQUARE), bert_tokenizer())
    return transformers.Blip2Model(config), processor


def unequal() -> Built:
    """An ALIGN whose towers end in different widths, as a model that was put together wrongly."""
    model, processor = align()
    model.config.projection_dim = 24
    return transformers.AlignModel(model.config), processor
