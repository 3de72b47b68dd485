"""Tensor names of vision towers and of the text adapter in the checkpoints of other code."""

from __future__ import annotations

from llm2clip.convert.renaming import Layout, Rule, linears, same

ROTARY = ((r"(?:.*\.)?rope\.freqs_(?:cos|sin)", "rotary tables are computed from the config"),)

_EVA_COMMON = (
    *same("cls_token", "pos_embed"),
    *linears(
        *((name, name) for name in ("patch_embed.proj", "norm", "blocks.{n}.norm1", "blocks.{n}.norm2")),
        ("blocks.{n}.attn.proj", "blocks.{n}.attn.proj"),
    ),
)
_EVA_BIASES = tuple(
    Rule((f"blocks.{{n}}.attn.{letter}_bias",), (f"blocks.{{n}}.attn.{letter}_proj.bias",)) for letter in "qv"
)
# EVA02 in the original code; `q_bias` and `v_bias` are the older names of BAAI.
EVA02 = Layout(
    (
        *_EVA_COMMON,
        *linears(
            *((f"blocks.{{n}}.attn.{name}",) * 2 for name in ("q_proj", "k_proj", "v_proj", "inner_attn_ln")),
            *((f"blocks.{{n}}.mlp.{name}",) * 2 for name in ("w1", "w2", "w3", "ffn_ln")),
        ),
        *(Rule(rule.theirs, rule.ours, alias=True) for rule in _EVA_BIASES),
    ),
    ROTARY,
)
# The other towers of EVA-CLIP: EVA01 and EVA02-CLIP-bigE.
EVA = Layout(
    (
        *_EVA_COMMON,
        *_EVA_BIASES,
        Rule(
            ("blocks.{n}.attn.qkv.weight",),
            tuple(f"blocks.{{n}}.attn.{letter}_proj.weight" for letter in "qkv"),
        ),
        *same("blocks.{n}.gamma_1", "blocks.{n}.gamma_2"),
        *linears(*((f"blocks.{{n}}.mlp.{name}",) * 2 for name in ("fc1", "fc2"))),
    ),
    ROTARY,
)
TIMM_EVA02 = Layout(
    (
        *_EVA_COMMON,
        *linears(
            *((f"blocks.{{n}}.attn.{name}",) * 2 for name in ("q_proj", "k_proj", "v_proj")),
            ("blocks.{n}.attn.norm", "blocks.{n}.attn.inner_attn_ln"),
            ("blocks.{n}.mlp.fc1_g", "blocks.{n}.mlp.w1"),
            ("blocks.{n}.mlp.fc1_x", "blocks.{n}.mlp.w2"),
            ("blocks.{n}.mlp.fc2", "blocks.{n}.mlp.w3"),
            ("blocks.{n}.mlp.norm", "blocks.{n}.mlp.ffn_ln"),
        ),
    )
)
# The model class in the EVA02 repos of Microsoft on the Hub.
HUB_EVA02 = Layout(
    (
        Rule(("embeddings.class_embedding",), ("cls_token",), leading_axes=-2),
        Rule(("embeddings.position_embedding.weight",), ("pos_embed",), leading_axes=-1),
        *linears(
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("post_layernorm", "norm"),
            ("encoder.layers.{n}.layer_norm1", "blocks.{n}.norm1"),
            ("encoder.layers.{n}.layer_norm2", "blocks.{n}.norm2"),
            *(
                (f"encoder.layers.{{n}}.self_attn.{name}", f"blocks.{{n}}.attn.{name}")
                for name in ("q_proj", "k_proj", "v_proj", "inner_attn_ln")
            ),
            ("encoder.layers.{n}.self_attn.out_proj", "blocks.{n}.attn.proj"),
            ("encoder.layers.{n}.mlp.fc1", "blocks.{n}.mlp.w1"),
            ("encoder.layers.{n}.mlp.fc2", "blocks.{n}.mlp.w2"),
            ("encoder.layers.{n}.mlp.fc3", "blocks.{n}.mlp.w3"),
            ("encoder.layers.{n}.mlp.ffn_ln", "blocks.{n}.mlp.ffn_ln"),
        ),
    ),
    (*ROTARY, (r"embeddings\.position_ids", "an index buffer")),
)
OPENAI = Layout(
    (
        Rule(("conv1.weight",), ("embeddings.patch_embedding.weight",)),
        Rule(("class_embedding",), ("embeddings.class_embedding",)),
        Rule(("positional_embedding",), ("embeddings.position_embedding.weight",)),
        *linears(
            ("ln_pre", "pre_layrnorm"),
            ("ln_post", "post_layernorm"),
            ("transformer.resblocks.{n}.ln_1", "encoder.layers.{n}.layer_norm1"),
            ("transformer.resblocks.{n}.ln_2", "encoder.layers.{n}.layer_norm2"),
            ("transformer.resblocks.{n}.attn.out_proj", "encoder.layers.{n}.self_attn.out_proj"),
            ("transformer.resblocks.{n}.mlp.c_fc", "encoder.layers.{n}.mlp.fc1"),
            ("transformer.resblocks.{n}.mlp.c_proj", "encoder.layers.{n}.mlp.fc2"),
        ),
        *(
            Rule(
                (f"transformer.resblocks.{{n}}.attn.in_proj_{kind}",),
                tuple(f"encoder.layers.{{n}}.self_attn.{letter}_proj.{kind}" for letter in "qkv"),
            )
            for kind in ("weight", "bias")
        ),
    )
)
# The ViT of timm with attention pooling, which the original uses for SigLIP 2.
TIMM_SIGLIP = Layout(
    (
        Rule(("pos_embed",), ("embeddings.position_embedding.weight",), leading_axes=1),
        *linears(
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("norm", "post_layernorm"),
            ("blocks.{n}.norm1", "encoder.layers.{n}.layer_norm1"),
            ("blocks.{n}.norm2", "encoder.layers.{n}.layer_norm2"),
            ("blocks.{n}.attn.proj", "encoder.layers.{n}.self_attn.out_proj"),
            ("blocks.{n}.mlp.fc1", "encoder.layers.{n}.mlp.fc1"),
            ("blocks.{n}.mlp.fc2", "encoder.layers.{n}.mlp.fc2"),
            ("attn_pool.proj", "head.attention.out_proj"),
            ("attn_pool.norm", "head.layernorm"),
            ("attn_pool.mlp.fc1", "head.mlp.fc1"),
            ("attn_pool.mlp.fc2", "head.mlp.fc2"),
        ),
        *(
            Rule(
                (f"blocks.{{n}}.attn.qkv.{kind}",),
                tuple(f"encoder.layers.{{n}}.self_attn.{letter}_proj.{kind}" for letter in "qkv"),
            )
            for kind in ("weight", "bias")
        ),
        Rule(("attn_pool.latent",), ("head.probe",)),
        *(
            Rule((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), (f"head.attention.in_proj_{kind}",), (1, 2))
            for kind in ("weight", "bias")
        ),
    )
)

_ADAPTER_BLOCKS = (("{n}.ln", "blocks.{n}.norm"), ("{n}.fn.0", "blocks.{n}.fc1"), ("{n}.fn.3", "blocks.{n}.fc2"))
ADAPTER = Layout(linears(*_ADAPTER_BLOCKS, ("4", "norm"), ("5", "proj")))
SCALE = Layout(same("logit_scale"))
