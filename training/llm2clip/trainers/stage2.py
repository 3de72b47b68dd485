"""Stage 2, vision alignment: train vision tower and adapter against the frozen LLM (paper, section 3.2)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, SchedulerType, TrainerCallback, set_seed

from llm2clip.data import IMAGE_BACKENDS, CaptionSource, SampleIndexBatchSampler, SkipLog
from llm2clip.data.captioned_images import OnError
from llm2clip.data.sampling import EpochDataset
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.hub.cards import JOINT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.losses import DEFAULT_TILE_SIZE, clip_loss, sigmoid_loss
from llm2clip.trainers.base import StageConfig, StageTrainer, resume_point
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.grad_cache import LOSS_CHUNK_HELP, TOWER_CHUNK_HELP, check_chunk_sizes, in_chunks
from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.stage2_inputs import build_dataset, load_model, open_captions
from llm2clip.utils.settings import require
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor

logger = logging.getLogger(__name__)

CAPTION_INPUTS = ("input_ids", "attention_mask", "pooling_mask")


@dataclass
class Stage2Config(StageConfig):
    """Settings of stage 2.

    Besides those of [`StageConfig`], these defaults differ from `TrainingArguments` (paper, appendix A; the original's
    recipe): `learning_rate=1e-5`, `weight_decay=0.05`, `max_grad_norm=5`, `lr_scheduler_type=cosine` (to zero, and a
    warm-up that starts at `1 / warmup_steps`), `num_train_epochs=4`, `per_device_train_batch_size=512`.
    """

    vision_model_name_or_path: str = field(default="", metadata={"help": "Pretrained vision tower: Hub id or folder."})
    text_model_name_or_path: str = field(default="", metadata={"help": "Text tower of stage 1: Hub id or folder."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train an LLM2CLIP model further, instead of starting from two towers."}
    )
    vision_model_revision: str | None = field(default=None, metadata={"help": "Revision of the vision tower."})
    text_model_revision: str | None = field(default=None, metadata={"help": "Revision of the text tower."})
    image_processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Image processor; unset: the one beside the vision tower."}
    )
    sources: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "Training data: CaptionSource mappings; a streamed one stands alone."}
    )
    eval_sources: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Retrieval sets, evaluated while training: CaptionSource by name."}
    )
    embedding_cache: str | None = field(
        default=None, metadata={"help": "Folder of the captions' embeddings, from `llm2clip embed`."}
    )
    verify_cache: bool = field(
        default=True,
        metadata={"help": "Check first that every row of the cache is sound and that no caption is missing there."},
    )
    online_text_model: bool = field(
        default=False, metadata={"help": "Run the frozen LLM while training, instead of reading a cache."}
    )
    text_model_dtype: str = field(default="auto", metadata={"help": "dtype of an online LLM; auto: its own."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the vision tower."})
    projection_dim: int | None = field(default=None, metadata={"help": "Width of the shared space; unset: 1280."})
    adapter_num_layers: int | None = field(default=None, metadata={"help": "Blocks of the adapter; unset: 4."})
    adapter_expansion: int | None = field(
        default=None, metadata={"help": "Hidden width of a block over its width; unset: 2."}
    )
    adapter_normalize: bool | None = field(
        default=None, metadata={"help": "L2-normalise the LLM's embedding first; unset: true."}
    )
    logit_scale_init_value: float | None = field(
        default=None,
        metadata={"help": "Log of the initial logit scale; unset: ln(1 / 0.07), sigmoid: ln 10. Of CLIPs: 4.6052."},
    )
    logit_bias_init_value: float | None = field(
        default=None, metadata={"help": "Initial bias of the logits; unset: -10 with the sigmoid loss, else no bias."}
    )
    loss: str = field(
        default="softmax", metadata={"help": "softmax (InfoNCE), or sigmoid (SigLIP) with a learned bias."}
    )
    vision_learning_rate: float | None = field(default=None, metadata={"help": "Unset: learning_rate."})
    text_learning_rate: float | None = field(default=None, metadata={"help": "Of the adapter; unset: learning_rate."})
    vision_weight_decay: float | None = field(default=None, metadata={"help": "Unset: weight_decay."})
    text_weight_decay: float | None = field(default=None, metadata={"help": "Of the adapter; unset: weight_decay."})
    vision_layer_decay: float = field(
        default=0.85, metadata={"help": "Each layer of the vision tower learns at this times the rate of the next."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "Smallest and largest share of a random crop."}
    )
    patch_dropout: float | None = field(
        default=None,
        metadata={"help": "Share of the patches that an EVA02 tower leaves out in training; unset: its config's."},
    )
    image_backend: str = field(
        default="exact",
        metadata={"help": "Of training images. exact: Pillow; fast: JPEGs as tensors, up to 2 grey levels off."},
    )
    freeze_vision_layers: int = field(
        default=0,
        metadata={"help": "Layers of the vision tower that stay frozen; -1 freezes all but the last, and so on."},
    )
    frozen_states_dir: str | None = field(
        default=None,
        metadata={"help": "Compute the frozen layers' outputs once, without augmentation, and keep them here."},
    )
    on_error: str = field(default="raise", metadata={"help": "Damaged image or row without caption: raise or skip."})
    max_image_pixels: int = field(default=2**26, metadata={"help": "Largest image that is decoded, in pixels."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Samples that a streamed source shuffles among."})
    bundle_text_model: bool = field(
        default=False, metadata={"help": "Put the LLM's weights into the result; otherwise it names the LLM's repo."}
    )
    tower_chunk_size: int | None = field(default=None, metadata={"help": TOWER_CHUNK_HELP})
    loss_chunk_size: int = field(default=DEFAULT_TILE_SIZE, metadata={"help": LOSS_CHUNK_HELP})
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    max_grad_norm: float = 5.0
    lr_scheduler_type: SchedulerType | str = "cosine"
    num_train_epochs: float = 4.0
    per_device_train_batch_size: int = 512
    per_device_eval_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.embedding_cache is not None) == self.online_text_model:
            raise ValueError("give either embedding_cache (from `llm2clip embed`) or online_text_model: true.")
        if self.frozen_states_dir and not self.freeze_vision_layers:
            raise ValueError("frozen_states_dir needs freeze_vision_layers.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is [smallest, largest] share, within 0 and 1, but is {self.crop_scale}.")
        if self.image_backend not in IMAGE_BACKENDS:
            raise ValueError(f"image_backend must be one of {', '.join(IMAGE_BACKENDS)}, not {self.image_backend!r}.")
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is a share from 0 to below 1, but is {self.patch_dropout}.")
        check_chunk_sizes(self.tower_chunk_size, self.loss_chunk_size)
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss is softmax or sigmoid, but is {self.loss!r}.")
        if self.loss == "softmax" and self.logit_bias_init_value is not None:
            raise ValueError("logit_bias_init_value is for the sigmoid loss; add loss: sigmoid.")
        if self.loss == "sigmoid" and self.label_smoothing_factor:
            raise ValueError("the sigmoid loss has no label smoothing; leave out label_smoothing_factor.")


class ClampLogitScale(TrainerCallback):
    """Keeps the logit scale between 1 and 100 after every step of the optimiser."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            clamp_logit_scale(model)


