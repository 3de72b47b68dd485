"""Trainer of the distillation: a small text encoder learns the rows that a teacher gives the same texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from llm2clip.evaluation.metrics import KS, caption_retrieval_metrics
from llm2clip.hub.cards.facts import QUERY_TASK, Evaluation
from llm2clip.losses.distillation import cosine_distance, similarity_distance
from llm2clip.trainers.base_config import require_prefixes
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.distill_config import DistillConfig
from llm2clip.trainers.distill_data import RECALL, TaughtQueries, TextCollator
from llm2clip.trainers.student import Student
from llm2clip.utils.tables import markdown_table

RATIO = f"{RECALL}10_ratio"


class DistillTrainer(StageTrainer):
    """Trains a [`Student`] to give texts the rows of a teacher: the mean of 1 - cosine, without images.

    The rows of its data sets are dicts with `text` and `embedding`, the teacher's row. With `similarity_weight` the
    student's similarities within the batch follow those of the teacher too, and with `matryoshka_dims` prefixes of its
    rows those of the teacher's. The log has both terms of whole rows, of the last step.

    ```python
    encoder = load_encoder("my-model")
    student = Student.create("sentence-transformers/all-MiniLM-L6-v2", encoder.width, lambda: encoder)
    rows = [{"text": text, "embedding": row} for text, row in zip(texts, encoder.encode_text(texts))]
    DistillTrainer(model=student, args=DistillConfig(output_dir="student"), train_dataset=rows).fit()
    ```

    `retrieval` has [`TaughtQueries`] by name.
    """

    title = "Distillation"
    card_task = QUERY_TASK
    evaluation_title = "text to image retrieval"
    config_class: ClassVar[type] = DistillConfig
    retrieval_class: ClassVar[type] = TaughtQueries
    args: DistillConfig

    def prepare_model(self, model: nn.Module) -> None:
        if not isinstance(model, Student):
            raise ValueError(f"model is a {type(model).__name__}; this stage trains a Student (Student.create).")
        require_prefixes(self.args.matryoshka_dims, model.width)
        if self.args.freeze_embeddings:
            if model.is_static:
                raise ValueError("freeze_embeddings leaves a static student nothing to learn but its head; unset it.")
            model.backbone.get_input_embeddings().requires_grad_(False)

    def default_collator(self) -> TextCollator | None:
        return TextCollator(self.unwrapped())

    @staticmethod
    def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
        student, teacher = (torch.as_tensor(rows) for rows in prediction.predictions[:2])
        return caption_retrieval_metrics(student, teacher)

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = model(inputs["input_ids"], inputs["attention_mask"])
        embeds = {"student": rows, "teacher": inputs["embeddings"]}
        return self.loss_of(self.without_repeats(embeds), None, None, {}, self.args.matryoshka_dims), embeds

    def contrastive_loss(
        self,
        embeds: Mapping[str, Tensor],
        logit_scale: Tensor | None,
        logit_bias: Tensor | None,
        ids: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Compute the loss of a batch; override it for a loss of your own.

        Args:
            embeds: `student` and `teacher` of this process, `(rows, width)` each, of unit length.
            logit_scale, logit_bias, ids: None and empty; see [`Stage2Trainer.contrastive_loss`].

        Returns:
            A scalar whose mean over the processes is the loss of the batch of all of them.
        """
        student, teacher = embeds["student"], embeds["teacher"]
        terms = {"cosine_loss": cosine_distance(student, teacher)}
        if self.args.similarity_weight:
            terms["similarity_loss"] = similarity_distance(student, teacher)
        self.terms = {name: term.detach() for name, term in terms.items()}
        return terms["cosine_loss"] + self.args.similarity_weight * terms.get("similarity_loss", 0.0)

    def measure(self, model: Student, retrieval: TaughtQueries) -> dict[str, float | int]:
        rows = model.encode(retrieval.texts, self.args.per_device_eval_batch_size)
        lengths = torch.tensor([len(ids) for ids in model.tokenize(retrieval.texts)])
        return retrieval.compare(rows, lengths)

    def save_result(self, output_dir: str | Path) -> None:
        self.save_weights(output_dir)

    def comparison(self, evaluations: list[Evaluation]) -> str:
        """The student against its teacher, set by set, for the card."""
        rows = []
        for found in evaluations:
            metrics = found.metrics
            recalls = [(metrics[f"{RECALL}{k}"], metrics[f"{RECALL}{k}_of_teacher"]) for k in KS]
            shown = [f"{100 * own:.1f} / {100 * wanted:.1f}" for own, wanted in recalls]
            by_length = [
                f"{name.removeprefix(f'{RATIO}_of_').removesuffix('_tokens')}: {100 * value:.0f}"
                for name, value in metrics.items()
                if name.startswith(f"{RATIO}_of_")
            ]
            rows.append([found.title, *shown, f"{100 * metrics[RATIO]:.0f}", ", ".join(by_length)])
        header = ["queries", *(f"R@{k}, student / teacher" for k in KS), "kept of R@10", "by length in tokens"]
        return markdown_table(header, rows, (0, 5)) if rows else ""
