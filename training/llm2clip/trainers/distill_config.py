"""Settings of the distillation of a query encoder, and those of its command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import SchedulerType

from llm2clip.trainers.base_config import StageConfig
from llm2clip.utils.settings import setting


@dataclass
class DistillConfig(StageConfig):
    """Settings of [`DistillTrainer`].

    Besides those of [`StageConfig`], these defaults differ from `TrainingArguments`: `learning_rate=5e-4`,
    `lr_scheduler_type="cosine"`, `warmup_steps=0.1`, `num_train_epochs=4`, `per_device_train_batch_size=64`,
    `weight_decay=0.01`, `ddp_find_unused_parameters=False`.
    """

    similarity_weight: float = setting(
        0.0,
        "Weight of a second term of the loss: the mean squared difference between the similarities within the batch "
        "of student and teacher.",
    )
    matryoshka_dims: list[int] = setting(
        [], "Prefixes that follow those of the teacher too (Matryoshka), such as 64 256; the loss is the mean."
    )
    freeze_embeddings: bool = setting(
        False,
        "Leave the token embeddings of the student as they are. They are most of the weights of a multilingual "
        "student: steps take less time and memory, and words of no text stay comparable with those of the texts.",
    )
    learning_rate: float = setting(5e-4, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = setting("cosine", "Schedule of the learning rate.")
    warmup_steps: float = setting(0.1, "Optimizer steps of linear warm-up; below 1, a share of all steps.")
    num_train_epochs: float = setting(4.0, "Passes over the texts.")
    per_device_train_batch_size: int = setting(64, "Texts per device and step.")
    weight_decay: float = setting(0.01, "Weight decay.")
    ddp_find_unused_parameters: bool | None = setting(False, "Keep it false: every step uses every trained parameter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity_weight < 0:
            raise ValueError(f"similarity_weight must be at least 0, but is {self.similarity_weight}.")
        if self.label_smoothing_factor:
            raise ValueError("the loss of this stage has no label smoothing; leave label_smoothing_factor unset.")


@dataclass
class DistillRecipe(DistillConfig):
    """Settings of the command `llm2clip distill-text`: those of the Trainer, the two models and the texts."""

    model: str = setting("", "Teacher: an LLM2CLIP model, or any other model of texts that `llm2clip evaluate` takes.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the teacher's Hub repo; unset: main.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "dtype that the teacher computes in.")
    student: str = setting(
        "",
        "Student: Hub id or folder of a text encoder, such as a MiniLM; layers:N, N layers of the teacher's own text "
        "model, two thirds of them the first and the others the last ones; static, its token vectors alone, or "
        "static:NAME, those of another text model.",
    )
    student_revision: str | None = setting(None, "Branch, tag or commit of the student's Hub repo; unset: main.")
    max_text_length: int | None = setting(
        None, "Largest length of a text in tokens of the student; unset: its own, at most 512."
    )
    sources: list[dict[str, Any]] = setting(
        [],
        "Texts to learn from, without images: a list of CaptionSource mappings, such as .txt files of a text a line. "
        "All caption columns are used.",
    )
    eval_sources: dict[str, Any] = setting(
        {},
        "Held-out images and queries: a mapping from a name to CaptionSource fields. Student and teacher are compared "
        "on each caption column by itself.",
    )
    teacher_rows: str | None = setting(
        None, "Folder of the teacher's rows, which several runs may share; unset: teacher/ in output_dir."
    )
    into: str | None = setting(
        None, "Folder of an LLM2CLIP model in whose query_encoder/ the student is put too: the teacher, or a copy."
    )
