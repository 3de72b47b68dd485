"""Stage 1, caption contrastive fine-tuning: turn a causal LLM into a caption encoder (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import set_seed

from llm2clip.data import PairBatchSampler, PairCollator, PairDataset, PairSource
from llm2clip.losses import DEFAULT_TILE_SIZE, hard_negative_info_nce
from llm2clip.trainers.base import resume_point
from llm2clip.trainers.grad_cache import LOSS_CHUNK_HELP, TOWER_CHUNK_HELP, check_chunk_sizes, in_chunks
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.text_tower import TextTowerConfig, TextTowerTrainer, add_lora, load_text_tower, retrieval_sets
from llm2clip.utils.settings import require


@dataclass
class Stage1Config(TextTowerConfig):
    """Settings of stage 1.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (paper, appendix A; the
    original's recipe): `learning_rate=2e-4`, `warmup_steps=300`, `num_train_epochs=1`,
    `per_device_train_batch_size=64`.
    """

    sources: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Caption pairs: a list of PairSource mappings. A batch comes from one of them."},
    )
    scale: float = field(default=50.0, metadata={"help": "Factor between cosine and logit (1 / temperature)."})
    symmetric_loss: bool = field(
        default=False, metadata={"help": "Also retrieve anchors from positives; the paper's loss is one-directional."}
    )
    tower_chunk_size: int | None = field(default=None, metadata={"help": TOWER_CHUNK_HELP})
    loss_chunk_size: int = field(default=DEFAULT_TILE_SIZE, metadata={"help": LOSS_CHUNK_HELP})
    learning_rate: float = 2e-4
    warmup_steps: float = 300
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chunk_sizes(self.tower_chunk_size, self.loss_chunk_size)


class Stage1Trainer(TextTowerTrainer):
    """Pulls two captions of one image together and pushes the others of the global batch apart.

    `train_dataset` is a [`PairDataset`].
    """

    args: Stage1Config
    cut_captions = 0

    def batch_sampler(self) -> PairBatchSampler:
        return PairBatchSampler(
            cast(PairDataset, self.train_dataset),
            self.args.per_device_train_batch_size,
            num_replicas=self.accelerator.num_processes,
            seed=self.args.sampling_seed,
            drop_last=self.args.dataloader_drop_last,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.cut_captions += inputs.get("num_truncated", 0)
        roles = [role for role in ("anchor", "positive", "negative") if role in inputs]
        embeds = {role: in_chunks(_embed, model, inputs[role], self.args.tower_chunk_size)[0] for role in roles}
        anchors, positives = embeds["anchor"], embeds["positive"]
        options: dict[str, Any] = {"scale": self.args.scale, "tile_size": self.args.loss_chunk_size}
        loss = hard_negative_info_nce(anchors, positives, embeds.get("negative"), **options)
        if self.args.symmetric_loss:
            loss = (loss + hard_negative_info_nce(positives, anchors, **options)) / 2
        return (loss, embeds) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.cut_captions:
            logs["cut_captions"] = self.cut_captions
        super().log(logs, start_time)


def _embed(model: nn.Module, captions: dict[str, Tensor]) -> tuple[Tensor]:
    return (model(**captions).pooler_output,)


def run(config: Stage1Config, resume: bool = False) -> dict[str, Any]:
    """Stage 1 from its settings to a text tower in `config.output_dir`.

    Args:
        config: The settings.
        resume: Go on from the newest checkpoint.

    Returns:
        The metrics of the run: training's, and caption retrieval's with the prefix `eval_`.
    """
    require(config, ["model_name_or_path", "sources"])
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    checkpoint = resume_point(config, resume)
    set_seed(config.seed)
    dataset = PairDataset([PairSource.from_dict(source) for source in config.sources], seed=config.sampling_seed)
    retrieval = retrieval_sets(config)
    model, tokenizer = load_text_tower(config)
    add_lora(model, config)
    trainer = Stage1Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=PairCollator(tokenizer, model.config.num_prefix_tokens),
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(checkpoint, lambda: trainer.save_result(config.output_dir, config.save_format))