class Stage2Trainer(StageTrainer):
    """Trains an [`LLM2CLIPModel`] whose LLM is frozen, on cached embeddings or with the LLM online.

    Args:
        frozen: The vision tower's frozen layers, where the training set holds their states.
        embed: Maps captions to the LLM's embeddings, for the retrieval sets.
        skip_log: Where skipped samples are listed.
        kwargs: See [`StageTrainer`].
    """

    card_task = JOINT_TASK
    evaluation_title = "image-text retrieval"
    load_options: ClassVar[dict[str, Any]] = {"text_model": False}

    args: Stage2Config

    def __init__(
        self,
        *,
        frozen: FrozenLayers | None = None,
        embed: Callable[[list[str]], Tensor] | None = None,
        skip_log: SkipLog | None = None,
        **kwargs: Any,
    ) -> None:
        self.frozen = frozen
        self.embed = embed
        self.skip_log = skip_log
        super().__init__(**kwargs)
        self.add_callback(ClampLogitScale())

    def batch_sampler(self) -> SampleIndexBatchSampler:
        return SampleIndexBatchSampler(
            cast(EpochDataset, self.train_dataset),
            self.args.per_device_train_batch_size,
            num_replicas=self.accelerator.num_processes,
            seed=self.args.sampling_seed,
            drop_last=self.args.dataloader_drop_last,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            model = cast(nn.Module, self.model if model is None else model)
            args = self.args
            groups = parameter_groups(
                model,
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                vision_learning_rate=args.vision_learning_rate,
                text_learning_rate=args.text_learning_rate,
                vision_weight_decay=args.vision_weight_decay,
                text_weight_decay=args.text_weight_decay,
                vision_layer_decay=args.vision_layer_decay,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type == SchedulerType.COSINE:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warmup_cosine_schedule(
                cast(Optimizer, optimizer or self.optimizer), warmup_steps, num_training_steps
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        skipped = inputs.pop("skipped", [])
        if skipped and self.skip_log is not None:
            self.skip_log.add(skipped)
        caption_ids, image_caption_ids = inputs.pop("caption_ids", None), inputs.pop("image_caption_ids", None)
        text_model = self.accelerator.unwrap_model(self.model).text_model
        if text_model is not None:
            text_model.eval()
            if self.args.tower_chunk_size is not None:
                inputs = self._with_llm_embeds(text_model, inputs)
        # Through the wrapped model, so that DDP sees every parameter, the logit scale too.
        images, texts, *numbers = in_chunks(self._embed, model, inputs, self.args.tower_chunk_size)
        embeds = {"image_embeds": images, "text_embeds": texts}
        # One number for every row; those of the last chunk are not computed again.
        scale, *bias = [number[-1] for number in numbers]
        options: dict[str, Any] = {
            **embeds,
            "logit_scale": scale,
            "caption_ids": caption_ids,
            "image_caption_ids": image_caption_ids,
            "tile_size": self.args.loss_chunk_size,
        }
        if self.args.loss == "sigmoid":
            loss = sigmoid_loss(**options, logit_bias=bias[0])
        else:
            loss = clip_loss(**options, label_smoothing=self.args.label_smoothing_factor)
        return (loss, embeds) if return_outputs else loss

    def _embed(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with contextlib.ExitStack() as stack:
            if "vision_states" in inputs:
                assert self.frozen is not None
                inputs = dict(inputs)
                inputs["pixel_values"] = stack.enter_context(self.frozen.replaced_by(inputs.pop("vision_states")))
            output = model(**inputs, return_logits=False)
        numbers = [number for number in (output.logit_scale, output.logit_bias) if number is not None]
        rows = len(output.image_embeds)
        return output.image_embeds, output.text_embeds, *(number.expand(rows) for number in numbers)

    def _with_llm_embeds(self, text_model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The captions as embeddings, so that backward does not run the frozen LLM again."""
        captions = {name: inputs[name] for name in CAPTION_INPUTS if name in inputs}
        with torch.no_grad():
            (embeds,) = in_chunks(_embed_captions, text_model, captions, self.args.tower_chunk_size)
        return {name: x for name, x in inputs.items() if name not in captions} | {"llm_embeds": embeds}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            model = self.accelerator.unwrap_model(self.model)
            logs["logit_scale"] = model.logit_scale.exp().item()
            if model.logit_bias is not None:
                logs["logit_bias"] = model.logit_bias.item()
        skipped = gather_object([self.skip_log.count if self.skip_log is not None else 0])
        if sum(skipped):
            logs["skipped_samples"] = sum(skipped)
        super().log(logs, start_time)

    def measure(self, model: LLM2CLIPModel, retrieval: ImageTextRetrieval) -> dict[str, float | int]:
        assert self.embed is not None
        return retrieval(model, self.embed, self.args.per_device_eval_batch_size, self.args.dataloader_num_workers)

    def save_result(self, output_dir: str | Path) -> None:
        """Save model, processor and code as a Hub repo holds them."""
        self.accelerator.wait_for_everyone()
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            if self.args.bundle_text_model and model.text_model is None:
                model.load_text_model()
            model.save_pretrained(output_dir, save_text_model=self.args.bundle_text_model)
            cast(LLM2CLIPProcessor, self.processing_class).save_pretrained(output_dir)
            write_sentence_transformers_files(output_dir)
        self.accelerator.wait_for_everyone()


def _embed_captions(text_model: nn.Module, captions: dict[str, Tensor]) -> tuple[Tensor]:
    return (text_model(**captions).pooler_output,)


def run(config: Stage2Config, resume: bool = False) -> dict[str, Any]:
    """Stage 2 from its settings to a Hub-ready folder in `config.output_dir`.

    Args:
        config: The settings.
        resume: Go on from the newest checkpoint.

    Returns:
        The metrics of the run: training's, and retrieval's with the prefix `eval_`.
    """
    require(config, ["sources"])
    check_pushing(config, config.text_model_name_or_path, not config.bundle_text_model, checkpoints_need_llm=True)
    checkpoint = resume_point(config, resume)
    set_seed(config.seed)
    model, processor = load_model(config)
    # A model that is trained further names its LLM itself.
    check_pushing(
        config, model.config.text_model_name_or_path, not config.bundle_text_model, checkpoints_need_llm=True
    )
    image_processor = processor.image_processor
    retrieval = {
        name: ImageTextRetrieval(
            CaptionSource.from_dict(source), image_processor, cast(OnError, config.on_error), config.max_image_pixels
        )
        for name, source in config.eval_sources.items()
    }
    captions = open_captions(config, model, processor, retrieval)
    dataset, frozen = build_dataset(config, model, image_processor)
    trainer = Stage2Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=captions.collator,
        processing_class=processor,
        frozen=frozen,
        retrieval=retrieval,
        embed=captions.embed,
        skip_log=SkipLog(Path(config.output_dir) / f"skipped-{config.process_index}.jsonl"),
    )
    return trainer.fit(checkpoint, lambda: trainer.save_result(config.output_dir))
