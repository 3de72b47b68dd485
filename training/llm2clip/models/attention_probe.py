"""A check of text models of other types than the tests compare: does a caption reach all of its tokens, and no others?

Some accept the inputs of a text tower but make a causal mask of their own, or let padding into a caption. What a model
does with a few tokens tells them apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.command_line.processes import on_main_process
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.configuration_llm2clip import output_width
from modeling_llm2clip.modeling_llm2clip_decoder import TESTED_TYPES, takes_additive_mask
from modeling_llm2clip.modeling_llm2clip_utils import evaluating, execution_device

# 1 - cosine of the states alone and in a batch that rounding explains; a real 30-layer LLM has 3e-9 in float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-2}
# Largest effect of a foreign token, as a share of that of a caption's own. It is 0 but for the rounding of some MoEs.
LEAKS = {torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Least relative change of states that see another token.
REACTION = 1e-4
CAPTION_TOKENS = 6


def probe_text_tower(tower: LLM2CLIPTextModel) -> None:
    """Probe a text tower of a type that the tests do not compare, under eager or sdpa attention.

    Nothing happens for a causal tower, nor where the weights are elsewhere, as in some processes of sharded training.

    Raises:
        ValueError: The text model cannot be a text tower.
    """
    config, embeddings = tower.config, tower.get_input_embeddings()
    weight: Any = embeddings.weight
    # accelerate fetches offloaded weights when a layer runs.
    is_here = weight.numel() > 0 and (not weight.is_meta or hasattr(embeddings, "_hf_hook"))
    model_type = config.decoder_config.model_type
    if config.bidirectional is False or model_type in TESTED_TYPES:
        return
    if not is_here or not takes_additive_mask(tower.decoder):
        return
    cause = None
    try:
        with evaluating(tower), torch.no_grad():
            fault = _fault(tower, weight.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = error
        fault = f"it cannot run with a mask of captions ({type(error).__name__}: {error})".partition("\n")[0]
    if fault is not None:
        raise ValueError(
            f"{model_type} cannot be a text tower: {fault}. Use another text model, such as "
            f"{', '.join(TESTED_TYPES)}; docs/models.md lists what is refused."
        ) from cause


def probe_on_main_process(tower: LLM2CLIPTextModel) -> None:
    """Probe a tower in one process, as others may have no weights; all raise its error. See [`probe_text_tower`]."""
    on_main_process(partial(probe_text_tower, tower))


def _fault(tower: Any, dtype: torch.dtype) -> str | None:
    """Return what is wrong; None if nothing is, or if the weights say nothing (all zero, as on some FSDP ranks)."""
    ids = torch.arange(3, 3 + 4 * CAPTION_TOKENS) * 13 % tower.get_input_embeddings().weight.shape[0]
    caption, others = ids[:CAPTION_TOKENS], ids[CAPTION_TOKENS:]
    if has_own := tower.config.bidirectional is None:
        # What the text model itself makes of a text alone is right.
        states = tower.decoder(input_ids=caption[None].to(execution_device(tower))).last_hidden_state
        alone = states[0].double().cpu()
    else:
        alone = _states(tower, [caption])
    if alone.shape[-1] != (width := output_width(tower.config.decoder_config)):
        return f"it returns states of width {alone.shape[-1]}, but its config has the width {width}"
    changed = _states(tower, [torch.cat([caption[:-1], others[-1:]])])
    if not alone.isfinite().all() or not _change(changed[-1:], alone[-1:]) > REACTION:
        return None
    reaction = _change(changed, alone) if has_own else _change(changed[:-1], alone[:-1])
    if reaction <= REACTION:
        return "a caption's first tokens do not see its last one"
    batches = [([other[: CAPTION_TOKENS + 2], caption], int(other[-1])) for other in (others, others.flip(0))]
    variants = [_states(tower, *batch, side) for batch in batches for side in ("left", "right")]
    precision = dtype if dtype in TOLERANCES and torch.get_float32_matmul_precision() == "highest" else torch.bfloat16
    leak = max(_change(states, variants[0]) / reaction for states in variants)
    apart = max(1 - float(F.cosine_similarity(states.flatten(), alone.flatten(), dim=0)) for states in variants)
    if leak <= LEAKS[precision] and apart <= TOLERANCES[precision]:
        return None
    return f"a caption's states depend on padding (by 1 - cosine = {apart:.2g})"


def _states(tower: Any, captions: list[Tensor], padding: int = 0, side: str = "left") -> Tensor:
    """Return the float64 states of the last caption's tokens on the CPU, from one pass for all."""
    positions = torch.arange(max(map(len, captions)))
    lengths = torch.tensor([len(tokens) for tokens in captions])
    mask = (positions.flip(0) if side == "left" else positions) < lengths[:, None]
    ids = torch.full(mask.shape, padding).masked_scatter(mask, torch.cat(captions))
    device = execution_device(tower)
    states = tower(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
    return states[-1].double().cpu()[mask[-1]]


def _change(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())
