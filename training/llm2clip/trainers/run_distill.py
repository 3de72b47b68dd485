"""Distill a query encoder from its settings: the command `llm2clip distill-text`, and the function for Python."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from llm2clip.data import CaptionSource
from llm2clip.data.captions import distinct_captions
from llm2clip.data.sources import OF_TRAINING
from llm2clip.evaluation.own_data import retrieval_sets
from llm2clip.hub.upload_files import model_files
from llm2clip.trainers.distill_config import DistillRecipe
from llm2clip.trainers.distill_data import TaughtQueries, TaughtTexts
from llm2clip.trainers.distill_trainer import DistillTrainer
from llm2clip.trainers.run_context import RunContext, stage_command
from llm2clip.trainers.student import Student
from llm2clip.trainers.teacher import Teacher
from llm2clip.utils.files import read_json
from llm2clip.utils.folders import atomic_folder
from llm2clip.utils.manifests import listed_files
from llm2clip.utils.processes import on_main_process
from llm2clip.utils.repos import RepoKind, inspect_repo
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.query_encoder_llm2clip import FOLDER, SPACE_FILE, space_identity

logger = logging.getLogger(__name__)

COMMAND = "distill-text"
# Texts by which the head of the student is fitted before the training.
FITTED = 8192


def distill_text(
    model: str,
    student: str,
    sources: Sequence[str | dict[str, Any]],
    output_dir: str | Path,
    *,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Teach a small text encoder the space of a model, from texts alone.

    ```python
    distill_text("my-model", "sentence-transformers/all-MiniLM-L6-v2", ["queries.txt"], "student", into="my-model")
    ```

    Args:
        model: The teacher: Hub id or folder of an LLM2CLIP model, or what else `load_encoder` takes.
        student: Hub id or folder of a text encoder, `layers:N`, `static` or `static:NAME`.
        sources: Texts to learn from: paths, or fields of [`CaptionSource`].
        output_dir: Folder of the run, and of the student, which is that of a plain SentenceTransformer.
        resume: Continue from the newest checkpoint in `output_dir`.
        settings: Other settings of the command, such as `eval_sources`, `into` and `num_train_epochs`.

    Returns:
        The metrics of training, and with the prefix `eval_` the comparisons with the teacher.
    """
    listed = [{"path": source} if isinstance(source, str) else dict(source) for source in sources]
    fields = {"model": model, "student": student, "sources": listed, "output_dir": str(output_dir), **settings}
    return run(build_config(DistillRecipe, fields, "distill_text"), resume=resume)


@stage_command("model", "student", "sources", "output_dir")
def run(config: DistillRecipe, context: RunContext) -> dict[str, Any]:
    """Distill a query encoder, or resume, and save it in `config.output_dir`.

    Returns:
        The metrics of training, and with the prefix `eval_` the comparisons with the teacher.
    """
    set_seed(config.seed)
    folder = config.teacher_rows or str(Path(config.output_dir) / "teacher")
    teacher = Teacher(config.model, folder, config.model_revision, config.dtype)
    if config.into is not None:
        require_space(config.into, teacher.space)
    sources = [CaptionSource.from_dict(source).without(OF_TRAINING) for source in config.sources]
    texts = distinct_captions(sources)
    texts = [text for text in texts if text.strip()]
    config.check_length(len(texts))
    dataset = TaughtTexts(texts, teacher.texts(texts))
    sets = retrieval_sets(config.eval_sources)
    retrieval = {name: TaughtQueries.of(data, teacher) for name, data in sets.items()}
    if context.checkpoint is not None:
        student = Student.from_pretrained(context.checkpoint)
    else:
        student = Student.create(
            config.student,
            teacher.width,
            lambda: teacher.encoder,
            space=teacher.space,
            revision=config.student_revision,
            max_length=config.max_text_length,
        ).to(config.device)
        # A sample of the texts, by the seed.
        drawn = np.random.default_rng(config.sampling_seed).permutation(len(texts))[:FITTED]
        student.fit_head([texts[row] for row in drawn], dataset.store.read(dataset.rows[drawn], torch.float32))
    # The teacher, if it was loaded, is not needed any more.
    teacher.__dict__.pop("encoder", None)
    trainer = DistillTrainer(model=student, args=config, train_dataset=dataset, retrieval=retrieval)
    metrics = trainer.fit(context)
    if config.into is not None:
        into = config.into
        on_main_process(lambda: attach_query_encoder(config.output_dir, into))
    return metrics


def attach_query_encoder(student: str | Path, model: str | Path) -> None:
    """Copy a student into `query_encoder/` of a model's folder, in place of an earlier one.

    `model.encode_text(texts, encoder="query")` and `load_encoder(model, text_encoder="query")` read it there.

    Args:
        student: Folder of the student.
        model: Folder of an LLM2CLIP model.

    Raises:
        ValueError: The student was taught the space of another model.
        FileExistsError: What is in `query_encoder/` was not written by this.
    """
    source = Path(student)
    if not (source / SPACE_FILE).is_file():
        raise ValueError(f"{student} is not the folder of a student: it has no {SPACE_FILE}.")
    require_space(model, read_json(source / SPACE_FILE).get("space"))
    if any(Path(name).parts[0] == FOLDER for name in listed_files(Path(model))):
        raise ValueError(
            f"{model} was built with a query encoder, which its list of files has; put the student into the model "
            "that it was built from, and build it again."
        )
    names = [name for name in model_files(source).uploaded if Path(name).suffix in (".json", ".safetensors")]
    names = [name for name in names if not name.startswith(".")]
    with atomic_folder(Path(model) / FOLDER, COMMAND, overwrite=True) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    logger.info("The query encoder of %s is in %s.", model, Path(model) / FOLDER)


def require_space(model: str | Path, space: str | None) -> None:
    """Raise a `ValueError` unless a model has a space; see [`space_identity`]."""
    if not Path(model).is_dir():
        raise ValueError(f"there is no folder {model}, into which the query encoder could be put.")
    inspect_repo(model).require(RepoKind.JOINT, hint="A query encoder belongs to a whole model.")
    present = space_identity(LLM2CLIPModel.from_pretrained(str(model), text_model=False))
    if present != space:
        raise ValueError(
            f"the query encoder was taught the space {space}, but {model} has {present}: their vectors cannot be "
            "compared. Give the model that was the teacher, or distill from this one."
        )
