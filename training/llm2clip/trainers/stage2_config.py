"""Settings of stage 2, vision alignment, and those of its command."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from llm2clip.data import DEFAULT_MAX_PIXELS, ImageBackend, OnError
from llm2clip.data.stream_order import BLOCK, Mixing
from llm2clip.trainers.base_config import ContrastiveConfig, StageConfig
from llm2clip.trainers.optimizer import IN_BACKWARD
from llm2clip.trainers.text_tower_config import LoraSettings, require_lora
from llm2clip.utils.settings import refuse, setting

# Settings of a new model; a trained model brings its own.
NEW_MODEL_FIELDS = (
    *("projection_dim", "adapter_num_layers", "adapter_expansion", "adapter_normalize"),
    *("logit_scale_init_value", "logit_bias_init_value", "initializer"),
    *("vision_pooling", "visual_head", "standardize_features"),
)

# Of an embedding cache, or of two whose rows stand side by side.
Folder = str | tuple[str, ...]
Alignment = Literal["train", "closed_form", "closed_form_then_train"]
# Settings of training, which a closed form alone does not use.
TRAINING_FIELDS = (
    *("learning_rate", "vision_learning_rate", "text_learning_rate", "weight_decay", "vision_weight_decay"),
    *("text_weight_decay", "vision_layer_decay", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "loss", "shared_captions", "max_grad_norm"),
    *("matryoshka_dims", "text_losses"),
    *("distill_weight", "structure_weight", "relational_weight"),
    *("feature_dropout", "ema_half_life", "label_smoothing_factor", "adapter_num_layers", "adapter_expansion"),
    *("eval_strategy", "eval_steps", "save_strategy", "load_best_model_at_end", "initializer"),
)

# Settings of training that the distillation from a text tower does not use, since it contrasts nothing.
NOT_OF_TEXTS = (
    *("feature_dropout", "shared_captions", "matryoshka_dims", "label_smoothing_factor", "distill_weight"),
    *("text_losses", "tower_chunk_size", "loss_chunk_size"),
    *("vision_learning_rate", "vision_weight_decay", "vision_layer_decay"),
)
# What it has no use for at all, since it reads no images and takes the vision side as it is.
NOT_OF_A_KEPT_SPACE = (
    *("alignment", "ridge", "feature_cache", "feature_dtype", "feature_views"),
    *("standardize_features", "visual_head", "vision_pooling"),
)


@dataclass
class Stage2Config(LoraSettings, ContrastiveConfig, StageConfig):
    """Settings of [`Stage2Trainer`].

    Besides those of [`StageConfig`], these defaults differ from `TrainingArguments` (paper, appendix A, and the
    original recipe): `learning_rate=1e-5`, `weight_decay=0.05`, `max_grad_norm=5`, `lr_scheduler_type=cosine` (to
    zero, with a warm-up that starts at `1 / warmup_steps`), `num_train_epochs=4`, `per_device_train_batch_size=64`
    (the paper: 512 on each of 8 GPUs), `per_device_eval_batch_size=64`.
    """

    image_column: str = setting("image", "Column of images in rows of your own.")
    caption_column: str = setting("caption", "Column of captions in rows of your own.")
    projection_dim: int | None = setting(None, "Dimension of the shared embedding space; unset: 1280.")
    standardize_features: bool | None = setting(
        None,
        "Standardize the vision features and center the LLM's embeddings with statistics of the training set; unset: "
        "false.",
    )
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
    vision_weight_decay: float | None = setting(None, "Weight decay of the vision tower; unset: weight_decay.")
    text_weight_decay: float | None = setting(
        None, "Weight decay of the text adapter and of LoRA; unset: weight_decay."
    )
    vision_layer_decay: float = setting(0.85, "Learning-rate factor of each vision layer to the next; 1: none.")
    crop_scale: list[float] = setting([0.9, 1.0], "Minimum and maximum share of the area in a random crop; 1 1: none.")
    patch_dropout: float | None = setting(
        None, "Share of the patches that an EVA02 tower drops in training; unset: its config's value."
    )
    image_backend: ImageBackend = setting(
        "exact",
        "Decoder of training images. exact: Pillow, as in inference; fast: torchvision for JPEGs, up to 2 "
        "grey levels off.",
    )
    freeze_vision: Literal["none", "all"] = setting(
        "none",
        "all: only the projection and the adapter train, on the pooled features of each image, which the frozen tower "
        "computes once. Rows of a data set of your own that have no `image` are not stored: it computes them in every "
        "step. A recipe needs embedding_cache, and data that is no stream.",
    )
    warm_start: dict[str, Any] = setting(
        {},
        "Settings of a first part with freeze_vision: all, such as num_train_epochs, before this run, which continues "
        "with its model; in the folder warm_start of output_dir. Its learning_rate is by default ten times that of "
        "this run. Empty: no first part.",
    )
    alignment: Alignment = setting(
        "train",
        "How frozen towers are aligned (freeze_vision: all, or in warm_start). train: projection and adapter, by "
        "gradient descent; closed_form: linear maps, solved for in one pass without training; closed_form_then_train: "
        "heads that are trained on top of these maps, which stay.",
    )
    ridge: float | None = setting(
        None,
        "Regularisation of the closed form, as a share of the mean variance. Unset: the best on eval_sources, or 0.3 "
        "without them; projection_dim likewise, or 256.",
    )
    feature_cache: str | None = setting(
        None, "Folder of those features, which several runs can share; unset: vision_features in output_dir."
    )
    feature_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Precision in which the frozen tower computes them. bfloat16 takes half the time on processors and GPUs that "
        "have it.",
    )
    feature_views: int = setting(
        1, "Views of each image whose features are stored: that of evaluation, and random crops (crop_scale)."
    )
    distill_from: str | None = setting(
        None,
        "Model whose text embeddings of the captions the adapter learns, in place of the contrastive loss and without "
        "images, which are projected as by that model (ProCLIP, stage I). With freeze_vision: all, or in warm_start.",
    )
    distill_weight: float = setting(
        0.0,
        "Weight of a second term: image embeddings follow those of the averaged weights (ProCLIP, stage II: 0.2, with "
        "structure_weight: 255). Needs ema_half_life.",
    )
    structure_weight: float = setting(
        63.5, "In both, weight of the distances between rows of a batch to that of each row's own distance."
    )
    relational_weight: float = setting(
        0.0, "Weight of a term by which the similarities of texts follow those of the LLM's embeddings."
    )
    freeze_vision_layers: int = setting(0, "Lower vision layers to freeze; -n leaves the last n trainable. 0: none.")
    frozen_states_dir: str | None = setting(
        None,
        "Folder for the frozen layers' outputs, which are then computed once per image, without "
        "augmentation. Needs freeze_vision_layers.",
    )
    on_error: OnError = setting(
        "raise",
        "What to do with damaged images, rows without a caption, and captions without stored embedding. A cache that "
        "lacks more than a tenth of the captions is refused in any case (verify_cache), and so is a batch of which "
        "nothing is left.",
    )
    max_pixels: int = setting(DEFAULT_MAX_PIXELS, "Pixels of the largest image; larger ones are damaged.")
    lora_rank: int = setting(
        0,
        "Rank of LoRA on the LLM, which then trains too, from captions: only warm_start reads stored embeddings. 0: "
        "the LLM is frozen.",
    )
    bundle_text_model: bool = setting(
        False, "Save the LLM's weights with the model; otherwise its config refers to the LLM's repo."
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
        self.crop_scale = [*self.crop_scale]
        if self.freeze_vision == "all":
            names = ["freeze_vision_layers", "frozen_states_dir", "warm_start", "patch_dropout"]
            names += ["vision_layer_decay"] * (self.vision_layer_decay < 1)
            refuse(self, names, "freeze_vision: all trains no layer of the tower")
        elif not self.warm_start:
            names = ["feature_cache", "feature_dtype", "feature_views", "standardize_features"]
            refuse(self, names, "it needs freeze_vision: all, or warm_start")
        if (optim := OptimizerNames(self.optim).value).endswith(IN_BACKWARD):
            raise ValueError(
                f"optim is {optim}, which updates weights at one rate within the backward pass, but stage 2 has rates "
                "by tower and layer; choose another, such as galore_adamw or adamw_torch_fused."
            )
        self._check_alignment()
        self._check_lora()
        self._check_distillation()
        if not self.freeze_vision_layers:
            refuse(self, ["frozen_states_dir"], "it needs freeze_vision_layers")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be [minimum, maximum] with 0 < minimum <= maximum <= 1, not {self.crop_scale}."
            )
        for name in ("patch_dropout", "feature_dropout"):
            if (share := getattr(self, name)) is not None and not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {share}.")
        for name in ("projection_dim", "adapter_expansion", "feature_views"):
            if (size := getattr(self, name, None)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, but is {size}.")
        if self.lr_scheduler_kwargs and self.lr_scheduler_type == SchedulerType.COSINE:
            raise ValueError("the cosine schedule of stage 2 has no lr_scheduler_kwargs; leave it unset.")
        if self.loss == "sigmoid":
            refuse(self, ["label_smoothing_factor"], "the sigmoid loss has none")

    def _check_lora(self) -> None:
        """Refuse settings of LoRA without it, and those that do not go with it."""
        require_lora(self, [field.name for field in fields(LoraSettings)])
        if not self.lora_rank:
            refuse(self, ["neftune_noise_alpha"], "only lora_rank trains on tokens")
            return
        refuse(self, ["bundle_text_model"], "with lora_rank, save_format says how the LLM is saved")
        if self.freeze_vision == "all":
            raise ValueError(
                "freeze_vision: all reads stored embeddings of the LLM, which lora_rank trains; unset one of them. A "
                "first part with frozen towers is a warm_start."
            )

    def _check_alignment(self) -> None:
        """Refuse settings that a closed form would not use."""
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge must be at least 0, but is {self.ridge}.")
        if self.alignment == "train":
            refuse(self, ["ridge"], "it is for alignment: closed_form, or closed_form_then_train")
            return
        if self.freeze_vision != "all":
            raise ValueError(
                f"alignment: {self.alignment} needs frozen towers; set freeze_vision: all, or give it in warm_start."
            )
        for name in ("visual_head", "standardize_features"):
            if (value := getattr(self, name, None)) not in (None, True):
                raise ValueError(f"alignment: {self.alignment} has its own heads; unset {name}, which is {value}.")
        if self.alignment == "closed_form":
            refuse(self, (*TRAINING_FIELDS, "feature_views"), "alignment: closed_form trains nothing")

    def _check_distillation(self) -> None:
        """Refuse distillations that have no teacher, and settings that they would not use."""
        for name in ("distill_weight", "structure_weight", "relational_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, but is {getattr(self, name)}.")
        if self.ema_half_life is None:
            why = "it needs ema_half_life, whose averaged weights are the teacher (ProCLIP: a quarter of the steps)"
            refuse(self, ["distill_weight"], why)
        if self.lora_rank or self.text_losses == "each":
            refuse(self, ["relational_weight"], "it needs stored rows of captions: no lora_rank, no text_losses: each")
        distills = self.distill_from or self.distill_weight or self.warm_start.get("distill_from")
        if not distills:
            refuse(self, ["structure_weight"], "it is for distill_from and distill_weight")
        if self.distill_from is None:
            return
        if self.freeze_vision != "all":
            raise ValueError("distill_from needs frozen towers; set freeze_vision: all, or give it in warm_start.")
        names = (*NOT_OF_TEXTS, *NOT_OF_A_KEPT_SPACE)
        refuse(self, names, f"distill_from trains the adapter on texts alone, in the space of {self.distill_from}")


def as_folder(folder: Any) -> Folder | None:
    """Return the folder of an embedding cache, or those of two, as a key."""
    return tuple(folder) if isinstance(folder, list | tuple) else folder


@dataclass
class Stage2Recipe(Stage2Config):
    """Settings of the command `llm2clip stage2`: those of the Trainer, the towers, the data and a new model."""

    vision_model_name_or_path: str = setting("", "Pretrained vision tower: Hub id or folder.")
    text_model_name_or_path: str = setting("", "Frozen text tower, usually from stage 1: Hub id or folder.")
    model_name_or_path: str | None = setting(None, "LLM2CLIP model to continue training, instead of two towers.")
    vision_model_revision: str | None = setting(None, "Branch, tag or commit of the vision tower's repo; unset: main.")
    text_model_revision: str | None = setting(None, "Branch, tag or commit of the text tower's repo; unset: main.")
    image_processor_name_or_path: str | None = setting(
        None, "Image processor: Hub id or folder; unset: that of the vision tower."
    )
    sources: list[dict[str, Any]] = setting(
        [], "Training data: a list of CaptionSource mappings, streams and others together."
    )
    mixing: Mixing = setting(
        "one_source_per_step",
        "Batches of several sources. one_source_per_step: the rows of a step come from one of them, in proportion to "
        "their sizes, as in the original code, or by their weights; proportional: from all of them, each other's "
        "negatives, every row once in an epoch; weights: from all of them, evenly, by their weights.",
    )
    eval_sources: dict[str, Any] = setting(
        {}, "Image-text retrieval sets to evaluate: a mapping from a name to CaptionSource fields."
    )
    embedding_cache: str | list[str] | None = setting(
        None,
        "Folder of precomputed caption embeddings, made by `llm2clip embed`: a cache, or the sidecars of a streamed "
        "source (its own folder, if they lie beside its shards). Of two caches the rows stand side by side, and the "
        "model takes them (llm_embeds) alone: leave text_model_name_or_path unset. A source may have its own "
        "embedding_cache.",
    )
    eval_embedding_cache: str | list[str] | None = setting(
        None, "Cache with the captions of eval_sources; unset: embedding_cache, unless that contains sidecars."
    )
    verify_cache: bool = setting(True, "Check before training that the cache is undamaged and contains every caption.")
    online_text_model: bool = setting(False, "Run the frozen LLM in training instead of reading an embedding cache.")
    text_model_dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "auto", "dtype of an online LLM; auto: that of its files."
    )
    attn_implementation: str | None = setting(None, "Attention implementation of the vision tower, such as sdpa.")
    adapter_num_layers: int | None = setting(None, "Number of blocks of the text adapter; unset: 4.")
    adapter_expansion: int | None = setting(None, "Hidden width of an adapter block relative to its input; unset: 2.")
    adapter_normalize: bool | None = setting(None, "L2-normalize LLM embeddings before the adapter; unset: true.")
    vision_pooling: Literal["cls", "mean", "cls_mean"] | None = setting(
        None,
        "Features of the vision tower. cls: its own pooled output (class token or attention pooling); mean: the mean "
        "over its patches; cls_mean: both, side by side. Unset: cls.",
    )
    visual_head: Literal["linear", "gated"] | None = setting(
        None, "Projection of the vision features: linear, or gated, the head of SAIL. Unset: linear."
    )
    initializer: Literal["original", "normal"] | None = setting(
        None,
        "Initial values of a new projection and adapter. original: as the original code (EVA02's head near 0, CLIP's "
        "with standard deviation width^-0.5, the rest, as a gated head, as torch's Linear); normal: N(0, 0.02²). "
        "Unset: original.",
    )
    logit_scale_init_value: float | Literal["checkpoint"] | None = setting(
        None,
        "Initial log of the logit scale; checkpoint: that of the vision tower's CLIP checkpoint. Unset: checkpoint "
        "if it has one, otherwise ln(1 / 0.07); ln 10 with the sigmoid loss.",
    )
    logit_bias_init_value: float | None = setting(None, "Initial logit bias, for the sigmoid loss only; unset: -10.")
    shuffle_block: int = setting(
        BLOCK,
        "Rows of a stream that are read in sequence and shuffled together. A batch has rows of at least 64 such "
        "blocks, from all of the data, which a run holds in memory. 0: files and rows in order.",
    )

    @property
    def runs_text_model(self) -> bool:
        """Whether the LLM runs in training, frozen or not."""
        return self.online_text_model or self.lora_rank > 0

    @property
    def streams(self) -> bool:
        """Whether the training data is read as a stream."""
        several = len(self.sources) > 1
        drawn = self.mixing == "weights" or any(source.get("weight") is not None for source in self.sources)
        return any(source.get("streaming") for source in self.sources) or (several and drawn)

    @property
    def caches(self) -> list[Folder | None]:
        """The folder of each source's embeddings, or two of them; empty if there are none."""
        folders = [as_folder(source.get("embedding_cache") or self.embedding_cache) for source in self.sources]
        return folders if any(folders) else []

    def __post_init__(self) -> None:
        super().__post_init__()
        stored = self.freeze_vision == "all" or self.warm_start
        if stored:
            refuse(self, ["online_text_model"], "frozen towers (freeze_vision, warm_start) need an embedding_cache")
        if self.lora_rank and not self.warm_start and (self.caches or self.eval_embedding_cache):
            raise ValueError(
                "lora_rank trains the LLM, so that stored embeddings would be stale; leave embedding_cache (of the "
                "sources too) and eval_embedding_cache unset. A first part that reads them is a warm_start."
            )
        if stored and len(self.sources) > 1 and any(source.get("weight") is not None for source in self.sources):
            raise ValueError("freeze_vision: all, and warm_start, mix sources without weights; remove them.")
        if self.shuffle_block < 0:
            raise ValueError(f"shuffle_block must be at least 0, but is {self.shuffle_block}.")
        if self.loss == "softmax":
            refuse(self, ["logit_bias_init_value"], "it is for loss: sigmoid")
        refuse(self, ["image_column", "caption_column"], "a source has image_column and caption_columns of its own")
        if not self.runs_text_model:
            refuse(self, ["text_model_dtype"], "no LLM runs (online_text_model, lora_rank)")
        if not any(source.get("streaming") for source in self.sources):
            refuse(self, ["shuffle_block"], "no source is a stream (streaming: true)")
        if not self.eval_sources or not self.caches:
            refuse(self, ["eval_embedding_cache"], "there are no eval_sources, or no caption embeddings are stored")
        if self.alignment != "train" and self.model_name_or_path is not None:
            raise ValueError(
                f"alignment: {self.alignment} makes new heads; {self.model_name_or_path} has its own. Give two towers "
                "instead of it, or unset alignment."
            )
        if self.model_name_or_path is not None:
            names = [f"{tower}_model_{what}" for tower in ("vision", "text") for what in ("name_or_path", "revision")]
            refuse(self, [*names, *NEW_MODEL_FIELDS], f"{self.model_name_or_path} is already trained")
