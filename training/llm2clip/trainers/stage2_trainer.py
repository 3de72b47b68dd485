"""Stage 2, vision alignment: vision tower and adapter are trained against the LLM (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, SchedulerType

from llm2clip.command_line.processes import gather_results
from llm2clip.command_line.settings import refuse
from llm2clip.data import Stage2Collator
from llm2clip.encoders.cache_of_model import refuse_other_text_tower
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.evaluation.data import RetrievalData
from llm2clip.files.atomic import digest_json
from llm2clip.hub.cards.facts import JOINT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.losses import clip_loss, sigmoid_loss
from llm2clip.models.attention_probe import probe_on_main_process
from llm2clip.models.identity import preprocessing
from llm2clip.store import EmbeddingCache
from llm2clip.trainers.base_trainer import EmbeddedBatch, StageTrainer
from llm2clip.trainers.bundling import bundle_text_model
from llm2clip.trainers.freezing import prepare_joint_model
from llm2clip.trainers.grad_cache import in_chunks
from llm2clip.trainers.joint_model import measure_retrieval
from llm2clip.trainers.lora import load_with_adapter, require_outside, trains_lora, write_adapter
from llm2clip.trainers.optimizer import GROUP_SETTINGS, ClampLogitScale, grouped_optimizer, warmup_cosine_schedule
from llm2clip.trainers.sharding import at_root, is_sharded
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stage2_rows import CAPTION_INPUTS, validate_settings, with_each_alone
from llm2clip.trainers.text_tower_trainer import sampled_digest
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.modeling_llm2clip_utils import OWN_TEXT_MODEL, TEXT_MODEL


class Stage2Trainer(StageTrainer):
    """Trains the vision tower and the text adapter of an [`LLM2CLIPModel`] against its frozen LLM, or with its LoRA.

    The rows of its data sets are dicts of an image (`pixel_values`, or `image`) and its caption (`llm_embeds`, the
    LLM's embedding, or `input_ids`, or `caption`); see [`Stage2Collator`], which also crops at random
    (`crop_scale`). Rows with `llm_embeds` need no LLM. An order and resumed runs that depend on the seed alone are
    those of a [`CaptionImageDataset`] (`of_table` makes one of a table). What a frozen tower makes of the images is a
    data set that is made before ([`store_pairs`]), and LoRA layers are added to the model before ([`add_lora`]).

    ```python
    model = LLM2CLIPModel.from_pretrained("model", text_model=False)
    processor = AutoProcessor.from_pretrained("model")
    args = Stage2Config(output_dir="stage2")
    Stage2Trainer(model=model, args=args, train_dataset=dataset, processing_class=processor).train()
    ```

    Args:
        processing_class: An `LLM2CLIPProcessor`; for rows without `image` a tokenizer is enough, and for rows with
            `llm_embeds` an image processor.
        cache: The LLM's embeddings of the captions; with one, rows with a `caption` need no LLM.
        embed: Maps captions to the LLM's embeddings, for the retrieval sets; by default those of `cache`, or the
            model's LLM.
        kwargs: See [`StageTrainer`].

    Raises:
        ValueError: A setting cannot be followed with this model or these rows.
    """

    card_task = JOINT_TASK
    evaluation_title = "image-text retrieval"
    load_options: ClassVar[dict[str, Any]] = {"text_model": False}
    config_class: ClassVar[type] = Stage2Config
    retrieval_class: ClassVar[type] = RetrievalData
    args: Stage2Config

    def __init__(
        self,
        model: Any = None,
        args: Stage2Config | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        cache: EmbeddingCache | None = None,
        embed: Callable[[list[str]], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if cache is not None and not isinstance(cache, EmbeddingCache):
            raise ValueError(f"cache is {cache!r:.80}; open it with EmbeddingCache.open.")
        if not isinstance(processing_class, LLM2CLIPProcessor | BaseImageProcessor | PreTrainedTokenizerBase | None):
            kind = type(processing_class).__name__
            raise ValueError(f"processing_class is a {kind}; give the LLM2CLIPProcessor of the model, or one half.")
        self.cache = cache or getattr(data_collator, "cache", None)
        self.embed = embed or (self._embed_online if self.cache is None else self.cache.lookup)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if isinstance(self.data_collator, Stage2Collator):
            self.data_collator = self.data_collator.for_run(self.cache, self.args.shared_captions == "positive")
        self.add_callback(ClampLogitScale())

    def _validate_settings(self) -> None:
        super()._validate_settings()
        # A loss of the caller's may have a bias, or none.
        validate_settings(self.args, self.unwrapped(), has_own_loss=self.compute_loss_func is not None)
        if self.optimizer is not None:
            refuse(self.args, GROUP_SETTINGS, "you have made the optimizer (optimizers=)")

    def prepare_model(self, model: nn.Module) -> None:
        if not isinstance(model, LLM2CLIPModel):
            raise ValueError(f"model is a {type(model).__name__}, but stage 2 trains an LLM2CLIPModel.")
        if self.cache is not None:
            config = cast(LLM2CLIPConfig, model.config)
            if config.text_model_fingerprint is not None:
                refuse_other_text_tower(self.cache.path, self.cache.manifest, config)
        if trains_lora(model.text_model):
            if self.cache is not None:
                raise ValueError("LoRA trains the LLM, so that stored embeddings would be stale; leave cache unset.")
            require_outside(model, self.args.output_dir)
            probe_on_main_process(model.text_model)
        prepare_joint_model(model, self.args)

    def default_collator(self) -> Stage2Collator:
        return Stage2Collator(self.cache, processor=cast(Any, self.processing_class))

    def evaluation_collator(self, dataset: Any) -> Callable[..., Any]:
        collator: Any = self.data_collator
        return collator.for_evaluation() if isinstance(collator, Stage2Collator) else collator

    def frozen_inputs(self) -> dict[str, str | None]:
        model = cast(LLM2CLIPModel, self.model)
        inputs = {"text encoder": model.config.text_model_fingerprint}
        if self.saves_adapter():  # the training changes it
            frozen = (pair for pair in model.text_model.named_parameters() if not pair[1].requires_grad)
            inputs = {"weights of the LLM": sampled_digest(frozen)}
        image_processor = getattr(self.processing_class, "image_processor", self.processing_class)
        if isinstance(image_processor, BaseImageProcessor):
            inputs["image processor"] = digest_json(preprocessing(image_processor))
        return inputs

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            given, trained = self.optimizer_cls_and_kwargs, cast(Any, self.model if model is None else model)
            chosen = given or self.get_optimizer_cls_and_kwargs(self.args, trained)
            # The Trainer takes these groups in place of its own, and does what else an optimizer needs.
            self.optimizer_cls_and_kwargs = grouped_optimizer(trained, self.args, *chosen)
            try:
                super().create_optimizer(trained)
            finally:
                self.optimizer_cls_and_kwargs = given
        return cast(Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type == SchedulerType.COSINE:
            scheduled = cast(Optimizer, optimizer or self.optimizer)
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warmup_cosine_schedule(scheduled, warmup_steps, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def embed_batch(self, model: nn.Module, inputs: dict[str, Any]) -> EmbeddedBatch:
        plain = self.unwrapped()
        ids = {name: inputs.pop(name, None) for name in ("caption_ids", "image_caption_ids")}
        if self.args.shared_captions == "separate":
            ids = {}
        elif ids["caption_ids"] is None:
            raise ValueError("shared_captions is positive, but the rows have no caption_id to say which share one.")
        for part in (plain.vision_model, plain.text_model):
            if part is not None and not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        if plain.text_model is not None:
            is_trained, is_stored = self.saves_adapter(), "llm_embeds" in inputs
            if is_trained and is_stored:
                raise ValueError("LoRA trains the LLM, so that llm_embeds are stale; give rows with a caption.")
            if not is_trained and not is_stored:
                inputs = self._with_llm_embeds(plain, inputs)
        # Through the wrapped model, so that DDP sees every parameter including the logit scale.
        images, texts, *numbers = in_chunks(self._embed, model, inputs, self.args.tower_chunk_size)
        # One value per row, all equal; those of the last chunk are not recomputed.
        scale, bias, *_ = [*(number[-1] for number in numbers), None]
        return EmbeddedBatch({"image_embeds": images, "text_embeds": texts}, scale, bias, ids)

    def loss_views(self, embeds: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """See [`StageTrainer`]; the texts of two encoders have several embeddings side by side (`text_losses`)."""
        for texts in embeds["text_embeds"].split(embeds["image_embeds"].shape[1], dim=-1):
            yield from super().loss_views({**embeds, "text_embeds": texts})

    def contrastive_loss(self, batch: EmbeddedBatch) -> Tensor:
        """Compute the loss of a batch; override it for a loss of your own.

        Args:
            batch: Its `embeds` are `image_embeds` and `text_embeds` of this process, `(rows, projection_dim)` each, of
                unit length. The losses of [`llm2clip.losses`] gather those of the other processes. There is a
                `logit_bias` with `loss: sigmoid`, and `ids` has `caption_ids` and `image_caption_ids` if rows share
                captions (`shared_captions: positive`).

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        options: dict[str, Any] = {**batch.embeds, **batch.ids, "logit_scale": batch.logit_scale}
        if self.args.loss == "sigmoid":
            return sigmoid_loss(**options, logit_bias=cast(Tensor, batch.logit_bias))
        return clip_loss(**options, label_smoothing=self.args.label_smoothing_factor)

    def _embed(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.args.text_losses != "both" and self.unwrapped().training:
            plain, with_both = self.unwrapped(), self.args.text_losses == "all"
            widths = [encoder["width"] for encoder in plain.config.text_config.encoders]
            inputs = with_each_alone(inputs, plain.text_adapter, widths, with_both)
        output = model(**inputs, return_logits=False)
        numbers = [number for number in (output.logit_scale, output.logit_bias) if number is not None]
        rows = len(output.image_embeds)
        texts = torch.cat(output.text_embeds.split(rows), dim=-1)
        return output.image_embeds, texts, *(number.expand(rows) for number in numbers)

    def _with_llm_embeds(self, model: LLM2CLIPModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace captions by their embeddings, so that no graph of the frozen LLM is kept or computed again."""
        captions = {name: inputs[name] for name in CAPTION_INPUTS if name in inputs}

        def embed(**tokens: Tensor) -> Tensor:
            return model.text_model(**tokens).pooler_output

        def run(model: nn.Module, chunk: dict[str, Tensor]) -> tuple[Tensor]:
            return (at_root(model, "embed_captions", embed)(**chunk),)

        with torch.no_grad(), self.accelerator.autocast():
            (embeds,) = in_chunks(run, model, captions, self.args.tower_chunk_size)
        return {name: x for name, x in inputs.items() if name not in captions} | {"llm_embeds": embeds}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            model = self.unwrapped()
            logs["logit_scale"] = math.exp(model.logit_scale.item())
            if model.logit_bias is not None:
                logs["logit_bias"] = model.logit_bias.item()
        super().log(logs, start_time)

    def measure(self, model: LLM2CLIPModel, retrieval: RetrievalData) -> dict[str, float | int]:
        args, features = self.args, getattr(self.train_dataset, "features", None)
        return measure_retrieval(
            model,
            self.processing_class,
            self.embed,
            retrieval,
            features if isinstance(features, ImageFeatures) else None,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
        )

    def _embed_online(self, captions: list[str]) -> Tensor:
        text_model = self.unwrapped().text_model
        if text_model is None:
            raise ValueError("retrieval sets need the model's LLM (model.load_text_model()), or embed=.")
        return text_model.encode(captions, cast(LLM2CLIPProcessor, self.processing_class).tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.saves_adapter():
            whole = self.accelerator.unwrap_model(model or self.model)
            load_with_adapter(whole, resume_from_checkpoint, self.is_fsdp_enabled)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def saves_adapter(self) -> bool:
        return trains_lora(self.unwrapped().text_model)

    def save_result(self, output_dir: str | Path) -> None:
        # With the LLM only if no repository has its weights.
        self.save_weights(output_dir)
        if self.args.should_save and isinstance(self.processing_class, LLM2CLIPProcessor):
            write_sentence_transformers_files(output_dir)

    def write_model(self, model: Any, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a model; LoRA layers of its LLM, with the tokenizer, into `text_model/`, which the config names."""
        if not self.saves_adapter():
            super().write_model(model, folder, weights)
            return
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        write_adapter(model, tokenizer, Path(folder, TEXT_MODEL), weights)
        config = model.config
        config.text_model_fingerprint, config.text_model_name_or_path = config.text_config.fingerprint, OWN_TEXT_MODEL
        try:
            super().write_model(model, folder, weights)
        finally:
            config.text_model_name_or_path = None

    def merge_result(self) -> None:
        if self.saves_adapter() and self.args.save_format == "merged" and not is_sharded(self.accelerator):
            self.unwrapped().text_model.merge_adapter()
            self.unwrapped().text_model.requires_grad_(False)

    def complete_result(self, output_dir: str | Path) -> None:
        # A sharded LLM is merged with its LoRA layers on the CPU, in the dtype that they were trained on.
        if self.saves_adapter() and self.args.save_format == "merged":
            dtype = self.unwrapped().text_model.get_input_embeddings().weight.dtype
            should_save, folder = self.args.should_save, Path(output_dir)
            gather_results(lambda: bundle_text_model(folder, dtype) if should_save else None)
