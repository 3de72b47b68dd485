"""Stage 1, caption contrastive fine-tuning: turn a causal LLM into a caption encoder (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from llm2clip.data import PairBatchSampler, PairCollator
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.losses import hard_negative_info_nce
from llm2clip.trainers.grad_cache import embed_captions, in_chunks
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.text_tower_trainer import TextTowerTrainer


class Stage1Trainer(TextTowerTrainer):
    """Trains a text tower to give two captions of one image similar embeddings, against the rest of the global batch.

    The rows of its data sets are dicts of texts: `anchor`, `positive` and optionally `negative`, a hard negative; see
    [`PairCollator`]. `processing_class` is the tokenizer of the text tower.

    ```python
    model = LLM2CLIPTextModel.from_pretrained("text-tower")
    tokenizer = AutoTokenizer.from_pretrained("text-tower")
    args = Stage1Config(output_dir="stage1")
    Stage1Trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
    ```
    """

    title = "Stage 1"
    sampler_class = PairBatchSampler
    args: Stage1Config

    def default_collator(self) -> PairCollator | None:
        if self.processing_class is None:
            return None
        text = self.unwrapped().config
        return PairCollator(cast(Any, self.processing_class), text.num_prefix_tokens, pool_prompt=text.pool_prompt)

    @staticmethod
    def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
        anchors, positives = (torch.as_tensor(embeds) for embeds in prediction.predictions[:2])
        return caption_retrieval_metrics(anchors, positives)

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        embeds: dict[str, Tensor] = {
            role: in_chunks(embed_captions, model, inputs[role], self.args.tower_chunk_size)[0]
            for role in ("anchor", "positive", "negative")
            if role in inputs
        }
        scale = torch.full((), self.args.scale, device=self.args.device)
        return self.loss_of(self.without_repeats(embeds), scale, None, {}), embeds

    def contrastive_loss(
        self,
        embeds: Mapping[str, Tensor],
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        ids: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Compute the loss of a batch; override it for a loss of your own.

        Args:
            embeds: `anchor`, `positive` and, with hard negatives, `negative` of this process, `(rows, width)` each.
                The losses of [`llm2clip.losses`] gather those of the other processes.
            logit_scale: The setting `scale`.
            logit_bias, ids: None and empty; see [`Stage2Trainer.contrastive_loss`].

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        anchors, positives = embeds["anchor"], embeds["positive"]
        options: dict[str, Any] = {"scale": self.args.scale, "tile_size": self.args.loss_chunk_size}
        loss = hard_negative_info_nce(anchors, positives, embeds.get("negative"), **options)
        if self.args.symmetric_loss:
            loss = (loss + hard_negative_info_nce(positives, anchors, **options)) / 2
        return loss
