"""A check of text models: does every caption reach all of its tokens, and nothing but its own?

Decoders with recurrent, convolutional or linear-attention layers, and decoders that make their own causal mask, accept
the inputs of a text tower but give wrong embeddings. What a decoder does with a few tokens tells them apart. The
result is recorded in the tower's config, where the code of the model reads it.

Encoders and embedding models keep their own attention (`bidirectional=None`): what they do with a text alone is right
by definition, padding must not change it, and captions share rows only where that does not change it either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.command_line.processes import on_main_process
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.compatibility_llm2clip import IS_CAUSAL_COUNTS
from modeling_llm2clip.modeling_llm2clip_decoder import (
    TESTED_TYPES,
    attention_kind,
    packs_by_flags,
    takes_additive_mask,
    window_reach,
)
from modeling_llm2clip.modeling_llm2clip_utils import evaluating, execution_device

logger = logging.getLogger(__name__)

# 1 - cosine of the states alone and in a batch that rounding explains; a real 30-layer LLM has 3e-9 in float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-2}
# Largest effect of a foreign token, as a share of that of a caption's own. It is 0 but for the rounding of some MoEs.
LEAKS = {torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Least relative change of states that see another token.
REACTION = 1e-4
CAPTION_TOKENS = 6
LAYER_FIELDS = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern")
WORKING = "llama, qwen2, qwen3, mistral, gemma3_text or phi3"


def verify_text_tower(tower: LLM2CLIPTextModel) -> list[str] | None:
    """Probe a text tower with the attention it uses now, as far as it is not known to read captions right.

    The attention is not probed of types that the tests compare. Of attention of its own, whether captions may share a
    row is probed too, unless transformers' flags say so; the tower remembers that while it is loaded.

    Returns:
        `verified_attention` of the tower's config, where what was found is recorded.

    Raises:
        ValueError: The text model cannot be a text tower.
    """
    decoder, config = tower.decoder, tower.config
    if config.bidirectional is None and _is_probeable(decoder) and _may_pack(tower):
        packs_exactly(tower)
    return config.verified_attention if config.decoder_config.model_type in TESTED_TYPES else probe_attention(tower)


def _may_pack(tower: LLM2CLIPTextModel) -> bool:
    """Whether captions may share a row if a probe finds that exact, so that it is worth running."""
    decoder = tower.decoder
    runs = _kind_here(tower) == attention_kind(decoder) and tower.has_readable_weights
    return runs and window_reach(decoder.config) != 0 and not packs_by_flags(decoder)


def probe_attention(tower: LLM2CLIPTextModel) -> list[str] | None:
    """Probe the text model of a tower of any type with the attention it uses now; see [`verify_text_tower`].

    Nothing happens if the config records that attention, the tower was made causal, or the weights are not here.
    """
    decoder, config = tower.decoder, tower.config
    if config.bidirectional is False or not _is_probeable(decoder):
        return config.verified_attention
    kind, recorded = _kind_here(tower), list(config.verified_attention or ())
    if kind in recorded:
        return recorded
    used = decoder.config._attn_implementation
    here = "eager" if kind == "mask" and not takes_additive_mask(decoder) else used
    with _undisturbed(tower), _attention(decoder, here):
        outcome = _fault(tower)
    if outcome is None:
        return config.verified_attention
    fault, error = outcome
    if fault:
        raise ValueError(_refusal(decoder.config, fault, config.bidirectional is None)) from error
    config.verified_attention = [*recorded, kind]
    if kind != "mask" and "mask" not in recorded and _passes_with_mask(tower):
        # Those who load the tower elsewhere may have no other attention than that of a mask.
        config.verified_attention.append("mask")
    return config.verified_attention


def _passes_with_mask(tower: LLM2CLIPTextModel) -> bool:
    with _undisturbed(tower), _attention(tower.decoder, "eager"):
        outcome = _fault(tower)
    return outcome is not None and not outcome[0]


def verify_on_main_process(tower: LLM2CLIPTextModel) -> None:
    """Probe a tower in one process, as others may have no weights; see [`verify_text_tower`]. All know the result."""
    verified = on_main_process(lambda: (verify_text_tower(tower), tower.exact_packing))
    tower.config.verified_attention, tower.exact_packing = verified


def probe_from_disk(
    name: str, revision: str | None = None, config: LLM2CLIPTextConfig | None = None
) -> list[str] | None:
    """Probe a text model while its weights stay on disk, with one layer at a time in memory.

    Args:
        config: How a plain text model becomes a tower.

    Returns:
        What `verified_attention` of the tower's config should be.

    Raises:
        ValueError: The text model cannot be a text tower.
    """
    with TemporaryDirectory() as unused:
        options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": unused, "dtype": "auto"}
        tower = LLM2CLIPTextModel.from_pretrained(name, revision=revision, default_config=config, **options)
        return probe_attention(tower)


def packs_exactly(tower: Any) -> bool:
    """Return whether captions may share a row with the attention in use, and remember it in `tower.exact_packing`.

    For towers with the text model's own attention, which may ignore a mask of captions or be causal.
    """
    known = tower.exact_packing
    kind = tower.decoder.config._attn_implementation
    if kind not in known:
        with _undisturbed(tower):
            caption, _, neighbours = _texts(tower)
            try:
                alone = _states_alone(tower, caption)
                # Two rows, the caption behind a neighbour.
                with _packing(tower, True):
                    packed = [_states(tower, _row(tokens, caption)) for tokens in (neighbours, neighbours.flip(0))]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                logger.info(f"{tower.decoder.config.model_type} does not read several captions in a row: {error}")
                packed = []
        precision = _precision(tower.get_input_embeddings().weight.dtype)
        known[kind] = bool(packed) and max(_apart(states, alone) for states in packed) <= TOLERANCES[precision]
    return known[kind]


@contextmanager
def _packing(tower: Any, allowed: bool) -> Iterator[None]:
    """Pack, or do not pack, captions in a tower with its text model's own attention."""
    before = tower.exact_packing
    tower.exact_packing = {tower.decoder.config._attn_implementation: allowed}
    try:
        yield
    finally:
        tower.exact_packing = before


