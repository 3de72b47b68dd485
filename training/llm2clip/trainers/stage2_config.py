"""Settings of stage 2, vision alignment, and those of its command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from llm2clip.command_line.settings import refuse, setting
from llm2clip.data.stream_order import BLOCK, Mixing
from llm2clip.trainers.base_config import ContrastiveConfig, StageConfig
from llm2clip.trainers.joint_recipe import TOWERS, JointRecipe
from llm2clip.trainers.optimizer import IN_BACKWARD
from llm2clip.trainers.text_tower_config import LORA_SETTINGS, LoraSettings, require_lora

# Settings of a new model; a trained model brings its own.
NEW_MODEL_FIELDS = (
    *("projection_dim", "vision_pooling", "vision_layers", "adapter_num_layers", "visual_head"),
    "logit_scale_init_value",
)


@dataclass
class Stage2Config(ContrastiveConfig, StageConfig):
    """Settings of [`Stage2Trainer`].

    Besides those of [`StageConfig`], these defaults differ from `TrainingArguments` (paper, appendix A, and the
    original recipe): `learning_rate=1e-5`, `weight_decay=0.05`, `max_grad_norm=5`, `lr_scheduler_type=cosine` (to
    zero, with a warm-up that starts at `1 / warmup_steps`), `num_train_epochs=4`, `per_device_train_batch_size=64`
    (the paper: 512 on each of 8 GPUs), `per_device_eval_batch_size=64`.
    """

    feature_dropout: float | None = setting(
        None, "Dropout of the vision features in training; unset: the model's, which is 0 for a new one."
    )
    loss: Literal["softmax", "sigmoid"] = setting(
        "softmax", "softmax: InfoNCE, as in CLIP; sigmoid: that of SigLIP, with a bias."
    )
    text_losses: Literal["both", "each", "all"] = setting(
        "both",
        "Losses of two embedding caches (paper, table 8). both: one, of their rows side by side; each: one of each, "
        "with the mean in place of the other, so that the rows of one alone can be queries; all: these three.",
    )
    matryoshka_dims: list[int] = setting(
        [], "Prefixes trained as embeddings too (Matryoshka), such as 64 256; the loss is the mean."
    )
    shared_captions: Literal["positive", "separate"] = setting(
        "separate",
        "Captions that several images of a batch share. separate: each is a negative for all images but its own, as "
        "in the original code; positive: it is a correct answer for every image that has it.",
    )
    vision_learning_rate: float | None = setting(None, "Peak learning rate of the vision tower; unset: learning_rate.")
    text_learning_rate: float | None = setting(
        None, "Peak learning rate of the text adapter and of LoRA; unset: learning_rate."
    )
    vision_layer_decay: float = setting(0.85, "Learning-rate factor of each vision layer to the next; 1: none.")
    patch_dropout: float | None = setting(
        None, "Share of the patches that an EVA02 tower drops in training; unset: its config's value."
    )
    freeze_vision: Literal["none", "all"] = setting(
        "none",
        "all: only the projection and the adapter train. The command then computes each image once, and trains on its "
        "stored features; a script does so with store_pairs.",
    )
    freeze_vision_layers: int = setting(0, "Lower vision layers to freeze; -n leaves the last n trainable. 0: none.")
    save_format: Literal["merged", "adapter"] = setting(
        "merged", "What to save of an LLM with LoRA at the end: the merged weights, or the PEFT adapter alone."
    )
    learning_rate: float = setting(1e-5, "Peak learning rate.")
    weight_decay: float = setting(0.05, "Weight decay of matrices; biases, norms and learned positions have none.")
    max_grad_norm: float = setting(5.0, "Maximum gradient norm, for clipping.")
    lr_scheduler_type: SchedulerType | str = setting(
        "cosine", "Learning rate schedule after the warm-up; cosine ends at zero."
    )
    num_train_epochs: float = setting(4.0, "Passes over the training data.")
    per_device_train_batch_size: int = setting(
        64, "Images per device and step. More images mean more negatives in the loss."
    )
    per_device_eval_batch_size: int = setting(64, "Images per device in evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_vision == "all":
            names = ["freeze_vision_layers", "patch_dropout", *["vision_layer_decay"] * (self.vision_layer_decay < 1)]
            refuse(self, names, "freeze_vision: all trains no layer of the tower")
        for name in ("patch_dropout", "feature_dropout"):
            if (share := getattr(self, name)) is not None and not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {share}.")
        if (optim := OptimizerNames(self.optim).value).endswith(IN_BACKWARD):
            raise ValueError(
                f"optim is {optim}, which updates weights at one rate within the backward pass, but stage 2 has rates "
                "by tower and layer; choose another, such as galore_adamw or adamw_torch_fused."
            )
        if self.lr_scheduler_kwargs and self.lr_scheduler_type == SchedulerType.COSINE:
            raise ValueError("the cosine schedule of stage 2 has no lr_scheduler_kwargs; leave it unset.")
        if self.loss == "sigmoid":
            refuse(self, ["label_smoothing_factor"], "the sigmoid loss has none")


@dataclass
class Stage2Recipe(JointRecipe, LoraSettings, Stage2Config):
    """Settings of the command `llm2clip stage2`: those of the Trainer, the towers, the data and a new model."""

    parts: list[dict[str, Any]] = setting(
        [],
        "Parts of the run, one after another: each has settings of its own beside the shared ones, and continues with "
        "the model of the part before; with `command: align` it solves for the heads in closed form. The last one "
        "writes into output_dir, the others into its folders part1, part2, ...",
    )
    model_name_or_path: str | None = setting(
        None, "LLM2CLIP model to continue training, instead of two towers.", affects_numbers=False
    )
    mixing: Mixing = setting(
        "one_source_per_step",
        "Batches of several sources. one_source_per_step: the rows of a step come from one of them, in proportion to "
        "their sizes, as in the original code, or by their weights; proportional: from all of them, each other's "
        "negatives, every row once in an epoch; weights: from all of them, evenly, by their weights.",
    )
    shuffle_block: int = setting(
        BLOCK,
        "Rows of a stream that are read in sequence and shuffled together. A batch has rows of at least 64 such "
        "blocks, from all of the data, which a run holds in memory. 0: files and rows in order.",
    )
    crop_scale: list[float] = setting([0.9, 1.0], "Minimum and maximum share of the area in a random crop; 1 1: none.")
    feature_views: int = setting(
        1, "Views of each image whose features are stored: that of evaluation, and random crops (crop_scale)."
    )
    online_text_model: bool = setting(False, "Run the frozen LLM in training instead of reading an embedding cache.")
    lora_rank: int = setting(0, "Rank of LoRA on the LLM, which then trains too, from captions. 0: the LLM is frozen.")
    text_model_dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "auto", "dtype of an LLM that runs; auto: that of its files."
    )
    visual_head: Literal["linear", "gated"] | None = setting(
        None, "Projection of the vision features: linear, or gated, the head of SAIL. Unset: linear."
    )
    logit_scale_init_value: float | Literal["checkpoint"] | None = setting(
        None,
        "Initial log of the logit scale; checkpoint: that of the vision tower's CLIP checkpoint. Unset: checkpoint "
        "if it has one, otherwise ln(1 / 0.07); ln 10 with the sigmoid loss.",
    )

    @property
    def runs_text_model(self) -> bool:
        """Whether the LLM runs in training, frozen or not."""
        return self.online_text_model or self.lora_rank > 0

    @property
    def streams(self) -> bool:
        several = len(self.sources) > 1
        return super().streams or (several and self.mixing == "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts:  # each of which is checked with its own settings
            return
        self.validate_data()
        self._validate_lora()
        self._validate_frozen()
        self.crop_scale = [*self.crop_scale]
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be [minimum, maximum] with 0 < minimum <= maximum <= 1, not {self.crop_scale}."
            )
        if self.shuffle_block < 0:
            raise ValueError(f"shuffle_block must be at least 0, but is {self.shuffle_block}.")
        if not self.runs_text_model:
            refuse(self, ["text_model_dtype"], "no LLM runs (online_text_model, lora_rank)")
        if not any(source.get("streaming") for source in self.sources):
            refuse(self, ["shuffle_block"], "no source is a stream (streaming: true)")
        if self.model_name_or_path is not None:
            refuse(self, [*TOWERS, *NEW_MODEL_FIELDS], f"{self.model_name_or_path} is already trained")

    def _validate_lora(self) -> None:
        require_lora(self, [*LORA_SETTINGS, "save_format"])
        if self.lora_rank and (self.caches or self.eval_embedding_cache):
            raise ValueError(
                "lora_rank trains the LLM, so that stored embeddings would be stale; leave embedding_cache (of the "
                "sources too) and eval_embedding_cache unset."
            )

    def _validate_frozen(self) -> None:
        if self.freeze_vision != "all":
            refuse(self, ["feature_cache", "feature_dtype", "feature_views"], "it needs freeze_vision: all")
            return
        if self.feature_views < 1:
            raise ValueError(f"feature_views must be at least 1, but is {self.feature_views}.")
        if self.feature_views == 1:
            refuse(self, ["crop_scale"], "images are stored without crops, see feature_views")
        if self.streams:
            raise ValueError(
                "freeze_vision: all reads stored features at random: no source can be a stream or have a weight."
            )
        if self.runs_text_model:
            raise ValueError(
                "freeze_vision: all reads stored embeddings of the LLM: give embedding_cache, and unset "
                "online_text_model and lora_rank."
            )
