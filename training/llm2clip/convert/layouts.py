"""Tensor names of vision towers and of the text adapter in the checkpoints of other code."""

from __future__ import annotations

from llm2clip.convert.renaming import Layout, Rule, linears, same

ROTARY = ((r"(?:.*\.)?rope\.freqs_(?:cos|sin)", "rotary tables are computed from the config"),)

_EVA02_BLOCK = (
    "norm1 norm2 attn.q_proj attn.k_proj attn.v_proj attn.inner_attn_ln attn.proj mlp.w1 mlp.w2 mlp.w3 mlp.ffn_ln"
)
_CLIP_BLOCK = "layer_norm1 layer_norm2 self_attn.out_proj mlp.fc1 mlp.fc2"


def _qkv(theirs: str, ours: str, *kinds: str) -> tuple[Rule, ...]:
    """Return the rules of one matrix for queries, keys and values, which are separate in this package."""
    return tuple(Rule((theirs + kind,), tuple(f"{ours}{part}_proj.{kind}" for part in "qkv")) for kind in kinds)


def _eva(*block: Rule) -> Layout:
    """Return the layout of a tower with the names of EVA-CLIP outside its blocks."""
    common = Layout((*same("cls_token", "pos_embed"), *linears("patch_embed.proj norm")))
    return common + Layout(block).under("blocks.{n}.", "blocks.{n}.")


def _biases(alias: bool) -> tuple[Rule, ...]:
    return tuple(Rule((f"attn.{part}_bias",), (f"attn.{part}_proj.bias",), alias=alias) for part in "qv")


# EVA02 in the original code; `q_bias` and `v_bias` are the older names of BAAI.
EVA02 = _eva(*linears(_EVA02_BLOCK), *_biases(alias=True)) + Layout((), ROTARY)
# The other towers of EVA-CLIP: EVA01 and EVA02-CLIP-bigE.
EVA = _eva(
    *linears("norm1 norm2 attn.proj mlp.fc1 mlp.fc2"),
    *same("gamma_1", "gamma_2"),
    *_qkv("attn.qkv.", "attn.", "weight"),
    *_biases(alias=False),
) + Layout((), ROTARY)
TIMM_EVA02 = _eva(
    *linears(
        "norm1 norm2 attn.q_proj attn.k_proj attn.v_proj attn.norm attn.proj mlp.fc1_g mlp.fc1_x mlp.fc2 mlp.norm",
        _EVA02_BLOCK,
    )
)
# The model class in the EVA02 repos of Microsoft on the Hub.
_HUB_BLOCK = (
    "layer_norm1 layer_norm2 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.inner_attn_ln "
    "self_attn.out_proj mlp.fc1 mlp.fc2 mlp.fc3 mlp.ffn_ln"
)
HUB_EVA02 = Layout(
    (
        Rule(("embeddings.class_embedding",), ("cls_token",), leading_axes=-2),
        Rule(("embeddings.position_embedding.weight",), ("pos_embed",), leading_axes=-1),
        *linears("embeddings.patch_embedding post_layernorm", "patch_embed.proj norm"),
    ),
    (*ROTARY, (r"embeddings\.position_ids", "an index buffer")),
) + Layout(linears(_HUB_BLOCK, _EVA02_BLOCK)).under("encoder.layers.{n}.", "blocks.{n}.")
OPENAI = Layout(
    (
        Rule(("conv1.weight",), ("embeddings.patch_embedding.weight",)),
        Rule(("class_embedding",), ("embeddings.class_embedding",)),
        Rule(("positional_embedding",), ("embeddings.position_embedding.weight",)),
        *linears("ln_pre ln_post", "pre_layrnorm post_layernorm"),
    )
) + Layout(
    (
        *linears("ln_1 ln_2 attn.out_proj mlp.c_fc mlp.c_proj", _CLIP_BLOCK),
        *_qkv("attn.in_proj_", "self_attn.", "weight", "bias"),
    )
).under("transformer.resblocks.{n}.", "encoder.layers.{n}.")
# The ViT of timm with attention pooling, which the original uses for SigLIP 2.
TIMM_SIGLIP = Layout(
    (
        Rule(("pos_embed",), ("embeddings.position_embedding.weight",), leading_axes=1),
        *linears("patch_embed.proj norm", "embeddings.patch_embedding post_layernorm"),
        *linears("attn_pool.proj attn_pool.norm", "head.attention.out_proj head.layernorm"),
        *linears("attn_pool.mlp.fc1 attn_pool.mlp.fc2", "head.mlp.fc1 head.mlp.fc2"),
        Rule(("attn_pool.latent",), ("head.probe",)),
        *(
            Rule((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), (f"head.attention.in_proj_{kind}",), (1, 2))
            for kind in ("weight", "bias")
        ),
    )
) + Layout(
    (
        *linears("norm1 norm2 attn.proj mlp.fc1 mlp.fc2", _CLIP_BLOCK),
        *_qkv("attn.qkv.", "self_attn.", "weight", "bias"),
    )
).under("blocks.{n}.", "encoder.layers.{n}.")

ADAPTER = Layout(linears("{n}.ln {n}.fn.0 {n}.fn.3 4 5", "blocks.{n}.norm blocks.{n}.fc1 blocks.{n}.fc2 norm proj"))
SCALE = Layout(same("logit_scale"))
