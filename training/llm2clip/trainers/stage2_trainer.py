"""Stage 2, vision alignment: vision tower and adapter are trained against the LLM (paper, section 3.2).

The LLM is frozen, or trained with LoRA (table A4). Such a model is saved with the LoRA layers in `text_model/`, until
the end of the run merges them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
    SchedulerType,
    set_seed,
)
from transformers.training_args import OptimizerNames

from llm2clip.data import Stage2Collator
from llm2clip.data.sampling import EpochBatchSampler, EpochDataset, OneSourceBatchSampler
from llm2clip.data.streams import SampleStream
from llm2clip.data.transforms import output_size
from llm2clip.encoders.cache_of_model import refuse_other_prompt
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.cards.facts import JOINT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.losses import clip_loss, sigmoid_loss
from llm2clip.store import EmbeddingCache
from llm2clip.store.manifest import refuse_other_encoder
from llm2clip.trainers.alignment import align, freeze_maps, set_heads, take_space
from llm2clip.trainers.base_config import refuse_unfollowed
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.bundling import bundle_text_model
from llm2clip.trainers.checkpoints import unlist_result
from llm2clip.trainers.distillation_terms import Terms, proclip_terms, relational_terms
from llm2clip.trainers.freezing import image_size, prepare_joint_model, store_training_set
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.grad_cache import in_chunks
from llm2clip.trainers.lora import add_lora, load_with_adapter, lora_source, write_adapter
from llm2clip.trainers.optimizer import (
    GROUP_SETTINGS,
    LOW_RANK,
    ClampLogitScale,
    parameter_groups,
    warmup_cosine_schedule,
    with_low_rank,
)
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.sharding import at_root, is_divided, is_sharded, undivided_building
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stage2_rows import (
    CAPTION_INPUTS,
    COLLATED,
    open_rows,
    refuse_unfit,
    refuse_useless,
    retrieval_scores,
    usable_processor,
    with_each_alone,
    with_images,
)
from llm2clip.trainers.stored_rows import StoredPairsDataset
from llm2clip.trainers.text_tower_trainer import sampled_digest
from llm2clip.trainers.warm_start import (
    arguments_by_name,
    continue_with,
    first_part,
    run_first_part,
    warm_start_result,
)
from llm2clip.trainers.weight_average import WeightAverage
from llm2clip.utils.attention_probe import verify_on_main_process
from llm2clip.utils.files import digest_json
from llm2clip.utils.processes import run_while_others_wait
from llm2clip.utils.settings import refuse
from llm2clip.utils.vision_identity import preprocessing
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.modeling_llm2clip_utils import OWN_TEXT_MODEL, TEXT_MODEL, unit_features

logger = logging.getLogger(__name__)


class Stage2Trainer(StageTrainer):
    """Trains the vision tower and the text adapter of an [`LLM2CLIPModel`] against its frozen LLM, or with it.

    With `lora_rank`, LoRA layers on the LLM train too, from captions: no stored embeddings are read.

    The rows of its data sets are dicts of an image (`pixel_values`, or `image`) and its caption (`llm_embeds`, the
    LLM's embedding, or `input_ids`, or `caption`); see [`Stage2Collator`]. Rows with `llm_embeds` need no LLM. A
    `datasets.Dataset` of images and captions is read as the command reads a source: random crops, order and resumed
    runs depend on the seed alone, and a frozen tower computes each image once.

    ```python
    model = LLM2CLIPModel.from_pretrained("model", text_model=False)
    processor = AutoProcessor.from_pretrained("model")
    args = Stage2Config(output_dir="stage2")
    Stage2Trainer(model=model, args=args, train_dataset=dataset, processing_class=processor).train()
    ```

    Args:
        processing_class: An `LLM2CLIPProcessor`; for rows without `image` a tokenizer is enough. An image processor,
            or that of another processor, gets the tokenizer in the folder or repo of the model.
        cache: The LLM's embeddings of the captions; with one, rows with a `caption` need no LLM.
        embed: Maps captions to the LLM's embeddings, for the retrieval sets; by default those of `cache`, or the
            model's LLM.
        kwargs: See [`StageTrainer`].

    Raises:
        ValueError: A setting cannot be followed with this model or these rows.
    """

    card_task = JOINT_TASK
    evaluation_title = "image-text retrieval"
    title = "Stage 2"
    load_options: ClassVar[dict[str, Any]] = {"text_model": False}

    config_class: ClassVar[type] = Stage2Config
    retrieval_class: ClassVar[type] = RetrievalData
    args: Stage2Config

    def __new__(cls, *args: Any, **kwargs: Any) -> Stage2Trainer:
        """Keep the arguments, also those of subclasses: a first part is trained with them too."""
        trainer = super().__new__(cls)
        trainer._given = args, kwargs
        return trainer

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
        self.cache = cache or getattr(data_collator, "cache", None)
        if isinstance(args, Stage2Config) and args.lora_rank:
            if not args.warm_start and (self.cache or embed):
                raise ValueError(
                    "lora_rank trains the LLM, so that stored embeddings would be stale; leave cache and embed unset."
                )
            # A first part has them.
            self.cache = embed = None
        if isinstance(data_collator, Stage2Collator) and data_collator.cache is None:
            data_collator = data_collator.with_cache(self.cache)
        self.embed = embed or (None if self.cache is None else self.cache.lookup)
        self._given: tuple[tuple[Any, ...], dict[str, Any]]
        self.frozen: FrozenLayers | None = None
        # The LoRA layers of the LLM are merged into it.
        self._merged = False
        # Before the state of accelerate is made, which new settings reset.
        self._first = first_part(args) if isinstance(args, Stage2Config) and args.warm_start else None
        processing_class = usable_processor(processing_class, model)
        image_processor = getattr(processing_class, "image_processor", processing_class)
        self.image_processor = image_processor if isinstance(image_processor, BaseImageProcessor) else None
        if isinstance(args, Stage2Config) and isinstance(data_collator, Stage2Collator | None):
            train_dataset = open_rows(train_dataset, args, self.image_processor)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self.add_callback(ClampLogitScale())

    def _refuse_unused(self) -> None:
        super()._refuse_unused()
        args = self.args
        if self.model_init is not None and (args.warm_start or args.alignment != "train"):
            raise ValueError("warm_start and alignment need a model; they do not work with model_init.")
        refuse_useless(args, self.train_dataset)
        is_ours = isinstance(self.train_dataset, EpochDataset | SampleStream)
        refuse_unfollowed(args, self.data_collator, COLLATED[:1] if is_ours else COLLATED)
        model = self.unwrapped()
        # A loss of the caller's may have a bias, or none.
        refuse_unfit(args, model.config, self.compute_loss_func is None and model.logit_bias is not None)
        if self.optimizer is not None:
            refuse(args, GROUP_SETTINGS, "you have made the optimizer (optimizers=)")
        kind: Any = (self.optimizer_cls_and_kwargs or (Optimizer,))[0]
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise ValueError(
                f"optimizer_cls_and_kwargs has {kind!r}, which would make parameter groups of its own, without the "
                "rates of stage 2; give a subclass of torch.optim.Optimizer, or a finished optimizer (optimizers=)."
            )
        if (optim := OptimizerNames(args.optim).value).startswith(LOW_RANK) and is_sharded(self.accelerator):
            raise ValueError(f"optim is {optim}, which projects whole matrices, but FSDP or DeepSpeed divides them.")

    def prepare_model(self, model: nn.Module) -> None:
        processor = self.image_processor
        if not isinstance(model, LLM2CLIPModel):
            raise ValueError(f"model is a {type(model).__name__}, but stage 2 trains an LLM2CLIPModel.")
        if self.args.lora_rank:
            if model.text_model is None:
                model.load_text_model()
            lora_source(model, self.args.output_dir, self._merged)
        if self.cache is not None:
            fingerprint = model.config.text_model_fingerprint
            refuse_other_encoder(self.cache.path, self.cache.manifest, fingerprint, None)
            if fingerprint is not None:
                refuse_other_prompt(self.cache.path, self.cache.manifest, cast(LLM2CLIPConfig, model.config))
        if name := self.args.distill_from or self.args.warm_start.get("distill_from"):
            if processor is None:
                raise ValueError("distill_from needs a processing_class with an image processor.")
            with undivided_building(self.args):
                take_space(model, processor, name)
        size = image_size(model) if processor is None else output_size(processor)
        self.frozen = prepare_joint_model(model, self.args, size)

    def prepare_training(self, run: RunContext) -> dict[str, float]:
        metrics = {} if self._first is None else self._warm_start(run, self._first)
        if self.args.lora_rank:
            self._add_lora()
        self.store_rows()
        return metrics

    def _add_lora(self) -> None:
        """Add LoRA layers to the LLM; the config then names no repository, as none has these weights."""
        model = cast(LLM2CLIPModel, self.model)
        if self.saves_adapter():  # of an earlier `train`
            return
        source, revision = lora_source(model, self.args.output_dir, self._merged)
        model.text_model.merge_adapter()
        add_lora(model.text_model, self.args, source, revision)
        verify_on_main_process(model.text_model)
        model.config.text_model_name_or_path = model.config.text_model_revision = None

    def saves_adapter(self) -> bool:
        text_model = self.unwrapped().text_model
        return text_model is not None and any(weight.requires_grad for weight in text_model.parameters())

    def store_rows(self) -> None:
        """Store what frozen towers or layers make of the training set, and read that instead of its images."""
        args, images = self.args, with_images(self.train_dataset)
        if images is None or not (args.freeze_vision == "all" or args.frozen_states_dir):
            return
        model, cache = cast(LLM2CLIPModel, self.model), images.make_sample.cache or self.cache
        sources = (images, cache, self.retrieval.values())
        self.train_dataset: Any = store_training_set(args, model, self.frozen, self.image_processor, *sources)
        self.train_dataset.mixing = images.mixing
        # Storing draws random numbers, and is not repeated.
        set_seed(args.seed)

    def _warm_start(self, run: RunContext, first: Stage2Config) -> dict[str, float]:
        """Take the weights of a first part with frozen towers, which is run unless it is finished."""
        result = warm_start_result(self.args) if run.resume else None
        if result is not None:
            RunContext(first).compare_settings(Path(first.output_dir))
        elif run.checkpoint is not None:
            return {}
        else:
            result = self._run_first(run, first)
        self.accelerator.wait_for_everyone()
        if run.checkpoint is None:
            continue_with(cast(LLM2CLIPModel, self.model), first, self.args.feature_dropout)
        if self.args.should_save:
            self.earlier_history = result["history"]
        return {f"warm_start_{name}": value for name, value in result["metrics"].items()}

    def _run_first(self, run: RunContext, first: Stage2Config) -> dict[str, Any]:
        """Run the first part with a Trainer of this class, and the arguments of this one; return what it measured."""
        model = cast(LLM2CLIPModel, self.model)
        # The LLM, if there is one, is not copied, and not there if it trains later: FSDP would divide it twice.
        copied = copy.deepcopy(model, {id(model.text_model): None if self.args.lora_rank else model.text_model})
        if self.args.lora_rank:
            copied.config.text_model_name_or_path, _ = lora_source(model, self.args.output_dir, self._merged)
        given = arguments_by_name(type(self), Stage2Trainer, *self._given) | {"model": copied, "args": first}
        # A command refuses the folder of another run; in Python, a part that was stopped is resumed, and one that is
        # finished and has no checkpoints begins again.
        if not run.is_command:
            unlist_result(first)
        result = run_first_part(lambda: type(self)(**given), first, bool(run.resume) if run.is_command else True)
        # As after the construction of this trainer.
        self.create_accelerator_and_postprocess()
        set_seed(self.args.seed)
        return result

    def default_collator(self) -> Stage2Collator:
        args, is_ours = self.args, isinstance(self.train_dataset, EpochDataset | SampleStream)
        return Stage2Collator(
            self.cache,
            processor=cast(Any, self.processing_class),
            on_error=args.on_error,
            max_pixels=args.max_pixels,
            image_column="image" if is_ours else args.image_column,
            caption_column="caption" if is_ours else args.caption_column,
            crop_scale=None if is_ours else args.crop_scale,
            image_backend=args.image_backend,
        )

    def evaluation_collator(self, dataset: Any) -> Callable[..., Any]:
        collator: Any = self.data_collator
        if not isinstance(collator, Stage2Collator):
            return collator
        collator = collator.for_evaluation()
        if self._has_own_collator or isinstance(dataset, EpochDataset | SampleStream):
            return collator
        collator.image_column, collator.caption_column = self.args.image_column, self.args.caption_column
        return collator

    def batch_sampler(self) -> EpochBatchSampler:
        several = len(getattr(self.train_dataset, "starts", ())) > 2
        if several and self.train_dataset.mixing == "one_source_per_step":
            return self.make_sampler(OneSourceBatchSampler)
        return super().batch_sampler()

    def frozen_inputs(self) -> dict[str, str | None]:
        model = cast(LLM2CLIPModel, self.model)
        inputs = {"text encoder": model.config.text_model_fingerprint}
        if self.args.lora_rank:  # with which that changes
            frozen = (pair for pair in model.text_model.named_parameters() if not pair[1].requires_grad)
            inputs = {"weights of the LLM": sampled_digest(frozen)}
        if self.image_processor is not None:
            inputs["image processor"] = digest_json(preprocessing(self.image_processor))
        return inputs

    @property
    def has_steps(self) -> bool:
        return self.args.alignment != "closed_form"

    def initialize_weights(self) -> dict[str, float]:
        if self.args.alignment == "train":
            return {}
        model = cast(LLM2CLIPModel, self.model)
        measure = self._mean_recall if self.retrieval else None
        wanted = self.args.ridge, self.args.projection_dim
        metrics = align(model, cast(StoredPairsDataset, self.train_dataset), self.args.alignment, *wanted, measure)
        if self.has_steps:
            freeze_maps(model)
        return metrics

    def _mean_recall(self) -> float:
        """Mean of R@1, 5 and 10 in both directions over the retrieval sets."""
        model = cast(LLM2CLIPModel, self.model).eval()
        of_sets = [self.measure(model, retrieval) for retrieval in self.retrieval.values()]
        return fmean(value for metrics in of_sets for name, value in metrics.items() if "recall@" in name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.args.alignment != "train" or self.args.warm_start.get("alignment", "train") != "train":
            trained, saved = cast(LLM2CLIPModel, self.model), LLM2CLIPConfig.from_pretrained(resume_from_checkpoint)
            set_heads(trained, saved.visual_head, saved.projection_dim)
            if self.args.alignment != "train":
                freeze_maps(trained)
        if not self.args.lora_rank:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        whole = self.accelerator.unwrap_model(model or self.model)
        load_with_adapter(whole, resume_from_checkpoint, self.is_fsdp_enabled)

    def eval_labels(self, inputs: dict[str, Any], num_rows: int) -> Any:
        if "caption_ids" not in inputs:
            return super().eval_labels(inputs, num_rows)
        return inputs["caption_ids"][:num_rows], inputs["image_caption_ids"][:num_rows]

    @staticmethod
    def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
        return retrieval_scores(prediction)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        trained: Any = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, trained)
        settings = {name: getattr(self.args, name) for name in GROUP_SETTINGS}
        groups = with_low_rank(parameter_groups(trained, **settings), options.get("params", ()))
        # The Trainer takes these in place of its own groups, and does what else an optimizer needs.
        self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        try:
            return super().create_optimizer(trained)
        finally:
            self.optimizer_cls_and_kwargs = given

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type == SchedulerType.COSINE:
            scheduled = cast(Optimizer, optimizer or self.optimizer)
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warmup_cosine_schedule(scheduled, warmup_steps, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, plain = dict(inputs), self.unwrapped()
        self.run_state.skipped.add(inputs.pop("skipped", []))
        ids = {name: inputs.pop(name, None) for name in ("caption_ids", "image_caption_ids")}
        if self.args.shared_captions == "separate":
            ids = {}
        elif ids["caption_ids"] is None:
            raise ValueError("shared_captions is positive, but the rows have no caption_id to say which share one.")
        if "teacher_embeds" in inputs:
            return self._taught(model, inputs)
        if self.args.freeze_vision == "all":
            plain.vision_model.eval()
        if self.args.lora_rank:
            if "llm_embeds" in inputs:
                raise ValueError("lora_rank trains the LLM, so that llm_embeds are stale; give rows with a caption.")
        elif plain.text_model is not None:
            plain.text_model.eval()
            if "llm_embeds" not in inputs:
                inputs = self._with_llm_embeds(plain, inputs)
        # The loss of an evaluation is the contrastive one alone, whatever the run was trained with.
        is_training = cast(nn.Module, self.model).training
        followed = self._by_average(inputs) if is_training and self.args.distill_weight else None
        # Through the wrapped model, so that DDP sees every parameter including the logit scale.
        images, texts, *numbers = in_chunks(self._embed, model, inputs, self.args.tower_chunk_size)
        several = texts.split(plain.config.projection_dim, dim=-1)
        embeds = {"image_embeds": images, "text_embeds": several[0]}
        # One value per row, all equal; those of the last chunk are not recomputed.
        scale, *bias = [number[-1] for number in numbers]
        losses = []
        for text_embeds in several:
            rows = self.without_repeats({**embeds, "text_embeds": text_embeds, **ids})
            kept, known = {name: rows[name] for name in embeds}, {name: rows[name] for name in ids}
            losses.append(self.loss_of(kept, scale, bias[0] if bias else None, known, self.args.matryoshka_dims))
        loss = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        terms: Terms = {"loss_contrastive": (1.0, loss)}
        if followed is not None:
            terms |= proclip_terms(self.args, images, followed, self.args.distill_weight)
        if is_training:
            terms |= self._relations(several[0], inputs)
        return self._sum(terms), embeds

    def _taught(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare captions with the rows of another text tower, of unit length, instead of with images."""
        texts = unit_features(model(llm_embeds=inputs["llm_embeds"]))
        terms = proclip_terms(self.args, texts, inputs["teacher_embeds"], 1.0)
        return self._sum(terms | self._relations(texts, inputs)), {"text_embeds": texts}

    def _by_average(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embed the images of a batch with the averaged weights."""
        average = cast(WeightAverage, self.average)
        images = {name: x for name, x in inputs.items() if name not in (*CAPTION_INPUTS, "llm_embeds")}

        def run(_: nn.Module, chunk: dict[str, Tensor]) -> tuple[Tensor]:
            with self._with_pixels(chunk) as pixels:
                return (unit_features(average.run(**pixels)),)

        with torch.no_grad(), self.accelerator.autocast():
            (embeds,) = in_chunks(run, self.unwrapped(), images, self.args.tower_chunk_size)
        return embeds

    def _relations(self, texts: Tensor, inputs: dict[str, Tensor]) -> Terms:
        if not self.args.relational_weight:
            return {}
        with torch.no_grad():
            rows = inputs["llm_embeds"][: len(texts)].to(texts.device).float()
            rows = self.unwrapped().text_adapter.prepare(rows)
        return relational_terms(self.args, texts, rows)

    def _sum(self, terms: Terms) -> Tensor:
        """Add up the terms of a loss with their weights; the log has each without its weight, if there are several."""
        if cast(nn.Module, self.model).training:
            self.terms = {name: term.detach() for name, (_, term) in terms.items()} if len(terms) > 1 else {}
        first, *others = (term if weight == 1 else weight * term for weight, term in terms.values())
        return sum(others, start=first)

    def contrastive_loss(
        self,
        embeds: Mapping[str, Tensor],
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        ids: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Compute the loss of a batch; override it for a loss of your own.

        Args:
            embeds: `image_embeds` and `text_embeds` of this process, `(rows, projection_dim)` each, of unit length.
                The losses of [`llm2clip.losses`] gather those of the other processes.
            logit_scale, logit_bias: Scalars; the scale is not a logarithm, and there is a bias with `loss: sigmoid`.
            ids: `caption_ids` and `image_caption_ids` if rows share captions (`shared_captions: positive`).

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        options: dict[str, Any] = {**embeds, **ids, "logit_scale": logit_scale, "tile_size": self.args.loss_chunk_size}
        if self.args.loss == "sigmoid":
            return sigmoid_loss(**options, logit_bias=cast(Tensor, logit_bias))
        return clip_loss(**options, label_smoothing=self.args.label_smoothing_factor)

    def _embed(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with self._with_pixels(inputs) as inputs:
            count = 1
            if self.args.text_losses != "both" and self.unwrapped().training:
                plain = self.unwrapped()
                widths = [encoder["width"] for encoder in plain.config.text_config.encoders]
                with_both = self.args.text_losses == "all"
                inputs, count = with_each_alone(inputs, plain.text_adapter, widths, with_both)
            output = model(**inputs, return_logits=False)
        numbers = [number for number in (output.logit_scale, output.logit_bias) if number is not None]
        rows = len(output.image_embeds)
        texts = torch.cat(output.text_embeds.split(rows), dim=-1) if count > 1 else output.text_embeds
        return output.image_embeds, texts, *(number.expand(rows) for number in numbers)

    @contextlib.contextmanager
    def _with_pixels(self, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Within this context, the tower starts from the stored states of frozen layers, if there are any."""
        if "vision_states" not in inputs:
            yield inputs
            return
        assert self.frozen is not None
        others = {name: x for name, x in inputs.items() if name != "vision_states"}
        with self.frozen.replaced_by(inputs["vision_states"]) as pixel_values:
            yield {**others, "pixel_values": pixel_values}

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
        args = self.args
        features = self.train_dataset.features if isinstance(self.train_dataset, StoredPairsDataset) else None
        encoder = StoredEncoder(model, self.processing_class, self.embed or self._embed_online, features)
        batch_size, num_workers = args.per_device_eval_batch_size, args.dataloader_num_workers
        session = Session(encoder, None, batch_size, num_workers, args.on_error, show_progress_bar=False)
        return image_text_metrics(session, retrieval)

    def _embed_online(self, captions: list[str]) -> Tensor:
        text_model = self.unwrapped().text_model
        if text_model is None:
            raise ValueError("retrieval sets need the model's LLM (model.load_text_model()), or embed=.")
        return text_model.encode(captions, cast(LLM2CLIPProcessor, self.processing_class).tokenizer)

    def save_result(self, output_dir: str | Path) -> None:
        # With the LLM only if no repository has its weights; `complete_result` adds it to the saved model.
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
        if self.saves_adapter() and self.args.save_format == "merged" and not is_divided(self.accelerator):
            self.unwrapped().text_model.merge_adapter()
            self.unwrapped().text_model.requires_grad_(False)
            self._merged = True

    def complete_result(self, output_dir: str | Path) -> None:
        folder, named = Path(output_dir), self.unwrapped().config.text_model_name_or_path is not None
        merges = self.saves_adapter() and self.args.save_format == "merged"
        if merges or (self.args.bundle_text_model and named):
            # LoRA layers are merged into weights of the dtype that they were trained on.
            dtype = self.unwrapped().text_model.get_input_embeddings().weight.dtype if merges else "auto"
            run_while_others_wait(lambda: bundle_text_model(folder, dtype), self.args.should_save)
        elif self._merged and self.args.should_save:
            # Of pushed checkpoints.
            shutil.rmtree(folder / TEXT_MODEL, ignore_errors=True)
