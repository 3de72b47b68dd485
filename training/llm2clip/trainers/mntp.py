"""Masked next token prediction, the optional stage before stage 1 (LLM2Vec, arXiv 2404.05961).

A decoder that suddenly attends in both directions learns to use the context on its right: tokens are masked, and the
state *before* a masked token predicts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from llm2clip.data import CaptionSource, SampleIndex, SampleIndexBatchSampler, distinct_captions
from llm2clip.data.sampling import EpochDataset, stable_seed
from llm2clip.trainers.base import resume_point
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.text_tower import TextTowerConfig, TextTowerTrainer, add_lora, load_text_tower, retrieval_sets
from llm2clip.utils.settings import require
from llm2clip.utils.towers import is_text_tower, loading_options


@dataclass
class MNTPConfig(TextTowerConfig):
    """Settings of masked next token prediction.

    Besides those of [`TextTowerConfig`], these defaults differ from `TrainingArguments` (the original's recipe):
    `num_train_epochs=1`, `per_device_train_batch_size=32`.
    """

    sources: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Texts: a list of CaptionSource mappings; every caption column is text."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per sample; the texts are joined and cut to it."})
    mlm_probability: float = field(default=0.2, metadata={"help": "Share of the tokens that is masked."})
    mask_token: str = field(default="_", metadata={"help": "Token that stands for a masked one; of the vocabulary."})
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "Share of the masked tokens that becomes the mask token (1: all)."}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Share of the masked tokens that becomes a random token; the rest stays."}
    )
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 32


class TokenBlocks(EpochDataset):
    """Texts, joined and cut into blocks of equal length; a rest that fills no block is left out.

    Args:
        texts: The texts.
        tokenizer: The LLM's own tokenizer.
        block_size: Tokens per block.

    Raises:
        ValueError: The texts do not fill one block.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        ids = torch.tensor(list(chain.from_iterable(_token_ids(texts, tokenizer))), dtype=torch.int32)
        count = len(ids) // block_size
        if count == 0:
            raise ValueError(f"the texts have {len(ids)} tokens and do not fill one block of {block_size}.")
        self.blocks = ids[: count * block_size].view(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        return {"input_ids": self.blocks[index.index].long(), "index": index}


def _token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1000:
            yield from tokenizer(batch, verbose=False)["input_ids"]
            batch = []
    if batch:
        yield from tokenizer(batch, verbose=False)["input_ids"]


class MNTPTrainer(TextTowerTrainer):
    """Trains the decoder of a text tower to predict masked tokens; the LLM's head is used and not trained.

    Args:
        head: The LLM's output embedding, `hidden_size` to vocabulary.
        kwargs: See [`StageTrainer`].
    """

    args: MNTPConfig

    def __init__(self, *, head: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = head.to(self.args.device)

    def batch_sampler(self) -> SampleIndexBatchSampler:
        return SampleIndexBatchSampler(
            cast(EpochDataset, self.train_dataset),
            self.args.per_device_train_batch_size,
            num_replicas=self.accelerator.num_processes,
            seed=self.args.sampling_seed,
            drop_last=self.args.dataloader_drop_last,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        states = model(**inputs).last_hidden_state
        loss = masked_next_token_loss(states, labels, self.head, self._softcap)
        return (loss, {"last_hidden_state": states}) if return_outputs else loss

    @property
    def _softcap(self) -> float | None:
        config = self.accelerator.unwrap_model(self.model).config.decoder_config
        return getattr(config, "final_logit_softcapping", None)


def masked_next_token_loss(states: Tensor, labels: Tensor, head: nn.Module, softcap: float | None = None) -> Tensor:
    """Cross entropy of predicting each masked token from the state before it.

    Args:
        states: `(batch, tokens, hidden_size)`.
        labels: `(batch, tokens)`, the original token where it was masked and -100 elsewhere. A label at the first
            position has no state before it and is not scored.
        head: Maps states to logits. Only the scored positions pass through it.
        softcap: Gemma 2's cap on the logits.
    """
    targets = labels[:, 1:]
    scored = targets != -100
    # Mixed precision ends at the model: its states are float32, whatever the head's weights are.
    dtype = next(head.parameters()).dtype
    logits = head(states[:, :-1][scored].to(dtype)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets[scored])


class MaskCollator:
    """Masks tokens with transformers' collator; what it masks is a function of the seed and the samples alone.

    Args:
        tokenizer: The LLM's own tokenizer; gets the mask token, and EOS as padding token if it has none.
        config: The settings.

    Raises:
        ValueError: The mask token is not one token of the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: MNTPConfig) -> None:
        if config.mask_token not in tokenizer.get_vocab():
            raise ValueError(f"mask_token {config.mask_token!r} is not a token of {tokenizer.name_or_path}.")
        tokenizer.mask_token = config.mask_token
        # Blocks are all of one length, but the collator insists on a padding token.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.seed = config.sampling_seed
        self.collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=config.mlm_probability,
            mask_replace_prob=config.mask_replace_prob,
            random_replace_prob=config.random_replace_prob,
        )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        first: SampleIndex = samples[0]["index"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.seed, first.epoch, first.index))
            return dict(self.collator([{"input_ids": sample["input_ids"]} for sample in samples]))


def _load_language_model(config: MNTPConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, revision = config.model_name_or_path, config.model_revision
    if is_text_tower(name, revision):
        raise ValueError(
            f"{name} is a text tower, without the language-modelling head that this stage needs; give the LLM."
        )
    options = loading_options(config.dtype, config.attn_implementation, revision)
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    return model, AutoTokenizer.from_pretrained(name, revision=revision)


def _frozen_head(language_model: PreTrainedModel) -> nn.Module:
    head: Any = language_model.get_output_embeddings()
    embedding: Any = language_model.get_input_embeddings()
    if head.weight is not embedding.weight:  # a tied head is the embedding, which full fine-tuning trains
        head.requires_grad_(False)
    return head


def run(config: MNTPConfig, resume: bool = False) -> dict[str, Any]:
    """The pre-stage from its settings to a text tower in `config.output_dir`.

    Args:
        config: The settings.
        resume: Go on from the newest checkpoint.

    Returns:
        The metrics of the run.
    """
    require(config, ["model_name_or_path", "sources"])
    has_lora = config.lora_rank > 0
    check_pushing(config, config.model_name_or_path, has_lora and config.save_format == "adapter", has_lora)
    checkpoint = resume_point(config, resume)
    set_seed(config.seed)
    retrieval = retrieval_sets(config)
    language_model: Any
    language_model, plain_tokenizer = _load_language_model(config)
    texts = distinct_captions([CaptionSource.from_dict(source) for source in config.sources])
    dataset = TokenBlocks(texts, plain_tokenizer, config.block_size)
    model, tokenizer = load_text_tower(config, decoder=language_model.base_model)
    add_lora(model, config)
    trainer = MNTPTrainer(
        head=_frozen_head(language_model),
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=MaskCollator(plain_tokenizer, config),
        processing_class=tokenizer,
        retrieval=retrieval,
    )
    return trainer.fit(checkpoint, lambda: trainer.save_result(config.output_dir, config.save_format))
