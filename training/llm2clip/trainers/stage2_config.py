"""Settings of stage 2, vision alignment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import SchedulerType

from llm2clip.data import DEFAULT_MAX_PIXELS, ImageBackend, OnError
from llm2clip.losses import DEFAULT_TILE_SIZE
from llm2clip.trainers.base_config import LOSS_CHUNK_HELP, TOWER_CHUNK_HELP, StageConfig, check_chunk_sizes


@dataclass
class Stage2Config(StageConfig):
    """Settings of stage 2.

    Besides those of [`StageConfig`], these defaults differ from `TrainingArguments` (paper, appendix A, and the
    original recipe): `learning_rate=1e-5`, `weight_decay=0.05`, `max_grad_norm=5`, `lr_scheduler_type=cosine` (to
    zero, with a warm-up that starts at `1 / warmup_steps`), `num_train_epochs=4`, `per_device_train_batch_size=512`,
    `per_device_eval_batch_size=64`.
    """

    vision_model_name_or_path: str = field(default="", metadata={"help": "Pretrained vision tower: Hub id or folder."})
    text_model_name_or_path: str = field(
        default="", metadata={"help": "Frozen text tower, usually from stage 1: Hub id or folder."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "LLM2CLIP model to continue training, instead of two separate towers."}
    )
    vision_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the vision tower's Hub repo; unset: main."}
    )
    text_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the text tower's Hub repo; unset: main."}
    )
    image_processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Image processor: Hub id or folder; unset: that of the vision tower."}
    )
    sources: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Training data: a list of CaptionSource mappings. A streamed source must be the only one."},
    )
    eval_sources: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Image-text retrieval sets to evaluate: a mapping from a name to CaptionSource fields."},
    )
    embedding_cache: str | None = field(
        default=None, metadata={"help": "Folder of precomputed caption embeddings, made by `llm2clip embed`."}
    )
    verify_cache: bool = field(
        default=True,
        metadata={"help": "Check before training that the cache is undamaged and contains every caption."},
    )
    online_text_model: bool = field(
        default=False, metadata={"help": "Run the frozen LLM during training instead of reading an embedding cache."}
    )
    text_model_dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="auto", metadata={"help": "dtype of an online LLM; auto: that of its files."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the vision tower, such as sdpa or eager."}
    )
    projection_dim: int | None = field(
        default=None, metadata={"help": "Dimension of the shared embedding space; unset: 1280."}
    )
    adapter_num_layers: int | None = field(
        default=None, metadata={"help": "Number of blocks of the text adapter; unset: 4."}
    )
    adapter_expansion: int | None = field(
        default=None, metadata={"help": "Hidden width of an adapter block relative to its input; unset: 2."}
    )
    adapter_normalize: bool | None = field(
        default=None, metadata={"help": "L2-normalize the LLM's embeddings before the adapter; unset: true."}
    )
    logit_scale_init_value: float | None = field(
        default=None,
        metadata={
            "help": "Initial log of the logit scale; unset: ln(1 / 0.07), or ln 10 with the sigmoid loss. Pretrained "
            "CLIP models end at ln 100 = 4.6052."
        },
    )
    logit_bias_init_value: float | None = field(
        default=None, metadata={"help": "Initial bias of the logits, for the sigmoid loss only; unset: -10."}
    )
    loss: Literal["softmax", "sigmoid"] = field(
        default="softmax",
        metadata={"help": "softmax: InfoNCE, as in CLIP; sigmoid: that of SigLIP, with a bias."},
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower; unset: learning_rate."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the text adapter; unset: learning_rate."}
    )
    vision_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the vision tower; unset: weight_decay."}
    )
    text_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the text adapter; unset: weight_decay."}
    )
    vision_layer_decay: float = field(
        default=0.85,
        metadata={"help": "Factor on the learning rate from each vision layer to the one below; 1: none."},
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0],
        metadata={"help": "Minimum and maximum share of the image's area in a random crop; 1 1: no cropping."},
    )
    patch_dropout: float | None = field(
        default=None,
        metadata={"help": "Share of the patches that an EVA02 tower drops in training; unset: its config's value."},
    )
    image_backend: ImageBackend = field(
        default="exact",
        metadata={
            "help": "Decoder of training images. exact: Pillow, as in inference; fast: torchvision for JPEGs, up to 2 "
            "grey levels off."
        },
    )
    freeze_vision_layers: int = field(
        default=0,
        metadata={"help": "Number of lower vision layers to freeze; -n leaves the last n trainable. 0: none."},
    )
    frozen_states_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the frozen layers' outputs, which are then computed once per image, without "
            "augmentation. Needs freeze_vision_layers."
        },
    )
    on_error: OnError = field(
        default="raise", metadata={"help": "What to do with damaged images and rows without a caption."}
    )
    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS,
        metadata={"help": "Largest image to decode, in pixels; a larger one counts as damaged."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Samples in the shuffle buffer of a streamed source. Larger: better mixed."}
    )
    bundle_text_model: bool = field(
        default=False,
        metadata={"help": "Save the LLM's weights with the model; otherwise its config refers to the LLM's repo."},
    )
    tower_chunk_size: int | None = field(default=None, metadata={"help": TOWER_CHUNK_HELP})
    loss_chunk_size: int = field(default=DEFAULT_TILE_SIZE, metadata={"help": LOSS_CHUNK_HELP})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of matrices; biases, norms and learned positions have none."}
    )
    max_grad_norm: float = field(default=5.0, metadata={"help": "Maximum gradient norm, for clipping."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning rate schedule after the warm-up; cosine ends at zero."}
    )
    num_train_epochs: float = field(default=4.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Images per device and step. More images mean more negatives in the loss."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device in evaluation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_states_dir and not self.freeze_vision_layers:
            raise ValueError("frozen_states_dir needs freeze_vision_layers.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be [minimum, maximum] with 0 < minimum <= maximum <= 1, not {self.crop_scale}."
            )
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must be at least 0 and below 1, not {self.patch_dropout}.")
        check_chunk_sizes(self.tower_chunk_size, self.loss_chunk_size)
        if self.loss == "softmax" and self.logit_bias_init_value is not None:
            raise ValueError("logit_bias_init_value is for the sigmoid loss only; set loss: sigmoid.")
        if self.loss == "sigmoid" and self.label_smoothing_factor:
            raise ValueError("the sigmoid loss has no label smoothing; leave label_smoothing_factor unset.")
