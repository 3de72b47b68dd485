"""Stage 2, vision alignment: vision tower and adapter are trained against the frozen LLM (paper, section 3.2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, PreTrainedModel, SchedulerType, TrainerCallback

from llm2clip.data import SkipLog, Stage2Collator
from llm2clip.data.sampling import EpochBatchSampler, OneSourceBatchSampler
from llm2clip.data.transforms import output_size
from llm2clip.evaluation import ImageTextRetrieval, retrieval_metrics
from llm2clip.hub.cards.facts import JOINT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.losses import clip_loss, sigmoid_loss
from llm2clip.losses.matches import NoPairsError
from llm2clip.trainers.alignment import align, freeze_maps, set_heads
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.bundling import bundle_text_model
from llm2clip.trainers.frozen_layers import FrozenLayers, freeze_unused
from llm2clip.trainers.grad_cache import embed_captions, in_chunks
from llm2clip.trainers.optimizer import clamp_logit_scale, parameter_groups, warmup_cosine_schedule
from llm2clip.trainers.sharding import give_scalars_a_dimension, undivided, value_of, whole_weights
from llm2clip.trainers.skipped_samples import SkippedSamples
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_pairs import StoredPairsDataset
from llm2clip.utils.processes import run_while_others_wait
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor

CAPTION_INPUTS = ("input_ids", "attention_mask", "pooling_mask")
# Settings of the optimizer's parameter groups.
GROUP_SETTINGS = (
    *("learning_rate", "vision_learning_rate", "text_learning_rate"),
    *("weight_decay", "vision_weight_decay", "text_weight_decay", "vision_layer_decay"),
)


class ClampLogitScale(TrainerCallback):
    """Clamps the logit scale to 1 to 100 after every optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        clamp_logit_scale(model)