def _states_alone(tower: Any, caption: Tensor) -> Tensor:
    """Return the float64 states `(tokens, hidden)` of a text alone, as the text model itself computes them."""
    output = tower.decoder(input_ids=caption[None].to(execution_device(tower)))
    return output.last_hidden_state[0].double().cpu()


def _apart(states: Tensor, expected: Tensor) -> float:
    return 1 - float(F.cosine_similarity(states.flatten(), expected.flatten(), dim=0))


def _row(neighbours: Tensor, caption: Tensor) -> list[Tensor]:
    """Return captions that are packed into two rows, the last one behind a neighbour."""
    return [*neighbours.split(2 * CAPTION_TOKENS), caption]


def _kind_here(tower: Any) -> str:
    """Return what to probe: the kind in use, or `mask` if the kind in use cannot run on this device or dtype."""
    kind, dtype = attention_kind(tower.decoder), tower.get_input_embeddings().weight.dtype
    anywhere = kind in ("mask", "flex_attention")
    runs = execution_device(tower).type != "cpu" and dtype in (torch.float16, torch.bfloat16)
    return kind if anywhere or runs else "mask"


def _is_probeable(decoder: Any) -> bool:
    """Whether a forward pass is possible: weights are here (not on the meta device or partitioned) and not causal."""
    embeddings = decoder.get_input_embeddings()
    weight = embeddings.weight
    # accelerate fetches offloaded weights when a layer runs.
    is_here = not weight.is_meta or hasattr(embeddings, "_hf_hook")
    return is_here and weight.numel() > 0 and (takes_additive_mask(decoder) or IS_CAUSAL_COUNTS)


@contextmanager
def _undisturbed(tower: LLM2CLIPTextModel) -> Iterator[None]:
    """Run without gradients, dropout, autocast and compilation, and leave training mode and random numbers alone.

    The tower runs as if its config recorded its attention.
    """
    device, recorded = execution_device(tower), tower.config.verified_attention
    with ExitStack() as stack:
        stack.enter_context(evaluating(tower))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # FlexAttention would be compiled for a few tokens.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        tower.config.verified_attention = ["mask", attention_kind(tower.decoder)]
        try:
            yield
        finally:
            tower.config.verified_attention = recorded


@contextmanager
def _attention(decoder: Any, implementation: str) -> Iterator[None]:
    used = decoder.config._attn_implementation
    decoder.config._attn_implementation = implementation
    try:
        yield
    finally:
        decoder.config._attn_implementation = used


