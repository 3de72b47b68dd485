"""Masked next token prediction, the optional stage before stage 1 (LLM2Vec, arXiv 2404.05961).

It adapts a decoder to bidirectional attention: tokens are masked, and the state *before* a masked token predicts it.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.losses.gather import exchange_counts
from llm2clip.trainers.base_config import validate_collator_settings
from llm2clip.trainers.base_trainer import EmbeddedBatch
from llm2clip.trainers.mntp_config import MNTPConfig
from llm2clip.trainers.mntp_data import MaskCollator
from llm2clip.trainers.sharding import is_sharded
from llm2clip.trainers.text_tower_trainer import TextTowerTrainer

# Settings that the collator follows.
MASK_SETTINGS = ("mlm_probability", "mask_token")
# Label of a token that is not masked.
NOT_MASKED = -100


class MNTPTrainer(TextTowerTrainer):
    """Trains the decoder of a text tower to predict masked tokens with the LLM's head, which stays as it is.

    The rows of its data sets are dicts with `text` or `input_ids`; see [`MaskCollator`].

    ```python
    language_model = AutoModelForCausalLM.from_pretrained("llm")
    decoder = language_model.base_model
    model = LLM2CLIPTextModel(LLM2CLIPTextConfig(decoder.config), decoder)
    args, head = MNTPConfig(output_dir="mntp"), language_model.get_output_embeddings()
    MNTPTrainer(model=model, args=args, head=head, train_dataset=dataset, processing_class=tokenizer).train()
    ```

    Args:
        head: The LLM's output embedding, `hidden_size` to vocabulary.
        kwargs: See [`StageTrainer`].

    Raises:
        ValueError: The head is the trained token embedding, which FSDP would shard.
    """

    config_class: ClassVar[type] = MNTPConfig
    args: MNTPConfig

    def __init__(self, *args: Any, head: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = head.to(self.args.device)
        if is_sharded(self.accelerator) and any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "FSDP shards the token embedding, with which this LLM's head is tied and which this run trains, so "
                "that the head would keep its first values; train with LoRA (lora_rank)."
            )

    def _validate_settings(self) -> None:
        super()._validate_settings()
        if not isinstance(self.data_collator, MaskCollator):
            validate_collator_settings(self.args, self.data_collator, MASK_SETTINGS)

    def default_collator(self) -> MaskCollator | None:
        tokenizer: Any = self.processing_class
        return None if tokenizer is None else MaskCollator(copy.deepcopy(tokenizer), self.args)

    def embed_batch(self, model: nn.Module, inputs: dict[str, Any]) -> EmbeddedBatch:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        return EmbeddedBatch({"last_hidden_state": model(**inputs).last_hidden_state}, ids={"labels": labels})

    def contrastive_loss(self, batch: EmbeddedBatch) -> Tensor:
        """Compute the loss of a batch from its states; override it for a loss of your own.

        Args:
            batch: Its `embeds` are `last_hidden_state` of this process, `(rows, tokens, hidden_size)`, and its `ids`
                are `labels`, `(rows, tokens)`: the original token where it was masked, and -100 elsewhere.

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        labels, count = cast(Tensor, batch.ids["labels"]), None
        if not self.model.training:
            # In training, every process has the same weight, as in the original code.
            counts = exchange_counts([int((labels[:, 1:] != NOT_MASKED).sum())], labels.device)
            count = sum(scored for (scored,) in counts) / len(counts)
        softcap = getattr(self.unwrapped().config.decoder_config, "final_logit_softcapping", None)
        return masked_next_token_loss(batch.embeds["last_hidden_state"], labels, self.head, softcap, count)


def masked_next_token_loss(
    states: Tensor, labels: Tensor, head: nn.Module, softcap: float | None = None, count: float | None = None
) -> Tensor:
    """Cross entropy of predicting each masked token from the state before it.

    Args:
        states: `(batch, tokens, hidden_size)`.
        labels: `(batch, tokens)`, the original token where it was masked and -100 elsewhere. A label at the first
            position has no state before it and is not scored.
        head: Maps states to logits. Only the scored positions pass through it.
        softcap: Gemma 2's cap on the logits.
        count: What the sum over the scored labels is divided by; by default their number.
    """
    targets = labels[:, 1:]
    scored = targets != NOT_MASKED
    # Mixed precision ends at the model: its states are float32, whatever the head's weights are.
    dtype = next(head.parameters()).dtype
    logits = head(states[:, :-1][scored].to(dtype)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets[scored], reduction="sum")
    # In a batch of short rows there may be none.
    return loss / (scored.sum().clamp(min=1) if count is None else count or 1)