class Stage2Trainer(StageTrainer):
    """Trains the vision tower and the text adapter of an [`LLM2CLIPModel`] against its frozen LLM.

    The rows of its data sets are dicts of an image (`pixel_values`, or `image`) and its caption (`llm_embeds`, the
    LLM's embedding, or `input_ids`, or `caption`); see [`Stage2Collator`]. Rows with `llm_embeds` need no LLM.

    ```python
    model = LLM2CLIPModel.from_pretrained("model", text_model=False)
    processor = AutoProcessor.from_pretrained("model")
    args = Stage2Config(output_dir="stage2")
    Stage2Trainer(model=model, args=args, train_dataset=dataset, processing_class=processor).train()
    ```

    Args:
        frozen: Frozen layers of the vision tower, if the rows have `vision_states` that these computed.
        embed: Maps captions to the LLM's embeddings, for the retrieval sets; by default the model's LLM.
        skip_log: Lists skipped samples.
        kwargs: See [`StageTrainer`].
    """

    card_task = JOINT_TASK
    evaluation_title = "image-text retrieval"
    title = "Stage 2"
    load_options: ClassVar[dict[str, Any]] = {"text_model": False}

    args: Stage2Config

    def __init__(
        self,
        *args: Any,
        frozen: FrozenLayers | None = None,
        embed: Callable[[list[str]], Tensor] | None = None,
        skip_log: SkipLog | None = None,
        **kwargs: Any,
    ) -> None:
        self.frozen, self.embed = frozen, embed
        # The first row of the first batch, which stands in for batches whose samples are all skipped.
        self._example: dict[str, Any] | None = None
        self.skipped = SkippedSamples(skip_log)
        super().__init__(*args, **kwargs)
        self.add_callback(self.skipped)
        model = cast(LLM2CLIPModel, self.model)
        freeze_unused(model.vision_model)
        if model.text_model is not None:
            model.text_model.requires_grad_(False)
        self.add_callback(ClampLogitScale())
        for name, default in (("alignment", "train"), ("feature_dtype", "float32")):
            value = getattr(self.args, name)
            if value != default and not isinstance(self.train_dataset, StoredPairsDataset):
                raise ValueError(f"{name}: {value} needs stored features of frozen towers to train on.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            give_scalars_a_dimension(model)

    def default_collator(self, model: Any, args: Any, processing_class: Any) -> Stage2Collator:
        return Stage2Collator(processor=processing_class, on_error=args.on_error, max_pixels=args.max_pixels)

    def batch_sampler(self) -> EpochBatchSampler:
        several = len(getattr(self.train_dataset, "starts", ())) > 2
        if several and self.args.mixing == "one_source_per_step":
            return self.make_sampler(OneSourceBatchSampler)
        return super().batch_sampler()

    def frozen_inputs(self) -> dict[str, str | None]:
        return {"text encoder": cast(LLM2CLIPModel, self.model).config.text_model_fingerprint}

    @property
    def has_steps(self) -> bool:
        return self.args.alignment != "closed_form"

    def initialize_weights(self) -> dict[str, float]:
        if self.args.alignment == "train":
            return {}
        model = cast(LLM2CLIPModel, self.model)
        measure = self._mean_recall if self.retrieval else None
        wanted = self.args.ridge, self.args.projection_dim
        found = align(model, cast(StoredPairsDataset, self.train_dataset), self.args.alignment, *wanted, measure)
        if self.has_steps:
            freeze_maps(model)
        return found

    def _mean_recall(self) -> float:
        """Mean of R@1, 5 and 10 in both directions over the retrieval sets."""
        model = cast(LLM2CLIPModel, self.model).eval()
        found = [self.measure(model, retrieval) for retrieval in self.retrieval.values()]
        return fmean(value for metrics in found for name, value in metrics.items() if "recall@" in name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.args.alignment != "train":
            own, saved = cast(LLM2CLIPModel, self.model), LLM2CLIPConfig.from_pretrained(resume_from_checkpoint)
            set_heads(own, saved.visual_head, saved.projection_dim)
            freeze_maps(own)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def eval_labels(self, inputs: dict[str, Any], num_rows: int) -> Any:
        if inputs.get("is_empty") and (self._example is None or "caption_ids" in self._example):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
        if "caption_ids" not in inputs:
            return super().eval_labels(inputs, num_rows)
        return inputs["caption_ids"][:num_rows], inputs["image_caption_ids"][:num_rows]

    @staticmethod
    def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
        images, texts = (torch.as_tensor(embeds) for embeds in prediction.predictions)
        if not isinstance(prediction.label_ids, tuple):
            return retrieval_metrics(images, texts, torch.arange(len(texts))[:, None].expand(-1, 2))
        caption_ids, image_caption_ids = (ids.tolist() for ids in prediction.label_ids)
        # Rows with equal captions are one query.
        queries = {identity: row for row, identity in reversed(list(enumerate(caption_ids)))}
        positions = {identity: position for position, identity in enumerate(queries)}
        matches = [
            (positions[identity], image)
            for image, identities in enumerate(image_caption_ids)
            for identity in dict.fromkeys(identities)
            if identity in positions
        ]
        return retrieval_metrics(images, texts[list(queries.values())], torch.tensor(matches))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            model = cast(PreTrainedModel, self.model if model is None else model)
            settings = {name: getattr(self.args, name) for name in GROUP_SETTINGS}
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, **settings), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type == SchedulerType.COSINE:
            own = cast(Optimizer, optimizer or self.optimizer)
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warmup_cosine_schedule(own, warmup_steps, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = dict(inputs)
        self.skipped.add(inputs.pop("skipped", []))
        if is_empty := inputs.pop("is_empty", False):
            inputs = dict(self._example or self._blank_row())
        elif self._example is None and self.args.on_error == "skip":
            self._example = {name: value[:1].clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        ids = {name: inputs.pop(name, None) for name in ("caption_ids", "image_caption_ids")}
        if self.args.shared_captions == "separate":
            ids = {}
        text_model = self.accelerator.unwrap_model(self.model).text_model
        if text_model is not None:
            text_model.eval()
            if self.args.tower_chunk_size is not None and "llm_embeds" not in inputs:
                inputs = self._with_llm_embeds(text_model, inputs)
        # Through the wrapped model, so that DDP sees every parameter including the logit scale.
        images, texts, *numbers = in_chunks(self._embed, model, inputs, self.args.tower_chunk_size)
        if is_empty:
            images, texts = images[:0], texts[:0]
            ids = {name: None if rows is None else rows[:0] for name, rows in ids.items()}
        embeds = {"image_embeds": images, "text_embeds": texts}
        # One value per row, all equal; those of the last chunk are not recomputed.
        scale, *bias = [number[-1] for number in numbers]
        rows = self.without_repeats({**embeds, **ids})
        options: dict[str, Any] = {**rows, "logit_scale": scale, "tile_size": self.args.loss_chunk_size}
        try:
            if self.args.loss == "sigmoid":
                loss = sigmoid_loss(**options, logit_bias=bias[0])
            else:
                loss = clip_loss(**options, label_smoothing=self.args.label_smoothing_factor)
        except NoPairsError:
            # A step without gradient, of which every parameter has one that is zero.
            loss = 0 * images.sum()
            for number in (texts, scale, *bias):
                loss = loss + 0 * number.sum()
        return loss, embeds

    def _blank_row(self) -> dict[str, Tensor]:
        """Return a row in place of a first batch whose samples are all skipped, which no tower takes."""
        row = {"llm_embeds": torch.ones(1, cast(LLM2CLIPModel, self.model).config.text_config.hidden_size)}
        if isinstance(self.train_dataset, StoredPairsDataset):
            row["vision_features"] = self.train_dataset.features.read_views(np.zeros(1, dtype=np.int64))
        else:
            size = output_size(cast(LLM2CLIPProcessor, self.processing_class).image_processor)
            row["pixel_values"] = torch.zeros(1, 3, *size)
        return {name: value.to(self.args.device) for name, value in row.items()}

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
        """Replace captions by their embeddings, so that backward does not recompute the frozen LLM."""
        captions = {name: inputs[name] for name in CAPTION_INPUTS if name in inputs}
        with torch.no_grad():
            (embeds,) = in_chunks(embed_captions, text_model, captions, self.args.tower_chunk_size)
        return {name: x for name, x in inputs.items() if name not in captions} | {"llm_embeds": embeds}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            model = self.accelerator.unwrap_model(self.model)
            logs["logit_scale"] = math.exp(value_of(model.logit_scale))
            if model.logit_bias is not None:
                logs["logit_bias"] = value_of(model.logit_bias)
        if skipped := self.skipped.count():
            logs["skipped_samples"] = skipped
        super().log(logs, start_time)

    def measure(self, model: LLM2CLIPModel, retrieval: ImageTextRetrieval) -> dict[str, float | int]:
        batch_size, num_workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        return retrieval(model, self.embed or self._embed_online, batch_size, num_workers)

    def _embed_online(self, captions: list[str]) -> Tensor:
        text_model = self.accelerator.unwrap_model(self.model).text_model
        if text_model is None:
            raise ValueError("retrieval sets need the model's LLM (model.load_text_model()), or embed=.")
        return text_model.encode(captions, cast(LLM2CLIPProcessor, self.processing_class).tokenizer)

    def save_result(self, output_dir: str | Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        weights = whole_weights(self) if sharded else None
        if self.args.should_save:
            # With the LLM only if no repository has its weights; `complete_result` adds it to the saved model.
            undivided(model).save_pretrained(output_dir, state_dict=weights)
            cast(LLM2CLIPProcessor, self.processing_class).save_pretrained(output_dir)
            write_sentence_transformers_files(output_dir)

    def complete_result(self, output_dir: str | Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.args.bundle_text_model and model.config.text_model_name_or_path is not None:
            run_while_others_wait(lambda: bundle_text_model(Path(output_dir)), self.args.should_save)