def _fault(tower: Any) -> tuple[str, Exception | None] | None:
    """Return what is wrong, "" if nothing is, or None if the weights say nothing (all zero, as on some FSDP ranks)."""
    has_own = tower.config.bidirectional is None
    caption, changed, neighbours = _texts(tower)
    variants: dict[str, list[Tensor]] = {
        "its neighbour in a row": [],
        "padding": [],
        "the attention implementation": [],
    }
    try:
        alone, other = (_states_alone(tower, x) if has_own else _states(tower, [x]) for x in (caption, changed))
        if not alone.isfinite().all() or not _change(other[-1:], alone[-1:]) > REACTION:
            return None
        reaction = _change(other, alone) if has_own else _change(other[:-1], alone[:-1])
        if reaction <= REACTION:
            return None if has_own else ("a caption's first tokens do not see its last one", None)
        with _packing(tower, False):
            if has_own:
                variants["padding"].append(_states(tower, [caption]))
            for tokens in (neighbours, neighbours.flip(0)):
                if not has_own:
                    variants["its neighbour in a row"].append(_states(tower, _row(tokens, caption)))
                # Two captions of similar length are padded.
                pair = [tokens[: CAPTION_TOKENS + 2], caption]
                variants["padding"] += [
                    _states(tower, pair, padding=tokens[0], side=side) for side in ("left", "right")
                ]
            # Flash attention, for instance, leaves out the attention sinks that some decoders have.
            if not has_own and not takes_additive_mask(tower.decoder):
                with _attention(tower.decoder, "eager"):
                    variants["the attention implementation"].append(_states(tower, [caption]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shown = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"it cannot run with a mask of captions ({shown})", error
    dtype = _precision(tower.get_input_embeddings().weight.dtype)
    for what, states in variants.items():
        leak = max((_change(variant, states[0]) / reaction for variant in states), default=0.0)
        apart = max((_apart(variant, alone) for variant in states), default=0.0)
        if not (leak <= LEAKS[dtype] and apart <= TOLERANCES[dtype]):
            return f"a caption's states depend on {what} (by 1 - cosine = {apart:.2g})", None
    return "", None


def _texts(tower: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids of a caption, of the caption with another last token, and of three neighbours."""
    config, count = tower.config.decoder_config, 4 * CAPTION_TOKENS + 1
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usual = [index for index in range(tower.get_input_embeddings().weight.shape[0]) if index not in special]
    ids = torch.tensor([usual[(7 + 13 * index) % len(usual)] for index in range(count)])
    changed = torch.cat([ids[: CAPTION_TOKENS - 1], ids[-1:]])
    return ids[:CAPTION_TOKENS], changed, ids[CAPTION_TOKENS:-1]


def _states(tower: Any, captions: list[Tensor], padding: Tensor | None = None, side: str = "left") -> Tensor:
    """Return the float64 states of the last caption's tokens on the CPU, from one pass for all."""
    positions = torch.arange(max(map(len, captions)))
    lengths = torch.tensor([len(tokens) for tokens in captions])
    mask = (positions.flip(0) if side == "left" else positions) < lengths[:, None]
    ids = torch.full(mask.shape, 0 if padding is None else int(padding)).masked_scatter(mask, torch.cat(captions))
    device = execution_device(tower)
    states = tower(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
    return states[-1].double().cpu()[mask[-1]]


def _change(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())


def _precision(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype whose rounding to expect: bfloat16 for quantised weights, whose precision is not known."""
    shortened = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return dtype if dtype in TOLERANCES and not shortened else torch.bfloat16


def _refusal(config: Any, fault: str, own_attention: bool) -> str:
    attention = config._attn_implementation
    if own_attention:
        eager = "" if attention == "eager" else "attn_implementation='eager', or "
        return (
            f"{config.model_type} with {attention} attention cannot be a text tower: {fault}. Use {eager}another text "
            "model, such as bert, xlm-roberta, modernbert or t5; docs/models.md lists what is refused."
        )
    named = next((value for name in LAYER_FIELDS if (value := getattr(config, name, None))), None)
    layers = f" (layers: {', '.join(dict.fromkeys(map(str, named)))})" if named is not None else ""
    other = "" if attention in ("eager", "sdpa") else "attn_implementation='sdpa', or "
    return (
        f"{config.model_type}{layers} with {attention} attention cannot be a text tower: {fault}. A text tower needs "
        "a decoder whose layers are all attention and follow the mask that they are given; recurrent, convolutional "
        f"and linear-attention layers carry states from token to token. Use {other}another LLM, such as {WORKING}; "
        "docs/models.md lists what is refused."
    )
